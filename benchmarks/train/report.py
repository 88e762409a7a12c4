"""What became of the bars, as a table and as JSON.

    {"schema": 1, "date": ISO 8601, "machine": {...}, "versions": {...}, "settings": {...},
     "cases": [{"name", "unit", "samples": {contestant: [...]}, "spreads": {contestant: spread},
                "notes": {contestant: text}, "not_run": {contestant: why}}],
     "comparisons": [{"case", "unit", "theirs_name", "ours_name", "ours", "theirs", "measured",
                      "spread", "limit", "passed", "note"}]}

A spread is {"median", "q1", "q3"}; ours and theirs are medians in the unit of the case; what
`measured` compares, `cases.UNITS` tells. `passed` is null where there is no bar or it was not run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from benchmarks.measure import Spread, ratio
from benchmarks.results import Run
from benchmarks.train.cases import OURS, UNITS, Bar, Case
from benchmarks.train.turns import CaseResult

__all__ = [
    "NOT_ASKED",
    "SCHEMA",
    "Comparison",
    "Report",
    "compare",
    "header_lines",
    "not_asked",
    "table_lines",
]

SCHEMA = 1
NOT_ASKED = "not among the cases of this run"


@attrs.frozen
class Comparison:
    """Ours and one other in one case: a row of the table."""

    case: str
    unit: str
    theirs_name: str
    ours_name: str = OURS
    """Whose side this is, for who is `ours` may be another one of theirs."""
    ours: float | None = None
    """Median in the unit of the case; of losses, that of the last step."""
    theirs: float | None = None
    measured: float | None = None
    """Median of the turns' ratios, or the largest difference; None if it was not run."""
    spread: Spread | None = None
    limit: float | None = None
    passed: bool | None = None
    note: str = ""
    """What the contestants say, or why it was not run."""


def compare(result: CaseResult) -> list[Comparison]:
    """Return what becomes of each bar of a case that was run."""
    return [_compare(bar, result) for bar in result.case.bars]


def not_asked(case: Case, why: str) -> list[Comparison]:
    """Return the rows of a case that was not run."""
    return [
        Comparison(
            case.name, case.unit, bar.theirs, bar.of, limit=bar.limit, note=f"not run: {why}"
        )
        for bar in case.bars
    ]


def _compare(bar: Bar, result: CaseResult) -> Comparison:
    case = result.case
    row = Comparison(case.name, case.unit, bar.theirs, bar.of, limit=bar.limit)
    found = {name: result.samples.get(name) for name in (bar.of, bar.theirs)}
    ours, theirs = found.values()
    row = attrs.evolve(row, ours=_typical(case, ours), theirs=_typical(case, theirs))
    if not ours or not theirs:
        missing = next(name for name, samples in found.items() if not samples)
        why = result.not_run.get(missing, "took no turn")
        return attrs.evolve(row, note=f"not run: {missing} {why}")
    spread = _spread(case.unit, ours, theirs)
    measured = spread.median
    passed = None
    if bar.limit is not None:
        at_most = UNITS[case.unit].endswith("at most")
        passed = measured <= bar.limit if at_most else measured >= bar.limit
    notes = [f"{name}: {result.notes[name]}" for name in found if result.notes.get(name)]
    return attrs.evolve(row, measured=measured, spread=spread, passed=passed, note="; ".join(notes))


def _typical(case: Case, samples: Sequence[float] | None) -> float | None:
    if not samples:
        return None
    return samples[-1] if "loss" in case.unit else Spread.of(samples).median


def _spread(unit: str, ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Return what `UNITS` says is compared, over the turns; nan, which passes no bar, stays nan."""
    if "loss" in unit:
        relative = unit == "relative loss"
        differences = [
            abs(a - b) / (abs(b) if relative else 1.0) for a, b in zip(ours, theirs, strict=True)
        ]
        # max would pass over a nan that is not the first
        worst = float("nan") if any(d != d for d in differences) else max(differences)
        return Spread(worst, worst, worst)
    return ratio(theirs, ours) if unit == "s" else ratio(ours, theirs)


@attrs.frozen
class Report(Run):
    """A whole run."""

    results: list[CaseResult] = attrs.field(factory=list)
    comparisons: list[Comparison] = attrs.field(factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the run as plain data."""
        return {
            "schema": SCHEMA,
            **super().to_json(),
            "cases": [_case(result) for result in self.results],
            "comparisons": [attrs.asdict(each) for each in self.comparisons],
        }


def _case(result: CaseResult) -> dict[str, Any]:
    spreads = {name: Spread.of(found) for name, found in result.samples.items() if found}
    return {
        "name": result.case.name,
        "unit": result.case.unit,
        "samples": result.samples,
        "spreads": {name: attrs.asdict(spread) for name, spread in spreads.items()},
        "notes": result.notes,
        "not_run": result.not_run,
    }


def header_lines(report: Report) -> list[str]:
    """Say where the numbers come from."""
    machine = report.machine
    flags = machine["flags"]
    assert isinstance(flags, Iterable)
    others = (f"{name} {found}" for name, found in report.versions.items() if name != "native")
    return [
        f"{report.date}  {machine['cpu']}: {' '.join(map(str, flags))}",
        f"{machine['cores']} cores, {machine['threads']} threads, {machine['memory_gib']} GiB, "
        f"load {machine['load_average']}",
        ", ".join(others),
        report.versions["native"],
        ", ".join(f"{name}: {value}" for name, value in report.settings.items()),
    ]


def table_lines(comparisons: Sequence[Comparison]) -> list[str]:
    """Return one table of all comparisons: who, medians, what is compared, the bar, the outcome."""
    asked = [each for each in comparisons if NOT_ASKED not in each.note]
    left_out = dict.fromkeys(each.case for each in comparisons if NOT_ASKED in each.note)
    names = [_name(each) for each in asked]
    width = max(map(len, names), default=20)
    lines = [
        "",
        f"{'case (unit): ours against':<{width}}  {'ours':>9}  {'theirs':>9}  {'measured':>9}  "
        f"{'bar':>10}",
    ]
    for name, each in zip(names, asked, strict=True):
        outcome = {True: "pass", False: "FAIL", None: ""}[each.passed]
        columns = [
            _number(each.ours),
            _number(each.theirs),
            _times(each.unit, each.measured),
        ]
        row = "  ".join(f"{column:>9}" for column in columns)
        lines.append(f"{name:<{width}}  {row}  {_bar(each):>10}  {outcome}".rstrip())
        if each.note:
            lines.append(f"  {each.note}")
    if left_out:
        lines.append(f"not run, as {NOT_ASKED}: {'; '.join(left_out)}")
    lines += ["", *(f"{unit}: {meaning}" for unit, meaning in UNITS.items())]
    return lines


def _name(comparison: Comparison) -> str:
    ours = "" if comparison.ours_name == OURS else f", of {comparison.ours_name}"
    return f"{comparison.case} ({comparison.unit}){ours}: {comparison.theirs_name}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _times(unit: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2g}" if "loss" in unit else f"{value:.2f}x"


def _bar(comparison: Comparison) -> str:
    if comparison.limit is None:
        return "none"
    sense = "<=" if UNITS[comparison.unit].endswith("at most") else ">="
    limit = f"{comparison.limit:.0e}" if "loss" in comparison.unit else f"{comparison.limit:.2f}x"
    return f"{sense} {limit}"
