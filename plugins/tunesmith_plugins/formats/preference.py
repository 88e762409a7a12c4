"""Preference: a prompt with a chosen and a rejected continuation, as DPO data is laid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.data.examples import Message, Preference
from tunesmith.errors import RowError
from tunesmith.plugin.formats import Format
from tunesmith.plugin.options import NoOptions
from tunesmith_plugins.formats._calls import tools, without_filled
from tunesmith_plugins.formats._fields import count, got
from tunesmith_plugins.formats._turns import needs_assistant, same_turn, turns, with_system

__all__ = ["PreferencePairs"]

_REQUIRED = ("chosen", "rejected")
_OPTIONAL = ("prompt", "conversations", "system", "tools")


class PreferencePairs(Format[NoOptions]):
    """Rows of `chosen` and `rejected`, each a text, one turn or a list of turns.

    The prompt stands in `prompt` (a text or turns) or in `conversations` (turns). Without either
    it is what chosen and rejected, as whole conversations, have in common at their start; with
    one, what chosen and rejected repeat of it is shown once, and turns that they have before it
    belong to it.
    """

    def recognise(self, row: Mapping[str, Any]) -> int:
        """Return how many fields are a preference's; 0 without chosen and rejected."""
        return count(row, _REQUIRED, _OPTIONAL)

    def convert(self, row: Mapping[str, Any]) -> Preference:
        """Return the preference in a row; `RowError` names the field that is wrong."""
        chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
        needs_assistant(chosen, "chosen")
        needs_assistant(rejected, "rejected")
        prompt = _prompt(row)
        if prompt is None:
            shared = _shared(chosen, rejected)
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        else:
            before_chosen, chosen = _parted(prompt, chosen, "chosen")
            before_rejected, rejected = _parted(prompt, rejected, "rejected")
            prompt = _longer(before_chosen, before_rejected)
        needs_assistant(chosen, "chosen")
        needs_assistant(rejected, "rejected")
        known = tools(row)
        return Preference(
            without_filled(with_system(row, prompt), known),
            without_filled(chosen, known),
            without_filled(rejected, known),
            known,
        )


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


def _parted(
    prompt: Sequence[Message], side: Sequence[Message], field: str
) -> tuple[list[Message], list[Message]]:
    """Return the prompt with the turns a side has before it, and what the side goes on with.

    A side may repeat the whole prompt or its last turns, may begin earlier than it does, and may
    bring the system turn or leave it out.
    """
    system, asked = _system(prompt)
    own_system, said = _system(side)
    whole = len(asked)
    # a side that the assistant begins repeats the prompt only if the assistant begins that as well
    answers = bool(said) and said[0].role == "assistant"
    for end in (whole, *(() if answers else range(1, len(said)))):
        repeated = min(end, whole)
        if not repeated or end >= len(said):
            continue
        if all(map(same_turn, asked[whole - repeated :], said[end - repeated : end])):
            if system and own_system and not same_turn(system[0], own_system[0]):
                raise RowError(field, "another system turn than the prompt's", "the same, or none")
            return [*(system or own_system), *said[: end - repeated], *asked], said[end:]
    if own_system or (said[0].role == "user" and asked and asked[-1].role == "user"):
        raise RowError(
            field,
            f"turns that begin with a {side[0].role} turn other than the prompt's",
            "the answer, or a whole conversation that has the prompt in it",
        )
    return list(prompt), list(side)


def _system(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """Return a system turn at the beginning, if there is one, and the other turns."""
    begins = 1 if messages and messages[0].role == "system" else 0
    return list(messages[:begins]), list(messages[begins:])


def _longer(one: list[Message], other: list[Message]) -> list[Message]:
    """Return of two prompts, one of which may begin earlier, the one that says more."""
    if len(one) < len(other):
        one, other = other, one
    system, asked = _system(other)
    if all(map(same_turn, asked, one[len(one) - len(asked) :])) and (
        not system or same_turn(system[0], one[0])
    ):
        return one
    raise RowError("rejected", "other turns before the prompt than chosen has", "the same turns")


def _shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Return how many turns at the start of two whole conversations are their common prompt."""
    # each side keeps at least its last turn, also where one continues the other or both are equal
    most = min(len(chosen), len(rejected)) - 1
    shared = 0
    while shared < most and _as_prompt(chosen[shared], rejected[shared]):
        shared += 1
    if not any(message.role == "user" for message in chosen[:shared]):
        raise RowError(
            "prompt",
            "nothing, and chosen and rejected do not begin with the same turns",
            "a prompt; or chosen and rejected as whole conversations that begin with it",
        )
    return shared


def _as_prompt(one: Message, other: Message) -> bool:
    """Return whether two turns are one; of the assistant's, white space may be the difference."""
    return same_turn(one, other) and (one.role != "assistant" or one.content == other.content)
