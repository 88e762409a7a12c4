"""Interface of a metric: a measurement of a model on examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import attrs

from tunesmith.plugin.options import at_least

if TYPE_CHECKING:
    from tunesmith.plugin.session import Session

__all__ = ["Metric", "MetricConfig"]


@attrs.frozen(kw_only=True)
class MetricConfig:
    """Options that a metric over token sequences has."""

    batch_size: int = attrs.field(default=4, validator=at_least(1))
    """Examples in one forward pass."""
    max_length: int = attrs.field(default=1024, validator=at_least(8))
    """Tokens of a sequence, prompt included; longer ones are cut at the end."""


C = TypeVar("C")


class Metric(ABC, Generic[C]):
    """Measures the session's model as it stands; its Spec says which example shape it takes."""

    def __init__(self, config: C) -> None:
        self.config = config

    @abstractmethod
    def measure(self, session: Session, examples: Sequence[Any]) -> Mapping[str, float]:
        """Return named values; the model is in eval mode and gradients are off."""
