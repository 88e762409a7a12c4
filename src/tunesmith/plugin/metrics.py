"""Interface of a metric: a measurement of a model on examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import attrs

from tunesmith.nn.tasks import CAUSAL_LM, Task
from tunesmith.plugin.conditions import Resolved
from tunesmith.plugin.options import at_least, one_of
from tunesmith.recipe_data import ON_BAD_ROW

if TYPE_CHECKING:
    from tunesmith.plugin.session import Session

__all__ = ["Measured", "Metric", "MetricConfig", "Sample"]


@attrs.frozen(kw_only=True)
class MetricConfig:
    """Options that a metric over token sequences has."""

    batch_size: int = attrs.field(default=4, validator=at_least(1))
    """Examples in one forward pass."""
    max_length: int = attrs.field(default=1024, validator=at_least(8))
    """Tokens of a sequence, prompt included; longer ones are cut at the end."""
    on_bad_row: str = attrs.field(default="error", validator=one_of(*ON_BAD_ROW))
    """What is done about a row that its format cannot read: "error" stops, naming it, and "drop"
    leaves it out and lists it."""


C = TypeVar("C")


@attrs.frozen
class Sample:
    """An answer that was looked at, as a report shows it beside those of other stages."""

    prompt: str
    completion: str
    reference: str | None = None
    """What it was compared with."""
    scores: Mapping[str, float] = attrs.field(factory=dict)


@attrs.frozen
class Measured:
    """What a metric has found out."""

    values: Mapping[str, float]
    """Numbers by name."""
    samples: Sequence[Sample] = ()
    """A few answers with it, if it is one of answers; they are kept in the run directory."""


class Metric(Resolved, ABC, Generic[C]):
    """Measures the session's model as it stands; its Spec says which example shape it takes."""

    task: ClassVar[Task] = CAUSAL_LM
    """What kind of model it measures; `session.model` is one."""

    def __init__(self, config: C) -> None:
        self.config = config

    @abstractmethod
    def measure(self, session: Session, examples: Sequence[Any]) -> Measured:
        """Return what was measured; the model is in eval mode and gradients are off."""
