"""Limit: the first rows."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from tunesmith.data.clean import Drop
from tunesmith.data.examples import Sourced
from tunesmith.plugin.options import at_least
from tunesmith.plugin.transforms import Transform, Transformed

__all__ = ["Limit", "LimitConfig"]


@attrs.frozen(kw_only=True)
class LimitConfig:
    """Options of the transform limit."""

    rows: int = attrs.field(validator=at_least(1))
    """How many rows to use at most: the first ones."""


class Limit(Transform[LimitConfig]):
    """Leaves out all rows but the first; data with fewer is taken as it is."""

    def apply(self, rows: Sequence[Sourced], *, seed: int, drop: Drop) -> Transformed:
        """Return the first rows, in their order."""
        for row in rows[self.config.rows :]:
            drop(row.where, "beyond the limit")
        return Transformed(rows[: self.config.rows])
