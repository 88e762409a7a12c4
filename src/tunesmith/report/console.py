"""ConsoleReporter: a run as it goes, live in a terminal and as plain lines everywhere else."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import attrs

from tunesmith.plugin.events import (
    Event,
    Progress,
    RowsCut,
    RowsDropped,
    RunFinished,
    RunStarted,
    RunView,
    StageFinished,
    StageReused,
    StageStarted,
    Warned,
)

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.live import Live

__all__ = ["ConsoleReporter", "duration", "main_metrics", "number"]

PLAIN_LINES = 20
"""Evenly spaced progress lines that a stage leaves without a terminal."""
QUIET_SECONDS = 30.0
"""Silence after which plain output speaks out of turn; doubles each time, so a day adds eleven."""

_FIRST = (
    "loss",
    "train_loss",
    "eval_loss",
    "perplexity",
    "rewards/accuracies",
    "eval_rewards/accuracies",
    "rewards/margins",
    "eval_rewards/margins",
)
_BOOKKEEPING = re.compile(
    r"(_|^)(runtime|per_second|flos|epoch|tokens_seen|learning_rate|grad_norm|step)$"
)
_STYLING = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_GAP = "  "
_MIN_BAR, _MAX_BAR = 8, 40


def duration(seconds: float) -> str:
    """Return seconds as "4.2s", "2:05" or "1:02:05"; "-" where they are not known."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def number(value: object) -> str:
    """Return a measured value in about four digits; NaN and infinity are written out."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e9:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def main_metrics(metrics: Mapping[str, Any], *, most: int = 5) -> dict[str, Any]:
    """Return the metrics people ask for first: losses, then quality, never the bookkeeping."""
    telling = [name for name in metrics if not _BOOKKEEPING.search(name)]
    # sorted() is stable: what is not known by name keeps the order it was reported in
    telling.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    return {name: metrics[name] for name in telling[:most]}


class ConsoleReporter:
    """Shows a run's events on stderr: a listener, and a context manager that leaves nothing torn.

    In a terminal the stage at work is one live line. Anywhere else, or where NO_COLOR, CI or
    TERM=dumb ask for it, events become plain lines without control characters, about twenty for
    each training stage. Event classes it does not know are ignored.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self._console = console or Console(stderr=True, force_jupyter=False, highlight=False)
        self._live_line = self._console.is_terminal and not (
            self._console.is_dumb_terminal
            or os.environ.get("TERM", "").lower() == "dumb"
            or os.environ.get("NO_COLOR")
            or os.environ.get("CI", "").lower() not in ("", "0", "false")
        )
        self._stage: _Stage | None = None
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        stage = self._end_stage()
        if stage is not None:
            at = "" if stage.last is None else f" at step {stage.last.step}/{stage.last.total}"
            spent = duration(stage.elapsed())
            self._say(f"{stage.name}{_GAP}stopped{at} after {spent}", "yellow")

    def __call__(self, run: RunView, event: Event) -> None:
        """Show one event."""
        match event:
            case RunStarted():
                count = len(event.stages)
                stages = "1 stage" if count == 1 else f"{count} stages"
                self._say(f"{run.path}: {stages}: {', '.join(event.stages)}", "bold")
            case StageStarted():
                self._begin_stage(event.stage)
            case Progress():
                self._progress(event)
            case StageReused():
                self._end_stage()
                self._say(f"{event.stage}{_GAP}reused: recipe, data and versions unchanged", "dim")
            case RowsDropped():
                self._listed(event, "dropped")
            case RowsCut():
                self._listed(event, "cut the answers of")
            case Warned():
                self._say(f"warning: {event.text}", "yellow")
            case StageFinished():
                self._end_stage()
                metrics = _named(main_metrics(event.metrics))
                spent = duration(event.seconds)
                self._say(_GAP.join([event.stage, f"done in {spent}", *metrics]), "green")
            case RunFinished():
                self._end_stage()
                self._say(f"finished in {duration(event.seconds)}: {event.path}", "bold green")
            case _:
                pass

    def _listed(self, event: RowsDropped | RowsCut, what: str) -> None:
        reasons = sorted(event.reasons.items(), key=lambda item: -item[1])
        why = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
        self._say(
            f"{event.stage}{_GAP}{what} {event.count:,} of {event.total:,} rows"
            f"{': ' if why else ''}{why}; listed in {event.path}",
            "yellow",
        )

    def _begin_stage(self, name: str) -> _Stage:
        self._end_stage()
        self._stage = stage = _Stage(name, time.monotonic())
        if self._live_line:
            from rich.live import Live

            self._live = Live(
                stage,
                console=self._console,
                refresh_per_second=4,
                transient=True,
                # results printed to a pipe stay in that pipe
                redirect_stdout=sys.stdout.isatty(),
            )
            self._live.start()
        else:
            self._say(f"{name}{_GAP}started")
        return stage

    def _end_stage(self) -> _Stage | None:
        """Take the live line away and return the stage that was at work, if one was."""
        if self._live is not None:
            self._live.stop()
        stage, self._stage, self._live = self._stage, None, None
        return stage

    def _progress(self, event: Progress) -> None:
        stage = self._stage
        if stage is None or stage.name != event.stage:
            stage = self._begin_stage(event.stage)
        stage.update(event)
        if not self._live_line and stage.is_due():
            self._say(_GAP.join([stage.name, *stage.details().values()]))

    def _say(self, text: str, style: str = "") -> None:
        """Print one message above the live line; the file is flushed by rich."""
        from rich.text import Text

        # names and data come from anywhere: no escape sequence of theirs reaches the terminal
        text = _CONTROL.sub(" ", _STYLING.sub("", text.strip()).replace("\r\n", "\n"))
        text = "\n    ".join(text.splitlines())
        encoding = self._console.encoding
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        self._console.print(Text(text, style=style if self._live_line else ""), soft_wrap=True)


