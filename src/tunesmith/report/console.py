"""ConsoleReporter: a run as it goes, live in a terminal and as plain lines everywhere else."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

import attrs

from tunesmith.plugin.events import Event, Progress, RunView, StageStarted
from tunesmith.report.stage import GAP, StageAtWork
from tunesmith.report.words import words_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.live import Live

__all__ = ["ConsoleReporter"]

_STYLING = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_MIN_BAR, _MAX_BAR = 8, 40
_STYLES = {
    "step": "",
    "loss": "bold cyan",
    "speed": "",
    "time": "dim",
    "memory": "dim",
    "measured": "cyan",
}


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
        self._stage: _LiveStage | None = None
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
            self._say(stage.stopped(), "yellow")

    def __call__(self, run: RunView, event: Event) -> None:
        """Show one event."""
        match event:
            case StageStarted():
                self._begin_stage(event.stage)
            case Progress():
                self._progress(event)
            case _:
                words = words_of(run, event)
                if words is None:
                    return
                if words.ends_stage:
                    self._end_stage()
                self._say(words.text, words.style)

    def _begin_stage(self, name: str) -> _LiveStage:
        self._end_stage()
        self._stage = stage = _LiveStage(name, time.monotonic())
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
            self._say(f"{name}{GAP}started")
        return stage

    def _end_stage(self) -> _LiveStage | None:
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
            self._say(GAP.join([stage.name, *stage.details().values()]))

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
class _LiveStage(StageAtWork):
    """The stage at work as one line that fits any width."""

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        parts = self.details()
        fixed = len(self.name) + 2 * len(GAP) + _MIN_BAR

        def room() -> int:
            return options.max_width - fixed - sum(len(part) + len(GAP) for part in parts.values())

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
            tail.append(GAP + part, style="bold red" if bad else _STYLES[key])
        bar = ProgressBar(
            total=None if self.last is None else max(self.last.total, 1),
            completed=0 if self.last is None else self.last.step,
            width=min(_MIN_BAR + room(), _MAX_BAR),
        )
        line = Table.grid()
        line.add_row(name, Text(GAP), bar, tail)
        yield line
