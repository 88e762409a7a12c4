"""Clean: rows that have something to learn from."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.data.clean import Drop, drop_empty
from tunesmith.data.examples import Sourced
from tunesmith.plugin.options import NoOptions
from tunesmith.plugin.transforms import Transform, Transformed

__all__ = ["Clean"]


class Clean(Transform[NoOptions]):
    """Leaves out rows that have nothing to learn from; the reasons say what is missing."""

    def apply(self, rows: Sequence[Sourced], *, seed: int, drop: Drop) -> Transformed:
        """Return the rows that say something."""
        return Transformed(drop_empty(rows, drop))
