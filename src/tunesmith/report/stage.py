"""A stage at work, as a line on a console or in a notebook tells it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import attrs

from tunesmith.engine.figures import (
    EVALUATED,
    duration,
    figure,
    main_metrics,
    number,
    summary,
)
from tunesmith.plugin.events import Progress, StageFinished
from tunesmith.units import byte_size

__all__ = ["GAP", "StageAtWork", "finished", "named"]

PLAIN_LINES = 20
"""Evenly spaced progress lines that a stage leaves without a terminal."""
QUIET_SECONDS = 30.0
"""Silence after which plain output speaks out of turn; doubles each time, so a day adds eleven."""
GAP = "  "


@attrs.define(eq=False)
class StageAtWork:
    """What a stage's latest events said, in the parts of one line."""

    name: str
    began: float
    last: Progress | None = None
    heard: float = 0.0
    """When the latest event came."""
    measured: dict[str, float] = attrs.field(factory=dict)
    """Latest evaluation loss, margins and the like; they come with some events only."""
    spoken: float = 0.0
    """When the latest plain line was printed."""
    share: int = -1
    """How many of the evenly spaced plain lines are behind us."""
    quiet: float = QUIET_SECONDS

    def update(self, event: Progress) -> None:
        """Take note of an event."""
        shown = {name: value for name, value in event.metrics.items() if name in EVALUATED}
        self.measured = {**self.measured, **shown}
        if event.loss is None and self.last is not None:
            event = attrs.evolve(event, loss=self.last.loss)
        self.last, self.heard = event, time.monotonic()

    def elapsed(self) -> float:
        """Return the seconds since the stage began."""
        return time.monotonic() - self.began

    def stopped(self) -> str:
        """Return what is said of it if it is broken off now."""
        at = "" if self.last is None else f" at step {self.last.step}/{self.last.total}"
        return f"{self.name}{GAP}stopped{at} after {duration(self.elapsed())}"

    def is_due(self) -> bool:
        """Whether a plain line is wanted now; asking marks it as printed."""
        assert self.last is not None
        now, step, total = time.monotonic(), self.last.step, self.last.total
        # PLAIN_LINES - 1 equal parts and the first step; the last step ends the last part
        share = step * (PLAIN_LINES - 1) // total if total > 0 else 0
        if share <= self.share:
            if now - self.spoken < self.quiet:
                return False
            self.quiet *= 2
        self.share, self.spoken = max(share, self.share), now
        return True

    def details(self) -> dict[str, str]:
        """Return what is known of the stage's progress, in the order it is read."""
        event = self.last
        if event is None:
            return {"time": duration(self.elapsed())}
        eta = event.eta_seconds - (time.monotonic() - self.heard)
        left = duration(max(eta, 0.0) if event.eta_seconds >= 0 else math.nan)
        # steps and loss keep their width, or the bar would tremble
        parts = {"step": f"{event.step:>{len(str(event.total))}}/{event.total}"}
        if event.loss is not None:
            loss = float(event.loss)
            usual = 1e-3 <= abs(loss) < 1e3
            parts["loss"] = f"loss {loss:.4f}" if usual else f"loss {number(loss)}"
        parts["speed"] = f"{event.tokens_per_second:,.0f} tok/s"
        parts["time"] = f"{duration(self.elapsed())}, ETA {left}"
        parts["memory"] = byte_size(event.memory_bytes)
        if self.measured:
            parts["measured"] = GAP.join(named(main_metrics(self.measured, most=3)))
        return parts


def finished(event: StageFinished) -> list[str]:
    """Return what is said of a stage that is done: how long it took, and what it has come to."""
    told = summary(event.metrics)
    return [
        f"done in {duration(event.seconds)}",
        *(
            value if name in ("speed", "memory") else f"{name} {value}"
            for name, value in told.items()
        ),
    ]


def named(metrics: Mapping[str, Any]) -> list[str]:
    """Return each metric as its name and value."""
    return [f"{name} {figure(name, value)}" for name, value in metrics.items()]
