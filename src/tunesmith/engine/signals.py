"""Stops a run on SIGINT (Ctrl-C) and SIGTERM: at once, but for a training step that is at work.

A training takes its step to the end and leaves a checkpoint; everything else begins anew the next
time, so there is nothing to wait for. A second signal does not wait for a step either. See
docs/adr/0014-stopping-and-what-a-stage-depends-on.md. This imports nothing heavy: the command line
stands under it from its first line on.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import attrs

__all__ = [
    "Interrupted",
    "Stopping",
    "Terminated",
    "current",
    "heed",
    "outlook_of",
    "stoppable",
    "stops_after_step",
]

EVALUATION_SECONDS = 20.0
"""How long an evaluation inside a training may go on after the signal before it is given up."""

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """SIGINT has stopped a run; the message says from where it goes on. The status is 130."""

    status = 128 + int(signal.SIGINT)


class Terminated(SystemExit):
    """SIGTERM has stopped a run; the message says from where it goes on. The status is 143."""

    status = 128 + int(signal.SIGTERM)

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = self.status  # what the process ends with if nobody catches this
        self.message = message

    def __str__(self) -> str:
        return self.message


class _Stop(BaseException):
    """On its way to `stoppable`, which knows what to say."""


@attrs.define(eq=False)
class Stopping:
    """Whether a signal has come, and what is to be said of where the run stands."""

    asked: int | None = None
    """The signal, once there was one."""
    since: float = 0.0
    """When it came, by `time.monotonic`."""
    deaf: bool = False
    """True once a signal can change nothing, as where one process of several ends the others."""
    waits: bool = False
    """True while a step is taken to its end instead of being broken off."""
    outlook: Callable[[], str] = lambda: "no stage was begun: run the same again"
    """Says what is kept and from where the run goes on."""

    def check(self) -> None:
        """Stop here if a signal has come: where one was swallowed, or waited for."""
        if self.asked is not None:
            raise _Stop


_INERT = Stopping()
_active: Stopping | None = None


def current() -> Stopping:
    """Return what the present run is stopped by; of no effect where nothing is installed."""
    return _active if _active is not None and _in_main_thread() else _INERT


@contextmanager
def stoppable() -> Iterator[Stopping]:
    """Turn SIGINT and SIGTERM into `Interrupted` and `Terminated`, with where the run stands.

    Only the main thread can, and a signal that is ignored stays so; handlers are put back
    afterwards. Within another `stoppable` this is that one.
    """
    global _active
    if _active is not None and _in_main_thread():
        yield _active
        return
    if not _in_main_thread():
        yield _INERT
        return
    stopping = Stopping()
    owner = os.getpid()
    before: dict[int, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a process forked from this one is no run
            signal.signal(number, before[number])
            os.kill(os.getpid(), number)
            return
        if stopping.deaf:
            return
        again = stopping.asked is not None
        if not again:
            stopping.asked, stopping.since = number, time.monotonic()
        if again or not stopping.waits:
            raise _Stop
        _say("stopping after this step; once more stops at once")

    for each in _SIGNALS:
        present = signal.getsignal(each)
        if present not in (signal.SIG_IGN, None):
            before[each] = present
            signal.signal(each, handle)
    _active = stopping
    try:
        try:
            yield stopping
            stopping.check()
        finally:
            _active = None
            for number, handler in before.items():
                deaf = stopping.deaf and number == signal.SIGTERM
                # what is left to be done is to say what has happened
                signal.signal(number, signal.SIG_IGN if deaf else handler)
    except BaseException as error:
        # what a signal breaks off may end as another error, such as a failed import
        if stopping.asked is None or not isinstance(error, (Exception, _Stop, KeyboardInterrupt)):
            raise
        raise _stopped_by(stopping.asked, stopping.outlook()) from None


@contextmanager
def stops_after_step(trainer: Any) -> Iterator[None]:
    """Let a signal wait for the end of a `transformers.Trainer`'s step, and stop it there.

    The trainer then returns from `train()` as if it were done: ask `current().check()` after it.
    """
    from transformers import TrainerCallback

    from tunesmith.engine.world import current as world

    stopping = current()

    def asked() -> bool:
        """Whether a signal has come to any process: all stop after the same step."""
        number = world().most(stopping.asked or 0)
        if number and stopping.asked is None:
            stopping.asked, stopping.since = number, time.monotonic()
        return bool(number)

    class StopsAfterStep(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if asked():
                control.should_save = control.should_training_stop = True

        def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not asked():
                return
            control.should_save = True
            if state.global_step < state.max_steps:
                control.should_training_stop = True
                # the checkpoint that follows is of a training that is not over
                if (keeper := getattr(trainer, "tunesmith_keeper", None)) is not None:
                    keeper.stopped = True

        def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stopping.asked is None:
                return
            if time.monotonic() - stopping.since > EVALUATION_SECONDS:
                stopping.check()

    callback = StopsAfterStep()
    trainer.add_callback(callback)
    stopping.waits = stopping is not _INERT
    try:
        yield
    finally:
        stopping.waits = False
        trainer.remove_callback(callback)


def outlook_of(stage: str, checkpoints: Path) -> str:
    """Say from where a stage goes on that is broken off now; `checkpoints` may not be there."""
    steps = [
        int(found[1])
        for entry in (checkpoints.iterdir() if checkpoints.is_dir() else ())
        if (found := _CHECKPOINT.fullmatch(entry.name))
    ]
    if steps:
        return f"run the same again, which goes on from step {max(steps)} of {stage}"
    return f"run the same again, which begins {stage} anew and keeps the stages before it"


def heed(number: int | None) -> None:
    """Be stopped by a signal that has come to another process of this run, or by none."""
    stopping = current()
    if stopping is not _INERT and stopping.asked != number:
        stopping.asked, stopping.since = number, time.monotonic()


def _stopped_by(number: int, outlook: str) -> Interrupted | Terminated:
    if number == signal.SIGINT:
        return Interrupted(f"stopped by Ctrl-C (SIGINT); {outlook}")
    return Terminated(f"stopped by SIGTERM; {outlook}")


def _say(text: str) -> None:
    """Write a line to stderr, past whatever else is being written there; one process says it."""
    from tunesmith.engine.world import current as world

    if not world().main or world().failing:
        return
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\ntunesmith: {text}\n".encode())


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
