"""What tests of interrupted runs share: what a run has made, and copies of it as it went."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tunesmith.engine import training
from tunesmith.engine.checkpoints import Checkpoints
from tunesmith.engine.resuming import Pace
from tunesmith.engine.runner import run
from tunesmith.plugin.registry import registry

CLOCKED = {
    "seconds",
    "finished",
    "tokens_per_second",
    "memory_bytes",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
    "train_runtime",
    "train_tokens_per_second",
    "sha256",
}
"""What no two runs have in common."""


def made(directory: Path) -> dict[str, Any]:
    """Return the bytes of every file that a run has made; of its records, all but the clocks."""
    found: dict[str, Any] = {}
    for file in sorted((directory / "stages").rglob("*")):
        name = file.relative_to(directory).as_posix()
        if not file.is_file() or file.name == "checked.json":
            continue
        if file.name == "stage.json":
            found[name] = _without_clocks(json.loads(file.read_text()))
        elif file.name == "trainer_state.json":
            state = json.loads(file.read_text())
            state["log_history"] = [_without_clocks(row) for row in state["log_history"]]
            found[name] = state
        elif file.name == "checkpoint.json":  # it has the hash of the file with the clocks
            found[name] = sorted(json.loads(file.read_text())["files"])
        elif file.name == "log.jsonl":
            found[name] = [
                _without_clocks(json.loads(row)) for row in file.read_text().split("\n") if row
            ]
        else:
            found[name] = file.read_bytes()
    return found


def _without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clocks(item) for key, item in value.items() if key not in CLOCKED}
    return value


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of files that are not in both, or not the same."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a checkpoint be taken after each step."""
    monkeypatch.setattr(training, "Pace", lambda: Pace(seconds=0.0, dearest=1e9))


def copies_at_checkpoints(
    monkeypatch: pytest.MonkeyPatch, recipe: Any, directory: Path
) -> dict[str, Path]:
    """Run a recipe; return a copy of the run directory as it was after each checkpoint."""
    copies: dict[str, Path] = {}
    write = Checkpoints.write

    def copying(self: Checkpoints, step: int, *args: Any, **kwargs: Any) -> Any:
        done = write(self, step, *args, **kwargs)
        stage = self.directory.parent.name.strip(".").removesuffix(".partial")
        copy = directory.parent / f"{directory.name}-after-{stage}-{step}" / "moved"
        shutil.copytree(directory, copy)
        copies[f"{stage}-{step}"] = copy
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "write", copying)
        run(recipe, directory, registry())
    return copies
