"""The child process of `isa.Worker`: answers each line on stdin with one on stdout.

"isa" is answered with the instruction set in use, a number with the seconds that so many calls
took. Arguments: the case as JSON, and the number of threads.
"""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.cases import Case
from benchmarks.contestants import ours
from benchmarks.contestants.entry import Entry, Unavailable
from benchmarks.inputs import inputs_of
from benchmarks.measure import WallClock
from tunesmith.ops import native_status

__all__ = ["main"]


def main(case_json: str, threads: str) -> None:
    """Serve until stdin ends."""
    torch.set_num_threads(int(threads))
    fields = json.loads(case_json)
    case = Case(**{**fields, "shape": tuple(fields["shape"])})
    try:
        entry = _entry(case)
    except Unavailable as why:
        print(f"unavailable: {why}", flush=True)
        return
    timer = WallClock().timer(entry.call)
    for line in sys.stdin:
        question = line.strip()
        print(native_status().isa if question == "isa" else timer(int(question)), flush=True)


def _entry(case: Case) -> Entry:
    inputs = inputs_of(case, "cpu")
    for contestant in ours.CONTESTANTS:
        if case.op in contestant.suites:
            entry = contestant.prepare(case, inputs)
            assert entry is not None
            return entry
    raise Unavailable(f"we have nothing that does {case.op}")


if __name__ == "__main__":
    main(*sys.argv[1:])
