"""NotebookReporter: a run as it goes in a notebook's cell, one block that is drawn anew in place.

It needs no widgets: what the kernel displays is updated under one id, as HTML, and as plain text
for front ends that show no HTML.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from tunesmith.engine.cells import framed, text_of
from tunesmith.plugin.events import Event, Progress, RunView, StageStarted
from tunesmith.report.stage import GAP, StageAtWork
from tunesmith.report.words import Words, words_of

__all__ = ["NotebookReporter"]

SECONDS = 0.25
"""At least so long between two drawings of the bar."""
LINES = 200
"""Messages that are shown; of more the first ones are left out, and it is said how many."""

Show = Callable[[dict[str, str]], Callable[[dict[str, str]], None]]
"""Shows data by MIME type, and returns what shows other data in its place."""


class NotebookReporter:
    """Shows a run's events in one output: a listener, and a context manager.

    Finished stages leave a line each, and the stage at work is one bar below them.
    """

    def __init__(self, show: Show | None = None) -> None:
        self._show = show or _displayed
        self._update: Callable[[dict[str, str]], None] | None = None
        self._lines: list[Words] = []
        self._stage: StageAtWork | None = None
        self._drawn = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stage is not None:
            self._lines.append(Words(self._stage.stopped(), "yellow"))
            self._stage = None
            self._draw()

    def __call__(self, run: RunView, event: Event) -> None:
        """Show one event."""
        match event:
            case StageStarted():
                self._stage = StageAtWork(event.stage, time.monotonic())
            case Progress():
                self._progress(event)
                return
            case _:
                words = words_of(run, event)
                if words is None:
                    return
                self._lines.append(words)
                if words.ends_stage:
                    self._stage = None
        self._draw()

    def _progress(self, event: Progress) -> None:
        if self._stage is None or self._stage.name != event.stage:
            self._stage = StageAtWork(event.stage, time.monotonic())
        self._stage.update(event)
        if event.step >= event.total or time.monotonic() - self._drawn >= SECONDS:
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        data = {"text/html": self._html(), "text/plain": self._text()}
        if self._update is None:
            self._update = self._show(data)
        else:
            self._update(data)

    def _shown(self) -> list[Words]:
        hidden = len(self._lines) - LINES
        if hidden <= 0:
            return self._lines
        return [Words(f"{hidden + 1:,} earlier messages", "dim"), *self._lines[hidden + 1 :]]

    def _text(self) -> str:
        lines = [words.text for words in self._shown()]
        if self._stage is not None:
            lines.append(GAP.join([self._stage.name, *self._stage.details().values()]))
        return "\n".join(lines)

    def _html(self) -> str:
        parts = [f'<p class="{words.style}">{text_of(words.text)}</p>' for words in self._shown()]
        if self._stage is not None:
            last = self._stage.last
            share = 0.0 if last is None or last.total <= 0 else min(1.0, last.step / last.total)
            told = GAP.join(self._stage.details().values())
            parts.append(
                f"<p><b>{text_of(self._stage.name)}</b>"
                f'<span class=bar role=progressbar aria-valuenow="{share:.0%}">'
                f'<i style="width:{share:.1%}"></i></span>{text_of(told)}</p>'
            )
        return framed("".join(parts))


def _displayed(data: dict[str, str]) -> Callable[[dict[str, str]], None]:
    from IPython.display import display

    handle: Any = display(data, raw=True, display_id=True)
    return lambda other: handle.update(other, raw=True)
