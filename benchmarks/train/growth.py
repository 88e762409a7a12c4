"""What is promised about how speed and memory grow with the length of a sample."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import attrs

from benchmarks.measure import Spread
from benchmarks.train.cases import GROWTH, OURS, TRL_BNB
from benchmarks.train.report import Comparison
from benchmarks.train.turns import CaseResult

__all__ = ["compare_growth"]

_BASE = 512
_LEAST = 0.9


def compare_growth(results: Sequence[CaseResult]) -> list[Comparison]:
    """Return what becomes of both promises; nothing if no case of the growth was run.

    Where a length is missing the note says so, and the promise counts as not run.
    """
    timed: dict[int, Sequence[float]] = {}
    weighed: dict[int, float] = {}
    grown = [result for result in results if result.case.max_length is not None]
    for result in grown:
        length = result.case.max_length or 0
        ours, theirs = (result.samples.get(name, []) for name in result.case.contestants)
        if result.case.unit == "tokens/s" and ours and theirs:
            timed[length] = [a / b for a, b in zip(ours, theirs, strict=True)]
        elif result.case.unit == "MiB" and ours:
            weighed[length] = Spread.of(ours).median
    return [_speed(timed), _memory(weighed)] if grown else []


def _speed(ratios: Mapping[int, Sequence[float]]) -> Comparison:
    """Return whether the lead over theirs holds at each length.

    All lengths are measured in each round, so that what slows down the machine for some minutes
    slows down all; a length's ratio is put over that at 512 round by round.
    """
    row = Comparison("growth, tokens/s", "least ratio", TRL_BNB, limit=_LEAST)
    if _missing(ratios):
        return attrs.evolve(row, note=_missing(ratios))
    medians = {length: Spread.of(found).median for length, found in ratios.items()}
    over_base = {
        length: Spread.of(a / b for a, b in zip(found, ratios[_BASE], strict=True))
        for length, found in ratios.items()
    }
    worst = min(over_base, key=lambda length: over_base[length].median)
    spread = over_base[worst]
    return attrs.evolve(
        row,
        ours=medians[worst],
        theirs=medians[_BASE],
        measured=spread.median,
        spread=spread,
        passed=spread.median >= _LEAST,
        note=", ".join(f"{length} tokens: {ratio:.2f}x" for length, ratio in medians.items()),
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


def _missing(found: Mapping[int, float]) -> str:
    left = [str(length) for length in GROWTH if length not in found]
    return f"not run: nothing to compare at {', '.join(left)} tokens" if left else ""
