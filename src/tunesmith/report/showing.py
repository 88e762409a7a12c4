"""Which way a run's progress is shown: in a notebook by one block, else on the console."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from tunesmith.engine.cells import in_notebook
from tunesmith.plugin.events import Event

__all__ = ["progress_reporter"]


def progress_reporter() -> AbstractContextManager[Callable[[Any, Event], None]]:
    """Return a listener, and context manager, that shows a run where it is looked at."""
    if in_notebook():
        from tunesmith.report.notebook import NotebookReporter

        return NotebookReporter()
    from tunesmith.report.console import ConsoleReporter

    return ConsoleReporter()
