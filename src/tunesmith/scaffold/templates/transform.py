"""Conversations that are short enough to be worth their time."""

import attrs

from tunesmith.plugin import Spec, hookimpl
from tunesmith.plugin.options import at_least
from tunesmith.plugin.transforms import Transform, Transformed


@attrs.frozen(kw_only=True)
class NewNameConfig:
    """Options of the transform newname."""

    characters: int = attrs.field(default=2000, validator=at_least(1))
    """Characters that all turns of a conversation may have together."""


class NewName(Transform[NewNameConfig]):
    """Leaves out long conversations, and says of each that it did."""

    examples = ("conversation",)

    def apply(self, rows, *, seed, drop):
        """Return the rows that are kept, in the order they came."""
        kept = []
        for row in rows:
            length = sum(len(turn.content) for turn in row.example.messages)
            if length <= self.config.characters:
                kept.append(row)
            else:
                drop(row.where, f"longer than {self.config.characters} characters")
        return Transformed(kept)


@hookimpl
def tunesmith_transforms():
    """Register the transform."""
    return [
        Spec(
            "newname",
            NewNameConfig,
            f"{__name__}:NewName",
            summary="short conversations alone",
        )
    ]
