"""Deduplicate: each row once."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.data.clean import Drop, deduplicate
from tunesmith.data.examples import Sourced
from tunesmith.plugin.options import NoOptions
from tunesmith.plugin.transforms import Transform, Transformed

__all__ = ["Deduplicate"]


class Deduplicate(Transform[NoOptions]):
    """Leaves out rows that say exactly what an earlier one says."""

    def apply(self, rows: Sequence[Sourced], *, seed: int, drop: Drop) -> Transformed:
        """Return the first of all rows that are equal."""
        return Transformed(deduplicate(rows, drop))
