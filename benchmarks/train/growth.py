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
_NOT_RUN = "not run: nothing to compare at {} tokens"


def compare_growth(results: Sequence[CaseResult]) -> list[Comparison]:
    """Return what becomes of the promises; nothing if no case of the growth was run.

    What is missing for one is said in its note, and it counts as not run.
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
    if not grown:
        return []
    lengths = [length for length in GROWTH if length != GROWTH_BASE]
    return [*(_speed(length, timed.values()) for length in lengths), _memory(weighed)]


def _speed(length: int, companies: Iterable[Mapping[int, Sequence[float]]]) -> Comparison:
    """Return how much of the lead over theirs at 512 tokens a length keeps.

    It is told round by round, for both lengths are measured in each.
    """
    row = Comparison(f"growth, {length} tokens, kept", "kept", TRL_BNB, limit=_LEAST)
    for company in companies:
        if {length, GROWTH_BASE} <= company.keys():
            lead, base = company[length], company[GROWTH_BASE]
            kept = ratio(lead, base)
            return attrs.evolve(
                row,
                ours=Spread.of(lead).median,
                theirs=Spread.of(base).median,
                measured=kept.median,
                spread=kept,
                passed=kept.median >= _LEAST,
            )
    return attrs.evolve(row, note=_NOT_RUN.format(length))


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
    return _NOT_RUN.format(", ".join(left)) if left else ""
