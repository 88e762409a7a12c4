"""A report of every run that has begun, however it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.recipe import Recipe

if TYPE_CHECKING:
    from tunesmith.plugin.events import Event

__all__ = ["reported"]


@contextmanager
def reported(recipe: Recipe, directory: Path) -> Iterator[Callable[[Any, Event], None]]:
    """Write the report of a run when it is over, or has failed, or was stopped.

    What is yielded is a listener of the run: nothing is written into a directory that it has not
    come to own, but for the recipe and the report of one that a signal has stopped before.
    """
    from tunesmith.report.html import write_report

    owned = False

    def hear(run: Any, event: Event) -> None:
        nonlocal owned
        owned = True

    try:
        yield hear
    except BaseException:
        from tunesmith.engine.signals import current

        # the error at hand is the one to be told, whatever becomes of the report
        with suppress(Exception):
            if not owned and current().asked is not None:
                from tunesmith.engine.traces import leave_recipe

                leave_recipe(recipe, directory)
                owned = True
            if owned:
                write_report(directory)
        raise
    write_report(directory)
