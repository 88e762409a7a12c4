"""Lets the contestants take turns, each in a process of its own: one works, the others sleep."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs

from benchmarks.measure import order
from benchmarks.train.cases import Case, Job

__all__ = ["CaseResult", "Contestant", "ContestantError", "Worker", "run_cases"]

_PAUSE = 0.3
"""Seconds before a turn: an OpenMP runtime may let its threads spin for 0.2 after its work."""
_PATIENCE = 3600.0
"""Seconds that an answer may take."""


class ContestantError(Exception):
    """A contestant cannot go on; the message says why."""


class Contestant(Protocol):
    """What takes turns."""

    def ready(self) -> None:
        """Wait until it is ready for its first turn; ContestantError if it will never be."""

    def turn(self) -> tuple[list[float], str]:
        """Let it take a turn; return what it measured, and a note."""

    def close(self) -> None:
        """End it."""


@attrs.frozen
class CaseResult:
    """Everyone in one case."""

    case: Case
    samples: dict[str, list[float]]
    """In the unit of the case, turn by turn; of losses, step by step."""
    notes: dict[str, str]
    not_run: dict[str, str]
    """Who did not run, and why."""


class Worker:
    """A child process that does one job; see `worker` for what is said between the two."""

    def __init__(self, job: Job) -> None:
        self._log = Path(job.work) / "stderr.txt"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.train.worker", job.to_json()],
                env=environment,
                cwd=Path(__file__).parents[2],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def ready(self) -> None:
        """Wait until it is ready for its first turn; ContestantError if it will never be."""
        self._hear()

    def turn(self) -> tuple[list[float], str]:
        """Let it take a turn; return what it measured, and a note."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its last words are still to be read
            self._process.stdin.write("turn\n")
            self._process.stdin.flush()
        message = self._hear()
        return [float(value) for value in message["values"]], str(message["note"])

    def close(self) -> None:
        """End the process, by force if it does not end within 20 seconds."""
        try:
            self._process.communicate("end\n", timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        watch = threading.Timer(_PATIENCE, give_up)
        watch.start()
        line = self._process.stdout.readline()
        watch.cancel()
        if not line:
            if late.is_set():
                raise ContestantError(f"took longer than {_PATIENCE:.0f} s")
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            code = self._process.wait()
            raise ContestantError(f"ended with {code}: {said[-1] if said else 'it said nothing'}")
        message: dict[str, Any] = json.loads(line)
        if "failed" in message:
            raise ContestantError(message["failed"])
        return message


def run_cases(
    cases: Sequence[Case],
    start: Callable[[Case, str], Contestant],
    rounds: int,
    *,
    pause: float = _PAUSE,
) -> list[CaseResult]:
    """Measure cases; whoever cannot run or fails is named in `not_run`, and the others go on.

    `start` makes a contestant of a name. Where times are compared all contestants of all cases
    live at once and alternate, in another order each round; else one begins after the other has
    ended.
    """
    results = [CaseResult(case, {}, {}, {}) for case in cases]
    asked = [_Seat(result, name) for result in results for name in result.case.contestants]
    alone = any(case.alone for case in cases)
    for seats in [[seat] for seat in asked] if alone else [asked]:
        with contextlib.ExitStack() as stack:
            _alternate(_started(seats, start, stack), rounds, pause)
    return results


@attrs.frozen(eq=False)
class _Seat:
    """One contestant in one case."""

    result: CaseResult
    name: str

    def leave(self, error: ContestantError) -> None:
        """Keep why, and nothing that was measured before."""
        why = " ".join(str(error).split())[:400]
        self.result.not_run[self.name] = f"failed: {why}"
        self.result.samples.pop(self.name, None)


def _started(
    seats: Sequence[_Seat],
    start: Callable[[Case, str], Contestant],
    stack: contextlib.ExitStack,
) -> dict[_Seat, Contestant]:
    found: dict[_Seat, Contestant] = {}
    for seat in seats:
        try:
            contestant = start(seat.result.case, seat.name)
            stack.callback(contestant.close)
            contestant.ready()
        except ContestantError as error:
            seat.leave(error)
        else:
            found[seat] = contestant
            seat.result.samples[seat.name] = []
    return found


def _alternate(contestants: dict[_Seat, Contestant], rounds: int, pause: float) -> None:
    for turn in range(rounds):
        for seat in order(list(contestants), turn):
            time.sleep(pause)
            try:
                values, note = contestants[seat].turn()
            except ContestantError as error:
                seat.leave(error)
                del contestants[seat]
                continue
            seat.result.samples[seat.name] += values
            seat.result.notes[seat.name] = note
