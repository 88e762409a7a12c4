"""What a run prints: the machine, a table per suite, the bars."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.bars import NOT_ASKED, Verdict
from benchmarks.cases import SUITES
from benchmarks.limits import Rates
from benchmarks.results import CaseResult

__all__ = ["bar_lines", "case_lines", "header_lines", "suite_lines"]

_WIDTH = 44


def header_lines(
    date: str, machine: dict[str, object], versions: dict[str, str], rates: Rates
) -> list[str]:
    """Say where the numbers come from."""
    flags = machine["flags"]
    assert isinstance(flags, Iterable)
    others = ", ".join(f"{name} {found}" for name, found in versions.items() if name != "native")
    matmul = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in rates.matmul.items())
    lines = [
        f"{date}  {machine['cpu']}: {' '.join(map(str, flags))}",
        f"{machine['cores']} cores, {machine['threads']} threads, {machine['memory_gib']} GiB, "
        f"last-level cache {machine['last_level_cache_mib']} MiB, load {machine['load_average']}",
    ]
    if "gpu" in machine:
        lines.append(
            f"{machine['gpu']}, {machine['gpu_memory_gib']} GiB, "
            f"compute {machine['compute_capability']}, CUDA {machine['cuda']}"
        )
    return [
        *lines,
        others,
        versions["native"],
        f"measured here: copy {rates.copy / 1e9:.1f} GB/s (read + written), "
        f"read {rates.read / 1e9:.1f} GB/s; matmul in GFLOP/s: {matmul}",
    ]


def suite_lines(suite: str) -> list[str]:
    """Head a suite's table."""
    columns = f"{'':<{_WIDTH}} {'ms':>9}  {'quartiles':>17}  {'vs ours':>8}"
    return ["", f"{suite}: {SUITES[suite]}", columns, "-" * len(columns)]


def case_lines(result: CaseResult) -> list[str]:
    """Return a case's rows: milliseconds per call, and how many times our time that is."""
    rounds = max((len(each.samples) for each in result.timings), default=0)
    copies = f", {result.copies} weights in turn" if result.copies > 1 else ""
    lines = [f"{result.case.key}  ({rounds} rounds{copies})"]
    base = result.ours[0] if result.ours else None
    for timing in result.timings:
        seconds = timing.seconds
        spread = result.ratio(timing.name, base) if base else None
        times = f"{spread.median:7.2f}x" if spread else ""
        quartiles = f"{_ms(seconds.q1).strip()} - {_ms(seconds.q3).strip()}"
        remarks = [*(["called once"] if len(timing.samples) < rounds else []), timing.note]
        note = "".join(f"  ({remark})" for remark in remarks if remark)
        row = f"  {timing.name:<{_WIDTH - 2}} {_ms(seconds.median)}  {quartiles:>17}"
        lines.append(f"{row}  {times:>8}{note}")
    seconds_at_best, by = result.limit
    ours = result.find(base) if base else None
    share = f"{seconds_at_best / ours.seconds.median:7.2f}x" if ours else ""
    name = f"limit: {by}"
    lines.append(f"  {name:<{_WIDTH - 2}} {_ms(seconds_at_best)}  {'':>17}  {share:>8}")
    lines += [f"  {name}: {why}" for name, why in result.not_run.items()]
    return lines


def bar_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the bars and what became of them."""
    asked = [each for each in verdicts if each.note != NOT_ASKED]
    width = max((len(each.name) for each in asked), default=20)
    lines = ["", f"{'bars: ours against':<{width}}  {'at least':>8}  {'measured':>8}"]
    for each in asked:
        measured = "" if each.measured is None else f"{each.measured:.2f}x"
        outcome = {True: "pass", False: "FAIL", None: ""}[each.passed]
        detail = f"{outcome}  ({each.note})" if outcome else each.note
        lines.append(f"{each.name:<{width}}  {each.at_least:>7.2f}x  {measured:>8}  {detail}")
    if len(asked) < len(verdicts):
        lines.append(f"{len(verdicts) - len(asked)} {'more' if asked else 'bars'} {NOT_ASKED}")
    return lines


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    digits = 3 if milliseconds < 10 else 1 if milliseconds < 1000 else 0
    return f"{milliseconds:9.{digits}f}"
