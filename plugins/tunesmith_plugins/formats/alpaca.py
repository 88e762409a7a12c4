"""Alpaca: an instruction, an optional input and the output, as Stanford Alpaca published them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.data.examples import Conversation, Message
from tunesmith.errors import RowError
from tunesmith.plugin.formats import Format
from tunesmith.plugin.options import NoOptions
from tunesmith_plugins.formats._fields import count, got, no_label, text
from tunesmith_plugins.formats._turns import with_system

__all__ = ["Alpaca"]

_REQUIRED = ("instruction", "output")
_OPTIONAL = ("input", "system", "history")


class Alpaca(Format[NoOptions]):
    """Rows of instruction, input and output; optionally a system text and earlier turns.

    The input follows the instruction after a blank line. `history` is a list of pairs
    [user, assistant]. Layout: github.com/tatsu-lab/stanford_alpaca.
    """

    def recognise(self, row: Mapping[str, Any]) -> int:
        """Return how many fields are Alpaca's; 0 without instruction and output."""
        return count(row, _REQUIRED, _OPTIONAL)

    def convert(self, row: Mapping[str, Any]) -> Conversation:
        """Return the conversation in a row; `RowError` names the field that is wrong."""
        no_label(row)
        messages = with_system(row, _history(row))
        instruction = text(row, "instruction")
        given = text(row, "input", optional=True)
        asked = "\n\n".join(part for part in (instruction, given) if part.strip())
        if not asked:
            raise RowError("instruction", got(instruction), "text that is not blank")
        messages += [Message("user", asked), Message("assistant", text(row, "output"))]
        return Conversation(messages)


def _history(row: Mapping[str, Any]) -> list[Message]:
    pairs = row.get("history")
    if pairs is None:
        return []
    if not isinstance(pairs, (list, tuple)):
        raise RowError("history", got(pairs), "a list of pairs [user, assistant]")
    messages: list[Message] = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise RowError(f"history[{index}]", got(pair), "a pair [user, assistant]")
        for role, content in zip(("user", "assistant"), pair, strict=True):
            if not isinstance(content, str):
                raise RowError(f"history[{index}]", got(content), "a pair of texts")
            messages.append(Message(role, content))
    return messages
