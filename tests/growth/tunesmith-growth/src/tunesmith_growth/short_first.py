"""Short rows first, as a curriculum has them (Bengio et al., 2009)."""

from __future__ import annotations

import attrs

from tunesmith.plugin.transforms import Transform, Transformed


@attrs.frozen(kw_only=True)
class ShortFirstConfig:
    """Options of the transform short_first."""

    reverse: bool = False
    """Put the long rows first instead."""


class ShortFirst(Transform[ShortFirstConfig]):
    """Orders conversations by their characters."""

    examples = ("conversation",)

    def apply(self, rows, *, seed, drop):
        """Return all rows, those of equal length in the order they came."""

        def length(row):
            return sum(len(turn.content) for turn in row.example.messages)

        return Transformed(sorted(rows, key=length, reverse=self.config.reverse))
