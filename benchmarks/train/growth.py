"""What is promised about how speed and memory grow with the length of a sample."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import attrs

from benchmarks.measure import Spread, ratio
from benchmarks.train.cases import GROWTH, GROWTH_BASE, OURS, TRL_BNB
from benchmarks.train.report import Comparison
from benchmarks.train.turns import CaseResult

__all__ = ["compare_growth"]

_LEAST = 0.9


def compare_growth(results: Sequence[CaseResult]) -> list[Comparison]:
    """Return what becomes of both promises; nothing if no case of the growth was run.

    Where a length is missing the note says so, and the promise counts as not run.
    """
    grown = [result for result in results if result.case.max_length is not None]
    timed: dict[str, dict[int, Sequence[float]]] = {}
    weighed: dict[int, float] = {}
    for result in grown:
        length = result.case.max_length or 0
        ours, theirs = (result.samples.get(name, []) for name in result.case.contestants)
        if result.case.company and ours and theirs:
            ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
            timed.setdefault(result.case.company, {})[length] = ratios
        elif result.case.unit == "MiB" and ours:
            weighed[length] = Spread.of(ours).median
    return [_speed(timed.values()), _memory(weighed)] if grown else []


@attrs.frozen
class _Held:
    """How much of the lead over theirs at the base a length keeps."""

    lead: float
    base: float
    kept: Spread
    """Round by round: both are measured in each."""

    @classmethod
    def of(cls, lead: Sequence[float], base: Sequence[float]) -> _Held:
        return cls(Spread.of(lead).median, Spread.of(base).median, ratio(lead, base))


def _speed(companies: Iterable[Mapping[int, Sequence[float]]]) -> Comparison:
    """Return whether the lead over theirs at 512 tokens a sample holds at each length."""
    row = Comparison("growth, tokens/s", "least ratio", TRL_BNB, limit=_LEAST)
    held = {
        length: _Held.of(ratios, company[GROWTH_BASE])
        for company in companies
        for length, ratios in company.items()
        if length != GROWTH_BASE and GROWTH_BASE in company
    }
    missing = _missing({GROWTH_BASE: None, **held})
    if missing:
        return attrs.evolve(row, note=missing)
    worst = min(held.values(), key=lambda each: each.kept.median)
    return attrs.evolve(
        row,
        ours=worst.lead,
        theirs=worst.base,
        measured=worst.kept.median,
        spread=worst.kept,
        passed=worst.kept.median >= _LEAST,
        note=", ".join(
            f"{length} tokens: {each.lead:.2f}x, {GROWTH_BASE} beside it: {each.base:.2f}x"
            for length, each in held.items()
        ),
    )


def _memory(peaks: Mapping[int, float]) -> Comparison:
    """Return whether memory is at most linear: doubling a sample doubles it at most.

    What malloc keeps moves a peak by a tenth from run to run, and the difference of two peaks by
    several; so peaks are compared, not their differences.
    """
    row = Comparison("growth, memory", "MiB a token", OURS, limit=1.0)
    if _missing(peaks):
        return attrs.evolve(row, note=_missing(peaks))
    each = {length: peak / length for length, peak in peaks.items()}
    worst = max(itertools.pairwise(each.values()), key=lambda pair: pair[1] / pair[0])
    measured = worst[1] / worst[0]
    note = ", ".join(f"{length} tokens: {peak:.0f} MiB" for length, peak in peaks.items())
    return attrs.evolve(
        row,
        ours=worst[1],
        theirs=worst[0],
        measured=measured,
        passed=measured <= 1.0,
        note=note,
    )


def _missing(found: Mapping[int, object]) -> str:
    left = [str(length) for length in GROWTH if length not in found]
    return f"not run: nothing to compare at {', '.join(left)} tokens" if left else ""
