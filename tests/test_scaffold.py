"""`tunesmith plugins new` writes packages that pass the kit as they are."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from tunesmith.cli import main
from tunesmith.errors import PluginError
from tunesmith.plugin.registry import Registry
from tunesmith.scaffold import KINDS_OF_ONE, files_of, source_of, write_package

FAST = ("format", "transform", "reward")
"""Kinds whose kit loads no model."""
ALL = [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in KINDS_OF_ONE]


def own_tests(package: Path) -> subprocess.CompletedProcess[str]:
    """Run the tests of a package as its author would: in its directory, not installed."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=package,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("kind", ALL)
def test_a_new_package_passes_its_own_test(kind, tmp_path):
    package = write_package(kind, "own_thing", tmp_path)
    done = own_tests(package)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize("kind", KINDS_OF_ONE)
def test_a_new_package_is_found_by_its_entry_point(kind, tmp_path, monkeypatch):
    package = write_package(kind, "found", tmp_path)
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (group, entries), *others = project["entry-points"].items()
    assert (group, others, project["name"]) == ("tunesmith", [], "tunesmith-found")
    monkeypatch.syspath_prepend(package)
    ((name, value),) = entries.items()
    entry = EntryPoint(name, value, group)
    registry = Registry([(name, project["name"], project["version"], entry.load)])
    try:
        assert registry.broken == []
        (item,) = registry
        assert (item.kind, item.key) == (f"{kind}s", "tunesmith-found:found")
        assert item.load().__name__ == "Found"
    finally:
        sys.modules.pop("tunesmith_found", None)


@pytest.mark.parametrize("kind", KINDS_OF_ONE)
def test_nothing_of_the_template_is_left_in_it(kind):
    files = files_of(kind, "zora_two")
    assert set(files) == {
        "pyproject.toml",
        "README.md",
        "tunesmith_zora_two.py",
        "tests/test_zora_two.py",
    }
    for place, text in files.items():
        assert "newname" not in text.lower(), place
        if place.endswith(".py"):
            compile(text, place, "exec")
    assert "class ZoraTwo(" in files["tunesmith_zora_two.py"]
    assert "tunesmith-zora-two" in files["pyproject.toml"]


def test_the_command_line_writes_one_and_says_how_to_go_on(tmp_path, capsys):
    assert main(["plugins", "new", "method", "zora", "--into", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"wrote    {tmp_path / 'tunesmith-zora'}" in said
    assert "python -m pytest" in said
    assert (tmp_path / "tunesmith-zora" / "tests" / "test_zora.py").is_file()


def test_a_directory_that_is_there_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "tunesmith-zora").mkdir()
    (tmp_path / "tunesmith-zora" / "mine.txt").write_text("mine")
    assert main(["plugins", "new", "method", "zora", "--into", str(tmp_path)]) == 1
    assert "is there already, and nothing in it was changed" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "tunesmith-zora").iterdir()] == ["mine.txt"]


def test_a_place_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PluginError, match="cannot be written: No such file or directory"):
        write_package("method", "zora", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("methods", "zora", "unknown kind 'methods'; did you mean 'method'"),
        ("method", "Zora", "expected up to 40 of a-z"),
        ("method", "1st", "expected up to 40 of a-z"),
        ("method", "zo-ra", "expected up to 40 of a-z"),
        ("method", "../zora", "expected up to 40 of a-z"),
        ("method", "zora_", "expected up to 40 of a-z"),
        ("method", "z" * 41, "expected up to 40 of a-z"),
        ("method", "", "expected up to 40 of a-z"),
        ("method", "lora", "a method of that name is built in"),
        ("metric", "metric", "its class would be called Metric, which is something else"),
        ("exporter", "none", "its class would be called None"),
    ],
)
def test_a_name_that_would_not_work_is_refused(kind, name, said):
    with pytest.raises(PluginError) as found:
        source_of(kind, name)
    assert said in str(found.value)


def test_a_module_that_is_installed_is_not_hidden(tmp_path):
    with pytest.raises(PluginError, match="a module tunesmith_plugins is installed already"):
        write_package("method", "plugins", tmp_path)


def test_the_command_line_writes_without_torch(tmp_path):
    script = (
        "import sys; from tunesmith.cli import main; "
        f"main(['plugins', 'new', 'method', 'zora', '--into', {str(tmp_path)!r}]); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
