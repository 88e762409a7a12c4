"""What a run has found, and its JSON.

    {"schema": 1, "date": ISO 8601, "machine": {...}, "versions": {...}, "settings": {...},
     "rates": {"copy", "read", "matmul": {dtype}},
     "cases": [{"key", "suite", "op", "shape", "dtype", "tokens", "adapter", "rounds", "copies",
                "limit": {"seconds", "by"},
                "timings": [{"name", "seconds": spread, "ratios": {ours: spread}, "repeats",
                             "note"}],
                "not_run": {name: why}}],
     "bars": [{"name", "at_least", "measured", "passed", "note"}]}

Seconds are per call; a spread is {"median", "q1", "q3"}; a ratio says how many times as long this
contestant takes as one of ours. `passed` is null where a bar was not run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs

from benchmarks.bars import Verdict
from benchmarks.cases import Case
from benchmarks.limits import Rates
from benchmarks.measure import Spread, ratio

__all__ = ["SCHEMA", "CaseResult", "Report", "Run", "Timing"]

SCHEMA = 1


@attrs.frozen
class Timing:
    """One contestant in one case."""

    name: str
    samples: list[float]
    """Seconds per call, round by round."""
    repeats: int
    note: str = ""

    @property
    def seconds(self) -> Spread:
        """The samples in three numbers."""
        return Spread.of(self.samples)


@attrs.frozen
class CaseResult:
    """Everyone in one case."""

    case: Case
    timings: tuple[Timing, ...]
    not_run: dict[str, str]
    """Who did not run, and why."""
    limit: tuple[float, str]
    """Seconds at the machine's rates, and the rate that decides."""
    copies: int = 1
    """How many weights were taken in turn."""

    @property
    def ours(self) -> tuple[str, ...]:
        """Those of ours that ran."""
        return tuple(each.name for each in self.timings if each.name.startswith("ours"))

    def find(self, name: str) -> Timing | None:
        """Return a contestant's timing, if it ran."""
        return next((each for each in self.timings if each.name == name), None)

    def ratio(self, theirs: str, ours: str) -> Spread | None:
        """Return how many times as long `theirs` takes as `ours`, if both ran."""
        a, b = self.find(theirs), self.find(ours)
        return None if a is None or b is None else ratio(a.samples, b.samples)


@attrs.frozen
class Run:
    """When, where and with what something was measured; the start of every report."""

    date: str
    machine: dict[str, object]
    versions: dict[str, str]
    settings: dict[str, object]

    def to_json(self) -> dict[str, Any]:
        """Return the run as plain data."""
        return {
            "date": self.date,
            "machine": self.machine,
            "versions": self.versions,
            "settings": self.settings,
        }

    def write(self, path: Path) -> None:
        """Write the JSON, making the directory."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")


@attrs.frozen
class Report(Run):
    """A whole run."""

    rates: Rates
    cases: list[CaseResult]
    verdicts: list[Verdict] = attrs.field(factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the run as plain data."""
        return {
            "schema": SCHEMA,
            **super().to_json(),
            "rates": attrs.asdict(self.rates),
            "cases": [_case(each) for each in self.cases],
            "bars": [attrs.asdict(each) for each in self.verdicts],
        }


def _case(result: CaseResult) -> dict[str, Any]:
    seconds, by = result.limit
    rounds = max((len(each.samples) for each in result.timings), default=0)
    return {
        "key": result.case.key,
        **attrs.asdict(result.case),
        "rounds": rounds,
        "copies": result.copies,
        "limit": {"seconds": seconds, "by": by},
        "timings": [_timing(each, result) for each in result.timings],
        "not_run": result.not_run,
    }


def _timing(timing: Timing, result: CaseResult) -> dict[str, Any]:
    ratios = {ours: result.ratio(timing.name, ours) for ours in result.ours}
    return {
        "name": timing.name,
        "seconds": attrs.asdict(timing.seconds),
        "ratios": {name: attrs.asdict(spread) for name, spread in ratios.items() if spread},
        "repeats": timing.repeats,
        "note": timing.note,
    }
