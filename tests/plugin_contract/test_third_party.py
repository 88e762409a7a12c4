"""A stranger's packages, installed by pip into an environment of their own, and used from there."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest

from tunesmith.scaffold import write_package

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "plugins" / "examples" / "tunesmith-example"

PYPROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "2.5"

[project.entry-points.tunesmith]
{module} = "{module}"
"""

METHOD = """
import attrs
from tunesmith.plugin import Spec, hookimpl

@attrs.frozen
class {config}:
    rank: int = 4

@hookimpl
def tunesmith_methods({arguments}):
    return [Spec("{name}", {config}, "{impl}", api={api})]
"""


def method(name, config="Config", arguments="", impl="collections:OrderedDict", api=1):
    return METHOD.format(name=name, config=config, arguments=arguments, impl=impl, api=api)


STRANGERS = {
    "bad-import": "import a_package_nobody_has\n",
    "bad-signature": method("signed", arguments="session, model"),
    "bad-api": method("ancient", api=0),
    "bad-path": method("pathless", impl="bad_path:NotThere"),
    "shadow": method("lora", "ShadowConfig"),
    "twin-one": method("twin"),
    "twin-two": method("twin"),
}


class Environment:
    """A virtual environment that sees what this one has, and has packages of its own."""

    def __init__(self, directory: Path) -> None:
        venv.create(directory, with_pip=False, symlinks=True)
        scheme = sysconfig.get_preferred_scheme("prefix")
        variables = {"base": str(directory), "platbase": str(directory)}
        self.python = Path(sysconfig.get_path("scripts", scheme, variables)) / "python"
        self.site = Path(sysconfig.get_path("purelib", scheme, variables))
        # addsitedir and not a bare path: an editable tunesmith is itself a .pth file in there
        here = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
        lines = [f"import site; site.addsitedir({path!r})" for path in here]
        (self.site / "the_environment_of_the_tests.pth").write_text("\n".join(lines) + "\n")

    def install(self, *projects: Path) -> None:
        """Install by pip, offline, as a user would."""
        options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
        quiet = ["--disable-pip-version-check", "--no-warn-script-location"]
        self.run("-m", "pip", "install", *options, *quiet, *map(str, projects))

    def run(self, *arguments: str, cwd: Path | None = None, **variables: str) -> str:
        """Run Python; return what it printed, or fail with what it said."""
        # a source tree on the path would stand in for what is installed
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [str(self.python), *arguments],
            cwd=cwd or self.site,
            env={**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, code: str, **variables: str) -> dict:
        """Run code that has `registry` and `failure(kind, name)`, and return its `answer`."""
        script = textwrap.dedent("""
            import json
            from tunesmith.errors import TunesmithError
            from tunesmith.plugin.registry import Registry
            registry = Registry()
            def failure(kind, name):
                try:
                    registry.find(kind, name).load()
                except TunesmithError as error:
                    return str(error)
        """)
        script += textwrap.dedent(code) + "\nprint(json.dumps(answer))\n"
        return json.loads(self.run("-c", script, **variables))


def write_project(directory: Path, distribution: str, source: str) -> Path:
    module = distribution.replace("-", "_")
    directory.mkdir()
    (directory / f"{module}.py").write_text(source)
    (directory / "pyproject.toml").write_text(
        PYPROJECT.format(distribution=distribution, module=module)
    )
    return directory


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """One environment with the example and every stranger in it."""
    assert any(
        entry.dist and entry.dist.name == "tunesmith"
        for entry in importlib.metadata.entry_points(group="tunesmith")
    ), "these tests need tunesmith installed, editable or not: pip install -e ."
    place = tmp_path_factory.mktemp("third-party")
    made = Environment(place / "venv")
    strangers = [write_project(place / name, name, text) for name, text in STRANGERS.items()]
    made.install(EXAMPLE, write_package("method", "zora", place), *strangers)
    return made


@pytest.fixture(scope="session")
def listing(environment: Environment) -> dict:
    """What the registry says in there."""
    return environment.ask("""
        import sys
        answer = {
            "keys": [[item.kind, item.key, item.version] for item in registry],
            "broken": {b.distribution: [b.version, b.problem, b.traceback]
                       for b in registry.broken},
            "lora": registry.find("methods", "lora").key,
            "shadow": registry.find("methods", "shadow:lora").spec.config.__name__,
            "heavy": sorted({"torch", "transformers", "peft"} & set(sys.modules)),
            "failures": {name: failure("methods", name) for name in [
                "twin", "twin-two:twin", "bad-api:ancient", "pathless", "signed", "bad-import:x",
            ]},
        }
    """)


