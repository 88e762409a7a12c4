"""`tunesmith plugins new KIND NAME`: writes a package with a plugin that works as it stands.

What it writes is one source file, one test that runs the kit of its kind, a pyproject.toml with
the entry point, and a README. The sources are those of `templates`, under the name that was given.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import keyword
import re
from pathlib import Path

from tunesmith.errors import PluginError, close_matches, listed
from tunesmith.plugin.spec import KINDS

__all__ = ["KINDS_OF_ONE", "add_command", "files_of", "source_of", "write_package"]

KINDS_OF_ONE = tuple(kind.removesuffix("s") for kind in KINDS)
"""The kinds as one plugin is called: "format", "method", ..."""

TEMPLATES = Path(__file__).parent / "templates"
NAME = re.compile(r"[a-z](_?[a-z0-9])*")
LONGEST = 40

USES = {
    "format": 'Tuner(MODEL).lora().sft(Data("rows.jsonl", format="{name}")).run("runs/a")',
    "transform": (
        'Tuner(MODEL).lora().sft(Data("rows.jsonl").transform("{name}", characters=500))'
        '.run("runs/a")'
    ),
    "quantizer": 'Tuner(MODEL).quantize("{name}").lora().sft("rows.jsonl").run("runs/a")',
    "method": 'Tuner(MODEL).peft("{name}", r=8).sft("rows.jsonl").run("runs/a")',
    "trainer": 'Tuner(MODEL).lora().train("{name}", "pairs.jsonl").run("runs/a")',
    "reward": '# an option of trainers and metrics that score answers: rewards="{name}"',
    "metric": 'Tuner(MODEL).lora().sft("a.jsonl").evaluate("{name}", "b.jsonl").run("runs/a")',
    "exporter": 'Tuner(MODEL).lora().sft("rows.jsonl").export("{name}").run("runs/a")',
}

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "0.1.0"
description = "The {kind} {name} for tunesmith."
readme = "README.md"
requires-python = ">=3.11"
dependencies = ["tunesmith>=0.1", "attrs>=23.2"]

# The whole registration: tunesmith imports this module and calls the hook in it.
[project.entry-points.tunesmith]
{name} = "{module}"

[dependency-groups]
test = ["pytest>=8.3"]

[tool.hatch.build.targets.wheel]
only-include = ["{module}.py"]

[tool.pytest.ini_options]
testpaths = ["tests"]
pythonpath = ["."]
addopts = "-q --strict-markers --strict-config"
"""

README = """\
# {distribution}

{article} {kind} for tunesmith: {first}

```
pip install .
tunesmith plugins --options {name}
```

```python
from tunesmith import {imports}

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
{use}
```

- `{module}.py` is the plugin: its options, what it does, and the hook by which tunesmith finds it.
- `tests/test_{name}.py` runs tunesmith's kit for {kind}s; `pytest` in this directory passes.

It works as it stands. Change what it does, run `pytest`, and read docs/plugins/{kind}.md in
tunesmith's source for what else {kind}s can say.
"""


def source_of(kind: str, name: str) -> str:
    """Return the source of a plugin of a kind ("method"), under a name ("zora").

    Errors: `PluginError` for a kind that there is not, and a name that would not work.
    """
    _check_kind(kind)
    _check_name(kind, name)
    return _named((TEMPLATES / f"{kind}.py").read_text(encoding="utf-8"), name)


def files_of(kind: str, name: str) -> dict[str, str]:
    """Return the files of a package, by their paths within it. Errors: as `source_of`."""
    source = source_of(kind, name)
    module = f"tunesmith_{name}"
    told = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0]
    words = {
        "kind": kind,
        "article": "An" if kind[0] in "aeiou" else "A",
        "name": name,
        "module": module,
        "distribution": module.replace("_", "-"),
        "first": f"{told[:1].lower()}{' '.join(told.split())[1:]}",
        "use": USES[kind].format(name=name),
        "imports": "Data, Tuner" if "Data(" in USES[kind] else "Tuner",
    }
    test = (TEMPLATES / f"{kind}_test.py").read_text(encoding="utf-8")
    return {
        "pyproject.toml": PYPROJECT.format(**words),
        "README.md": README.format(**words),
        f"{module}.py": source,
        f"tests/test_{name}.py": _named(test, name),
    }


