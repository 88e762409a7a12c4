"""Sample: a share of the rows, chosen by the seed; what the weight of a source does."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from tunesmith.data.clean import Drop, sample
from tunesmith.data.examples import Sourced
from tunesmith.plugin.options import more_than
from tunesmith.plugin.transforms import Transform, Transformed

__all__ = ["Sample", "SampleConfig"]


@attrs.frozen(kw_only=True)
class SampleConfig:
    """Options of the transform sample."""

    share: float = attrs.field(validator=more_than(0))
    """How much of the rows to use: 0.3 is three in ten, 2 is each row twice."""


class Sample(Transform[SampleConfig]):
    """Leaves out rows, or repeats them, so that a share of them is used."""

    adds_rows = True

    def apply(self, rows: Sequence[Sourced], *, seed: int, drop: Drop) -> Transformed:
        """Return the share, in the order the rows came; chosen by what they say."""
        return Transformed(sample(rows, self.config.share, seed, drop))
