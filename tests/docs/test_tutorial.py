"""The tutorial's code runs as it stands, but for a smaller model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tunesmith.cli import main

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
NAMED = "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_every_block_of_the_tutorial_runs(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = TUTORIAL.read_text(encoding="utf-8")
    blocks = re.findall(r"```(python|console)\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) >= 10
    assert any(NAMED in code for _, code in blocks)
    shared: dict[str, object] = {}
    for language, code in blocks:
        if language == "python":
            exec(compile(code.replace(NAMED, str(tiny_model)), str(TUTORIAL), "exec"), shared)
            continue
        for line in code.splitlines():
            command, *arguments = shlex.split(line)
            assert command == "tunesmith"
            assert main(arguments) == 0, line


def test_the_readme_names_the_two_commands_on_its_first_screen():
    first_screen = (TUTORIAL.parents[1] / "README.md").read_text(encoding="utf-8").splitlines()[:40]
    assert any(line.startswith("make demo") for line in first_screen)
    assert any(line.startswith("make test") for line in first_screen)
