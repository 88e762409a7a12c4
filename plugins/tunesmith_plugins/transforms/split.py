"""Split: some rows held out, which a trainer evaluates on."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from tunesmith.data.clean import Drop, split
from tunesmith.data.examples import Sourced
from tunesmith.plugin.options import part_of_rows
from tunesmith.plugin.transforms import Transform, Transformed

__all__ = ["Split", "SplitConfig"]


@attrs.frozen(kw_only=True)
class SplitConfig:
    """Options of the transform split."""

    held_out: float | int = attrs.field(validator=part_of_rows())
    """Share (below 1) or number of rows to hold out."""


class Split(Transform[SplitConfig]):
    """Holds rows out, chosen by the seed and by what they say, not by their order."""

    def apply(self, rows: Sequence[Sourced], *, seed: int, drop: Drop) -> Transformed:
        """Return the rows to train on and those held out, each in the order they came."""
        return Transformed(*split(rows, self.config.held_out, seed))
