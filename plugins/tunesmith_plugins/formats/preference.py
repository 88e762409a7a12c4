"""Preference: a prompt with a chosen and a rejected continuation, as DPO data is laid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.data.examples import Message, Preference
from tunesmith.errors import RowError
from tunesmith.plugin.formats import Format
from tunesmith.plugin.options import NoOptions
from tunesmith_plugins.formats._fields import (
    count,
    got,
    needs_assistant,
    system_message,
    tools,
    turns,
)

__all__ = ["PreferencePairs"]

_REQUIRED = ("chosen", "rejected")
_OPTIONAL = ("prompt", "conversations", "system", "tools")


class PreferencePairs(Format[NoOptions]):
    """Rows of `chosen` and `rejected`, each a text, one turn or a list of turns.

    The prompt stands in `prompt` (a text or turns) or in `conversations` (turns). Without either
    it is what chosen and rejected, as whole conversations, have in common at their start; with
    one, a chosen and a rejected that both repeat it are taken without the repetition.
    """

    def recognise(self, row: Mapping[str, Any]) -> int:
        """Return how many fields are a preference's; 0 without chosen and rejected."""
        return count(row, _REQUIRED, _OPTIONAL)

    def convert(self, row: Mapping[str, Any]) -> Preference:
        """Return the preference in a row; `RowError` names the field that is wrong."""
        chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
        prompt = _prompt(row)
        if prompt is None:
            shared = _shared(chosen, rejected)
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        elif _begins_with(chosen, prompt) and _begins_with(rejected, prompt):
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        needs_assistant(chosen, "chosen")
        needs_assistant(rejected, "rejected")
        return Preference([*system_message(row), *prompt], chosen, rejected, tools(row))


def _side(row: Mapping[str, Any], field: str) -> list[Message]:
    value = row.get(field)
    return [Message("assistant", value)] if isinstance(value, str) else turns(row, field)


def _prompt(row: Mapping[str, Any]) -> list[Message] | None:
    """Return the prompt that a row gives, or None if it gives none."""
    given = [field for field in ("prompt", "conversations") if row.get(field) is not None]
    if len(given) == 2:
        raise RowError("prompt", "a prompt beside 'conversations'", "only one of the two")
    if "prompt" in row and not given:
        raise RowError("prompt", "null", "text or a list of turns; or no such field")
    if not given:
        return None
    field = given[0]
    value = row[field]
    if field == "prompt" and isinstance(value, str):
        if not value.strip():
            raise RowError("prompt", got(value), "text that is not blank")
        return [Message("user", value)]
    return turns(row, field)


def _begins_with(side: Sequence[Message], prompt: Sequence[Message]) -> bool:
    return len(side) > len(prompt) and list(side[: len(prompt)]) == list(prompt)


def _shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Return how many turns at the start of two whole conversations are their common prompt."""
    # each side keeps at least its last turn, also where one continues the other or both are equal
    most = min(len(chosen), len(rejected)) - 1
    shared = 0
    while shared < most and chosen[shared] == rejected[shared]:
        shared += 1
    if not any(message.role == "user" for message in chosen[:shared]):
        raise RowError(
            "prompt",
            "nothing, and chosen and rejected do not begin with the same turns",
            "a prompt; or chosen and rejected as whole conversations that begin with it",
        )
    return shared
