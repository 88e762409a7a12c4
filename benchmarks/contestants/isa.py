"""Our kernels under an instruction set that was asked for, each in a process of its own.

Which one runs is decided when the kernels are loaded, so TUNESMITH_ISA is set for a child
process, which builds the case and waits to be told how often to run it.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time

import attrs
import torch

from benchmarks.cases import Case
from benchmarks.contestants.entry import Contestant, Entry, Unavailable
from benchmarks.inputs import Inputs
from tunesmith.ops import native_status

__all__ = ["BEST", "CONTESTANTS", "Worker"]

BEST = "ours, best instruction set"
_PAUSE = 0.02  # until the other process's threads have stopped spinning


class Worker:
    """A child process that runs a case of ours under one instruction set."""

    def __init__(self, case: Case, isa: str) -> None:
        environment = {**os.environ, "TUNESMITH_ISA": isa}
        arguments = [json.dumps(attrs.asdict(case)), str(torch.get_num_threads())]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contestants.isa_worker", *arguments],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.isa = self._ask("isa")

    def time(self, repeats: int) -> float:
        """Return the seconds that so many calls took there."""
        time.sleep(_PAUSE)
        return float(self._ask(str(repeats)))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _ask(self, question: str) -> str:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(question + "\n")
        stdin.flush()
        answer = stdout.readline().strip()
        if not answer:
            self.close()
            raise Unavailable("the child process ended; its error is above")
        if answer.startswith("unavailable: "):
            self.close()
            raise Unavailable(answer.removeprefix("unavailable: "))
        return answer


def _under(isa: str, case: Case, inputs: Inputs) -> Entry:
    status = native_status()
    if not status.loaded:
        raise Unavailable(f"the kernels are not in use: {status.reason}")
    if inputs.weight.device.type != "cpu":
        raise Unavailable("instruction sets are the CPU's")
    if not status.isa.startswith(("avx512", "amx")):
        raise Unavailable(f"the best instruction set of this CPU and build is {status.isa}")
    worker = Worker(case, isa or status.isa)
    if isa and worker.isa != isa:
        worker.close()
        raise Unavailable(f"this CPU or build has no {isa}")
    return Entry(lambda: None, note=lambda: worker.isa, timer=worker.time, close=worker.close)


CONTESTANTS = (
    Contestant(BEST, ("isa",), functools.partial(_under, "")),
    Contestant("ours, avx512", ("isa",), functools.partial(_under, "avx512")),
    Contestant("ours, avx2", ("isa",), functools.partial(_under, "avx2")),
)
