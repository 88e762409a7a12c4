"""What a run says while it goes: small frozen values that listeners and plugins receive."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import attrs

__all__ = [
    "Event",
    "Progress",
    "RowsCut",
    "RowsDropped",
    "RunFinished",
    "RunStarted",
    "RunView",
    "StageFinished",
    "StageReused",
    "StageStarted",
    "Warned",
]


class RunView(Protocol):
    """What a listener may read of the run that speaks."""

    @property
    def path(self) -> Path:
        """The run directory."""


@attrs.frozen
class Event:
    """Base of all events."""


@attrs.frozen
class RunStarted(Event):
    """The run directory is locked and the plan has no problems."""

    stages: tuple[str, ...]
    """Names of the stages in order, such as "03-sft"."""


@attrs.frozen
class StageStarted(Event):
    """A stage begins its work."""

    stage: str


@attrs.frozen
class StageReused(Event):
    """A finished stage with the same fingerprint was found and is used as it is."""

    stage: str


@attrs.frozen
class Progress(Event):
    """A training stage took an optimizer step."""

    stage: str
    step: int
    total: int
    loss: float | None
    """Mean training loss since the last event; None at an evaluation, as before the first step."""
    tokens: int
    """Tokens processed since the stage began, padding not counted."""
    tokens_per_second: float
    eta_seconds: float
    """Seconds to the end; negative where it is not known yet."""
    memory_bytes: int
    """Most memory that the stage has taken so far, beyond what Python and its libraries hold: of
    the device on CUDA, of this process otherwise."""
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    """What else the trainer logged at this step, such as "rewards/margins" or "eval_loss"."""


@attrs.frozen
class RowsDropped(Event):
    """Rows of a stage's data were left out; the list lies in `path`."""

    stage: str
    count: int
    total: int
    reasons: Mapping[str, int]
    """How many rows for each reason."""
    path: Path


@attrs.frozen
class RowsCut(Event):
    """Rows are used and do not teach where to end: their answers were cut; listed in `path`."""

    stage: str
    count: int
    total: int
    reasons: Mapping[str, int]
    """How many rows for each reason, which says at what length."""
    path: Path


@attrs.frozen
class Warned(Event):
    """Something a user should know, though the run goes on."""

    text: str


@attrs.frozen
class StageFinished(Event):
    """A stage is done and kept."""

    stage: str
    seconds: float
    metrics: Mapping[str, float]


@attrs.frozen
class RunFinished(Event):
    """Every stage is done."""

    path: Path
    seconds: float
