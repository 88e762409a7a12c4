"""mix: one adapter of several, each with a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunesmith.plugin.exporters import Exporter
from tunesmith.plugin.options import at_least

if TYPE_CHECKING:
    from tunesmith.plugin.session import Session

__all__ = ["Mix", "MixConfig"]


def _weighed(_: Any, __: Any, value: Any) -> None:
    numbers = value.values() if isinstance(value, Mapping) else ()
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise ValueError(
            f"got {value!r}; expected names of adapters with finite weights, as in {{'zh': 0.5}}"
        )


@attrs.frozen(kw_only=True)
class MixConfig:
    """Options of `.mix()`."""

    adapters: Mapping[str, float] = attrs.field(validator=_weighed)
    """Names of the adapters, and what the update of each is multiplied by before they are added."""
    rank: int | None = attrs.field(default=None, validator=at_least(1))
    """Cut the sum to this rank by singular value decomposition; unset keeps all of it, at the sum
    of the ranks."""


class Mix(Exporter[MixConfig]):
    """Adds up the updates of several adapters on one base; the run goes on with the sum.

    What is added is the whole update of each, s B A, and not its two matrices apart, so that one
    adapter at weight 1 is itself.
    """

    makes_adapter = True

    @classmethod
    def reads(cls, config: MixConfig) -> tuple[str, ...]:
        """Return the adapters that are mixed."""
        return tuple(config.adapters)

    def export(self, session: Session, directory: Path) -> Mapping[str, Path]:
        """Write the adapter and return its directory."""
        chosen = [session.adapter(name) for name in self.config.adapters]
        parts = [
            (adapter.directory, weight)
            for adapter, weight in zip(chosen, self.config.adapters.values(), strict=True)
        ]
        chosen[0].method.mix(parts, directory, rank=self.config.rank)
        return {"adapter": directory}