def test_the_example_is_installed_and_listed_beside_the_built_ins(listing):
    assert ["formats", "tunesmith-example:dolly", "0.1.0"] in listing["keys"]
    assert ["methods", "tunesmith-example:lora_fa", "0.1.0"] in listing["keys"]
    assert ("methods", "tunesmith:lora") in {(kind, key) for kind, key, _ in listing["keys"]}


def test_a_package_that_tunesmith_has_written_is_installed_and_listed(listing):
    assert ["methods", "tunesmith-zora:zora", "0.1.0"] in listing["keys"]


def test_listing_strangers_imports_nothing_heavy(listing):
    assert listing["heavy"] == []


def test_a_stranger_does_not_take_a_built_ins_name(listing):
    assert listing["lora"] == "tunesmith:lora"
    assert listing["shadow"] == "ShadowConfig"


def test_plugins_that_do_not_load_are_recorded_with_what_is_wrong(listing):
    version, problem, traceback = listing["broken"]["bad-import"]
    assert version == "2.5"
    assert problem == "ModuleNotFoundError: No module named 'a_package_nobody_has'"
    assert "bad_import.py" in traceback
    assert "PluginValidationError" in listing["broken"]["bad-signature"][1]
    assert set(listing["broken"]) == {"bad-import", "bad-signature"}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("twin", "claimed by 2 plugins; say which: 'twin-one:twin' or 'twin-two:twin'"),
        ("bad-api:ancient", "was written for plugin API 0"),
        ("pathless", "bad_path has no class 'NotThere'"),
        ("signed", "failed to load: bad-import 2.5: ModuleNotFoundError"),
        ("bad-import:x", "No module named 'a_package_nobody_has'"),
    ],
)
def test_whoever_asks_for_what_is_broken_is_told_why(listing, name, said):
    assert said in listing["failures"][name]


def test_a_clash_is_settled_by_naming_the_distribution(listing):
    assert listing["failures"]["twin-two:twin"] is None


def test_a_stranger_can_be_switched_off(environment):
    answer = environment.ask(
        "answer = [failure('methods', 'twin'), registry.disabled]",
        TUNESMITH_DISABLE_PLUGINS="twin-one,bad-import",
    )
    assert answer == [None, ["bad_import", "twin_one"]]


def test_the_examples_own_tests_pass_where_it_is_installed(environment, tmp_path):
    cache = f"cache_dir={tmp_path / 'cache'}"
    said = environment.run("-m", "pytest", "-o", cache, "-W", "ignore", "tests", cwd=EXAMPLE)
    assert " passed" in said
    assert "skipped" not in said


RUN = """
import json, sys
from pathlib import Path
from tunesmith import Tuner
from tunesmith.testing import tiny_llama

place = Path(sys.argv[1])
result = (
    Tuner(tiny_llama(place / "model"))
    .quantize("nf4")
    .peft("lora_fa", r=4)
    .sft(str(place / "dolly.jsonl"), max_steps=2)
    .run(place / "run", progress=False)
)
print(json.dumps({name: str(path) for name, path in result.adapters.items()}))
"""


def test_a_real_run_takes_the_strangers_format_and_method(environment, tmp_path):
    rows = [
        {
            "instruction": f"Which number is {n}?",
            "context": "Numbers are named by digits." if n % 2 else "",
            "response": f"It is the number {n}.",
            "category": "closed_qa",
        }
        for n in range(12)
    ]
    (tmp_path / "dolly.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = environment.run("-c", RUN, str(tmp_path))
    (adapter,) = json.loads(said.splitlines()[-1]).values()

    from safetensors.torch import load_file

    weights = load_file(Path(adapter) / "adapter_model.safetensors")
    assert json.loads((Path(adapter) / "adapter_config.json").read_text())["r"] == 4
    learnt = [tensor for name, tensor in weights.items() if "lora_B" in name]
    assert learnt
    assert all(tensor.abs().sum() > 0 for tensor in learnt), "B starts at zero and must have moved"


def test_the_environment_is_not_the_one_that_runs_these_tests(environment):
    prefix = environment.run("-c", "import sys; print(sys.prefix)").strip()
    assert Path(prefix).resolve() != Path(sys.prefix).resolve()