@attrs.define(eq=False)
class _Stage:
    """The stage at work: what its latest event said, as one line that fits any width."""

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
        shown = {name: value for name, value in event.metrics.items() if name in _FIRST[2:]}
        self.measured = {**self.measured, **shown}
        if event.loss is None and self.last is not None:
            event = attrs.evolve(event, loss=self.last.loss)
        self.last, self.heard = event, time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.began

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
        parts["memory"] = _size(event.memory_bytes)
        if self.measured:
            parts["measured"] = _GAP.join(_named(main_metrics(self.measured, most=3)))
        return parts

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        parts = self.details()
        fixed = len(self.name) + 2 * len(_GAP) + _MIN_BAR

        def room() -> int:
            return options.max_width - fixed - sum(len(part) + len(_GAP) for part in parts.values())

        for least in ("measured", "memory", "speed", "time", "loss", "step"):
            if room() < 0:
                parts.pop(least, None)
        name = Text(_CONTROL.sub(" ", self.name), style="bold", no_wrap=True, overflow="crop")
        if room() < 0:
            yield name
            return
        tail = Text(no_wrap=True, overflow="crop")
        for key, part in parts.items():
            bad = key == "loss" and part.endswith(("nan", "inf"))
            tail.append(_GAP + part, style="bold red" if bad else _STYLES[key])
        bar = ProgressBar(
            total=None if self.last is None else max(self.last.total, 1),
            completed=0 if self.last is None else self.last.step,
            width=min(_MIN_BAR + room(), _MAX_BAR),
        )
        line = Table.grid()
        line.add_row(name, Text(_GAP), bar, tail)
        yield line


_STYLES = {
    "step": "",
    "loss": "bold cyan",
    "speed": "",
    "time": "dim",
    "memory": "dim",
    "measured": "cyan",
}


def _named(metrics: Mapping[str, Any]) -> list[str]:
    return [f"{name} {number(value)}" for name, value in metrics.items()]


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
