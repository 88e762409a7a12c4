"""Lets the contestants take turns, each in a process of its own: one works, the others sleep."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs

from benchmarks.measure import order
from benchmarks.train.cases import Case, Job

__all__ = ["CaseResult", "Contestant", "ContestantError", "Worker", "run_case"]

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


def run_case(
    case: Case,
    start: Callable[[str], Contestant],
    rounds: int,
    *,
    pause: float = _PAUSE,
) -> CaseResult:
    """Measure a case; whoever cannot run or fails is named in `not_run`, and the others go on.

    `start` makes a contestant of a name. Where times are compared all live at once and alternate,
    in another order each round; else one begins after the other has ended.
    """
    result = CaseResult(case, {}, {}, {})
    groups = [[name] for name in case.contestants] if case.alone else [list(case.contestants)]
    for names in groups:
        with contextlib.ExitStack() as stack:
            _alternate(names, _started(names, start, result, stack), result, rounds, pause)
    return result


def _started(
    names: Sequence[str],
    start: Callable[[str], Contestant],
    result: CaseResult,
    stack: contextlib.ExitStack,
) -> dict[str, Contestant]:
    found: dict[str, Contestant] = {}
    for name in names:
        try:
            contestant = start(name)
            stack.callback(contestant.close)
            contestant.ready()
        except ContestantError as error:
            result.not_run[name] = _one_line(error)
        else:
            found[name] = contestant
            result.samples[name] = []
    return found


def _alternate(
    names: Sequence[str],
    contestants: Mapping[str, Contestant],
    result: CaseResult,
    rounds: int,
    pause: float,
) -> None:
    for turn in range(rounds):
        for name in order([name for name in names if name in result.samples], turn):
            time.sleep(pause)
            try:
                values, note = contestants[name].turn()
            except ContestantError as error:
                result.not_run[name] = _one_line(error)
                del result.samples[name]
                continue
            result.samples[name] += values
            result.notes[name] = note


def _one_line(error: ContestantError) -> str:
    return "failed: " + " ".join(str(error).split())[:400]
