"""What is said of each event of a run: on a console as in a notebook."""

from __future__ import annotations

import attrs

from tunesmith.engine.figures import duration
from tunesmith.plugin.events import (
    Event,
    RowsCut,
    RowsDropped,
    RunFinished,
    RunStarted,
    RunView,
    StageFinished,
    StageReused,
    Warned,
)
from tunesmith.report.stage import GAP, finished

__all__ = ["Words", "words_of"]


@attrs.frozen
class Words:
    """A message, and how it is meant."""

    text: str
    style: str = ""
    """A style of rich: "bold", "dim", "green", "yellow", or two of them."""
    ends_stage: bool = False
    """Whether no stage is at work after it."""


def words_of(run: RunView, event: Event) -> Words | None:
    """Return what is said of an event; None for one that is shown otherwise, or is not known."""
    match event:
        case RunStarted():
            count = len(event.stages)
            stages = "1 stage" if count == 1 else f"{count} stages"
            return Words(f"{run.path}: {stages}: {', '.join(event.stages)}", "bold")
        case StageReused():
            text = f"{event.stage}{GAP}reused: recipe, data and versions unchanged"
            return Words(text, "dim", ends_stage=True)
        case RowsDropped():
            return Words(_listed(event, "dropped"), "yellow")
        case RowsCut():
            return Words(_listed(event, "cut the answers of"), "yellow")
        case Warned():
            return Words(f"warning: {event.text}", "yellow")
        case StageFinished():
            return Words(GAP.join([event.stage, *finished(event)]), "green", ends_stage=True)
        case RunFinished():
            text = f"finished in {duration(event.seconds)}: {event.path}"
            return Words(text, "bold green", ends_stage=True)
        case _:
            return None


def _listed(event: RowsDropped | RowsCut, what: str) -> str:
    reasons = sorted(event.reasons.items(), key=lambda item: -item[1])
    why = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
    return (
        f"{event.stage}{GAP}{what} {event.count:,} of {event.total:,} rows"
        f"{': ' if why else ''}{why}; listed in {event.path}"
    )