def write_package(kind: str, name: str, into: Path) -> Path:
    """Write a package into a new directory, such as "tunesmith-zora" in `into`; return that one.

    Errors: `PluginError` for what `source_of` refuses, for a directory that is there already or
    cannot be made, and for a module of the name that is installed.
    """
    files = files_of(kind, name)
    directory = into / f"tunesmith-{name.replace('_', '-')}"
    if importlib.util.find_spec(f"tunesmith_{name}") is not None:
        raise PluginError(
            f"name '{name}': a module tunesmith_{name} is installed already; take another name, or "
            "uninstall it first"
        )
    try:
        directory.mkdir()
        for place, text in files.items():
            (directory / place).parent.mkdir(exist_ok=True)
            (directory / place).write_text(text, encoding="utf-8")
    except FileExistsError as error:
        raise PluginError(
            f"{directory} is there already, and nothing in it was changed; take another name, or "
            "another place by --into"
        ) from error
    except OSError as error:
        raise PluginError(
            f"{directory} cannot be written: {error.strerror}; name a directory that is there and "
            "can be written into by --into"
        ) from error
    return directory


def add_command(plugins: argparse.ArgumentParser) -> None:
    """Add `new` to the command `tunesmith plugins`."""
    commands = plugins.add_subparsers(title="commands", metavar="")
    new = commands.add_parser("new", help="write a package with a new plugin that works")
    new.add_argument("kind", metavar="KIND", help=f"one of {', '.join(KINDS_OF_ONE)}")
    new.add_argument("name", metavar="NAME", help="what users will write, such as zora")
    new.add_argument(
        "--into", type=Path, default=Path(), metavar="DIR", help="where; unset, the one you are in"
    )
    new.set_defaults(command=_new)


def _new(options: argparse.Namespace) -> int:
    directory = write_package(options.kind, options.name, options.into)
    print(f"wrote    {directory}")
    print(f"try      cd {directory} && python -m pytest")
    print(f"install  python -m pip install -e {directory}")
    return 0


def _named(template: str, name: str) -> str:
    return template.replace("newname", name).replace("NewName", _class_name(name))


def _class_name(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def _check_kind(kind: str) -> None:
    if kind not in KINDS_OF_ONE:
        raise PluginError(
            f"unknown kind '{kind}'{close_matches(kind, KINDS_OF_ONE)}; expected one of "
            f"{', '.join(KINDS_OF_ONE)}"
        )


def _check_name(kind: str, name: str) -> None:
    """Raise for a name that is no name of a module and a plugin, or stands for something else."""
    if not NAME.fullmatch(name) or len(name) > LONGEST:
        raise PluginError(
            f"name '{name[:60]}': expected up to {LONGEST} of a-z, 0-9 and single underscores, the "
            "first a letter, such as 'zora': it becomes part of a module's name"
        )
    taken = _names_in((TEMPLATES / f"{kind}.py").read_text(encoding="utf-8"))
    if keyword.iskeyword(_class_name(name)) or _class_name(name) in taken:
        raise PluginError(
            f"name '{name}': its class would be called {_class_name(name)}, which is something "
            "else in that file; take another name"
        )
    from tunesmith.plugin.registry import registry

    known = {item.spec.name for item in registry().of_kind(f"{kind}s") if item.builtin}
    if name in known:
        raise PluginError(
            f"name '{name}': a {kind} of that name is built in, and its bare name means that one; "
            f"take another than {listed(known)}"
        )


def _names_in(source: str) -> set[str]:
    """Return the names that a template binds or uses, but for those that stand for the given."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
    return {name for name in found if "NewName" not in name}
