"""A run directory as its files tell it; what is missing or broken is noted and left out."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs

from tunesmith.engine.store import SAMPLES
from tunesmith.recipe import VERBS, Recipe

__all__ = ["ReadRun", "ReadStage", "finite_or_nan", "is_number", "mapping", "read_run", "shortened"]

DROPPED_SHOWN = 20
BROKEN_NAMED = 5
TEXT_SHOWN = 400
"""Characters of a row's text that are shown."""


@attrs.define
class ReadStage:
    """One stage as its directory tells it."""

    name: str
    record: Mapping[str, Any] | None = None
    """stage.json; None while the stage is not finished."""
    log: list[Mapping[str, Any]] = attrs.field(factory=list)
    reasons: Counter[str] = attrs.field(factory=Counter)
    dropped: list[tuple[str, str]] = attrs.field(factory=list)
    """Place and reason of the first dropped rows."""
    samples: list[Mapping[str, Any]] = attrs.field(factory=list)
    """Answers that a metric has kept: prompt, completion, reference and scores."""
    notes: list[str] = attrs.field(factory=list)
    """What is missing or broken."""

    @property
    def seconds(self) -> float:
        """How long it took; NaN where that is not told."""
        value = (self.record or {}).get("seconds")
        return finite_or_nan(value) if is_number(value) else math.nan

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What it has measured."""
        return mapping((self.record or {}).get("metrics"))

    @property
    def state(self) -> str:
        """Whether and when it was finished."""
        if self.record is None:
            return "not finished"
        finished = self.record.get("finished")
        return f"finished {_minute(finished)}" if finished else "finished"


@attrs.define
class ReadRun:
    """A run directory, read."""

    name: str
    recipe_text: str | None
    recipe: Recipe | None
    lock: Mapping[str, Any] | None
    stages: list[ReadStage]
    ahead: list[str]
    """Names of the recipe's steps that have no directory yet."""
    notes: list[str]


def read_run(directory: Path) -> ReadRun:
    """Return what a run directory holds; broken or missing files are noted."""
    notes: list[str] = []
    recipe_text = _read_text(directory / "recipe.yaml", "recipe.yaml", notes)
    recipe = None
    if recipe_text is not None:
        try:
            # the newline makes it text, never the name of a file
            recipe = Recipe.from_yaml(recipe_text + "\n", variables={})
        except (ValueError, TypeError, RecursionError) as error:
            notes.append(f"recipe.yaml cannot be read as a recipe: {error}")
    lock = _read_mapping(directory / "lock.json", "lock.json", notes)
    kept = directory / "stages"
    folders = [path for path in kept.iterdir() if path.is_dir()] if kept.is_dir() else []
    stages = [_read_stage(path) for path in sorted(folders, key=lambda path: _order(path.name))]
    if not stages:
        notes.append("no stage has left anything yet")
    seen = {_order(stage.name)[0] for stage in stages}
    steps = recipe.steps if recipe else ()
    ahead = [
        f"{at:02d}-{step.label}"
        for at, step in enumerate(steps, 1)
        # the others only say how a model is loaded
        if at not in seen and VERBS[step.verb].leaves_stage
    ]
    return ReadRun(directory.resolve().name, recipe_text, recipe, lock, stages, ahead, notes)


def _read_stage(directory: Path) -> ReadStage:
    stage = ReadStage(directory.name)
    where = f"stages/{directory.name}"
    record = _read_mapping(directory / "stage.json", f"{where}/stage.json", stage.notes)
    stage.record = record
    stage.log = list(_read_lines(directory / "log.jsonl", f"{where}/log.jsonl", stage.notes))
    dropped = _read_lines(directory / "dropped.jsonl", f"{where}/dropped.jsonl", stage.notes)
    for row in dropped:
        reason = shortened(row.get("reason", "no reason given"))
        stage.reasons[reason] += 1
        if len(stage.dropped) < DROPPED_SHOWN:
            stage.dropped.append((shortened(row.get("where", "")), reason))
    samples = _read_lines(directory / SAMPLES, f"{where}/{SAMPLES}", stage.notes)
    stage.samples = list(samples)
    return stage


def _order(name: str) -> tuple[float, str]:
    digits = re.match(r"\d+", name)
    return (int(digits[0]) if digits else math.inf, name)


def _read_text(path: Path, name: str, notes: list[str]) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        notes.append(f"{name} is not there")
    except OSError as error:
        notes.append(f"{name} cannot be read: {error.strerror}")
    return None


def _read_mapping(path: Path, name: str, notes: list[str]) -> Mapping[str, Any] | None:
    text = _read_text(path, name, notes)
    if text is None:
        return None
    row = _parsed(text)
    if row is None:
        notes.append(f"{name} is not a JSON object and is left out")
    return row


def _read_lines(path: Path, name: str, notes: list[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the JSON objects of a file that may not exist; broken lines are noted by number."""
    broken = []
    try:
        with path.open("rb") as lines:
            for at, line in enumerate(lines, 1):
                row = _parsed(line)
                if row is not None:
                    yield row
                elif line.strip():
                    broken.append(at)
    except FileNotFoundError:
        return
    except OSError as error:
        notes.append(f"{name} cannot be read: {error.strerror}")
    if broken:
        count = len(broken)
        named = ", ".join(map(str, broken[:BROKEN_NAMED]))
        more = f" and {count - BROKEN_NAMED} more" if count > BROKEN_NAMED else ""
        what = "line is not a JSON object" if count == 1 else "lines are not JSON objects"
        are = "is" if count == 1 else "are"
        notes.append(f"{name}: {count} {what} and {are} left out: line {named}{more}")


def _parsed(text: str | bytes) -> Mapping[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError too
        return None
    return row if isinstance(row, dict) else None


def mapping(value: object) -> Mapping[str, Any]:
    """Return a value that is a mapping; anything else is an empty one."""
    return value if isinstance(value, dict) else {}


def _minute(moment: object) -> str:
    """Return an ISO time to the minute, with its offset; anything else as it stands."""
    try:
        parsed = datetime.fromisoformat(str(moment))
    except ValueError:
        return str(moment)
    zone = parsed.strftime("%z")
    return parsed.strftime("%Y-%m-%d %H:%M ") + (zone if zone.strip("+-0") else "UTC" * bool(zone))


def is_number(value: object) -> bool:
    """Whether a value is a number and no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def finite_or_nan(value: Any) -> float:
    """Return a number as a float; NaN if it is infinite, or too large to be drawn or meant."""
    return float(value) if abs(value) < 1e100 else math.nan


def shortened(value: object) -> str:
    """Return a value as text that is not too long to be shown."""
    text = str(value)
    return text if len(text) <= TEXT_SHOWN else text[: TEXT_SHOWN - 1] + "…"
