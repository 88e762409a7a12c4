"""The command line of `make bench`."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import attrs
import torch

from benchmarks import contestants, report
from benchmarks.bars import bars_of, judge
from benchmarks.cases import DTYPES, SUITES, Case, cases_of
from benchmarks.limits import measure_rates
from benchmarks.machine import describe, slug, versions
from benchmarks.measure import Budget, CudaClock, WallClock
from benchmarks.results import Report
from benchmarks.run import run_case

__all__ = ["main"]

RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites that are asked for; return 1 if --check was given and a bar has failed."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    budget = _budget(options)
    clock = CudaClock(options.device) if options.device.startswith("cuda") else WallClock()
    now = datetime.datetime.now(datetime.UTC)
    machine = describe(options.device)
    found = Report(
        date=now.isoformat(timespec="seconds"),
        machine=machine,
        versions=versions(),
        settings={**attrs.asdict(budget), "arguments": list(arguments or sys.argv[1:])},
        rates=measure_rates(tuple(options.dtype), options.device, clock),
        cases=[],
    )
    path = options.json or RESULTS / f"{slug(machine)}-{now:%Y-%m-%d}.json"
    _print(report.header_lines(found.date, machine, found.versions, found.rates))
    for suite in options.suite:
        cases = _wanted(suite, options)
        if cases:
            _print(report.suite_lines(suite))
        for case in cases:
            result = run_case(
                case,
                contestants.of(suite),
                device=options.device,
                clock=clock,
                budget=budget,
                rates=found.rates,
            )
            found.cases.append(result)
            _print(report.case_lines(result))
        # a long run that is interrupted has kept what it knew
        found = attrs.evolve(found, verdicts=judge(bars_of(options.device), found.cases))
        found.write(path)
    _print([*report.bar_lines(found.verdicts), "", f"written to {path}"])
    failed = any(each.passed is False for each in found.verdicts)
    return 1 if options.check and failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--suite", type=_names(SUITES), default=list(SUITES), help=f"of {', '.join(SUITES)}")
    add("--dtype", type=_names(DTYPES), default=["bf16", "fp32"], help=f"of {', '.join(DTYPES)}")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--threads", type=int, default=0, help="of torch and of our kernels; torch's own choice")
    add("--quick", action="store_true", help="a few cases, three rounds: shows that it runs")
    add("--bars", action="store_true", help="only the cases that a bar is about")
    add("--case", default="", metavar="TEXT", help="only cases whose name has this in it")
    add("--rounds", type=int, default=0, help="at least; 11, or 3 with --quick")
    add("--seconds", type=float, default=-1.0, help="per case, at least; 2, or 0 with --quick")
    add("--json", type=Path, metavar="PATH", help="instead of benchmarks/results/")
    add("--check", action="store_true", help="exit with 1 if a bar fails")
    return parser


def _names(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        for name in found:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"got {name!r}; allowed: {', '.join(allowed)}")
        return found

    return names


def _budget(options: argparse.Namespace) -> Budget:
    budget = Budget(rounds=3, seconds=0.0) if options.quick else Budget()
    if options.rounds:
        budget = attrs.evolve(budget, rounds=options.rounds)
    if options.seconds >= 0:
        budget = attrs.evolve(budget, seconds=options.seconds)
    return budget


def _wanted(suite: str, options: argparse.Namespace) -> list[Case]:
    cases = cases_of(suite, options.dtype, options.quick, options.device)
    barred = {bar.case for bar in bars_of(options.device)}
    return [
        case for case in cases if options.case in case.key and (not options.bars or case in barred)
    ]


def _print(lines: Sequence[str]) -> None:
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
