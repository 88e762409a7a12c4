"""How far a run has come, and what a directory is that holds none: what is said when one is opened.

Nothing is written and nothing is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import attrs

from tunesmith.engine.locking import holder_of
from tunesmith.engine.store import CHECKPOINTS, MARKER, partial_of
from tunesmith.errors import RecipeError, RunError, close_matches
from tunesmith.recipe import VERBS, Recipe, stage_name

__all__ = ["Standing", "check_is_run", "standing_of"]

_SHOWN = 5


@attrs.frozen
class Standing:
    """How far a run has come."""

    ahead: tuple[str, ...] = ()
    """Names of the stages that are still to be made, such as "04-merge"."""
    at_work: str | None = None
    """Which process is at work in the directory."""
    checkpoint: str | None = None
    """The newest checkpoint of the first of them, such as "checkpoint-40"."""

    def __str__(self) -> str:
        if not self.ahead:
            return "finished"
        first, *others = self.ahead
        begun = f"{first} (there is {self.checkpoint} of it)" if self.checkpoint else first
        what = f"still to be made: {', '.join((begun, *others))}"
        if self.at_work:
            return f"not finished, {self.at_work} is at work on it; {what}"
        return f"not finished; {what}; run the same again in this directory to go on"


def standing_of(directory: Path, finished: Iterable[str]) -> Standing:
    """Return how far a run has come; `finished` names its stages.

    What the recipe would say is left out where it cannot be read.
    """
    try:
        # a run may be somebody else's, whose recipe gets no variable of this machine
        recipe = Recipe.from_yaml(directory / MARKER, variables={})
    except RecipeError:
        return Standing()
    done = set(finished)
    names = [
        stage_name(number, step)
        for number, step in enumerate(recipe.steps, 1)
        if VERBS[step.verb].leaves_stage
    ]
    ahead = tuple(name for name in names if name not in done)
    if not ahead:
        return Standing()
    return Standing(ahead, holder_of(directory), _newest_checkpoint(directory, ahead[0]))


def _newest_checkpoint(directory: Path, stage: str) -> str | None:
    place = partial_of(directory, stage) / CHECKPOINTS
    if not place.is_dir():
        return None
    found = [re.fullmatch(r"checkpoint-(\d+)", entry.name) for entry in place.iterdir()]
    steps = [int(each[1]) for each in found if each]
    return f"checkpoint-{max(steps)}" if steps else None


def check_is_run(directory: Path) -> None:
    """Raise `RunError` that says what is there, unless a run has begun in a directory."""
    expected = "give the directory that `.run(...)` or `tunesmith run --out` wrote"
    if not os.path.lexists(directory):
        near = ""
        if directory.parent.is_dir():
            near = close_matches(directory.name, [e.name for e in directory.parent.iterdir()])
        raise RunError(f"{directory}: there is no such directory{near}; {expected}")
    if not directory.is_dir():
        raise RunError(f"{directory}: is a file, and no run directory; {expected}")
    if (directory / MARKER).exists() or (directory / "stages").exists():
        return
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise RunError(
            f"{directory}: cannot be read: {error.strerror}; mend its permissions"
        ) from error
    raise RunError(f"{directory}: holds no run: {_told(directory, names)}; {expected}")


def _told(directory: Path, names: list[str]) -> str:
    if not names:
        return "it is empty"
    if "stage.json" in names:
        return f"it is a stage of the run in {directory.parent.parent}"
    if "adapter_config.json" in names:
        return "it is an adapter in PEFT's format"
    if "config.json" in names:
        return "it is a model, which `Tuner(...)` takes"
    runs = [name for name in names if (directory / name / MARKER).is_file()]
    if runs:
        return f"it is a directory of runs, {_some(runs)}"
    return f"there is {_some(names)} in it, and no {MARKER}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
