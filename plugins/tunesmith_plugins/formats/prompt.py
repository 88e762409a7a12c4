"""Prompt: a prompt without an answer, for training that generates its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.data.examples import Message, Prompt
from tunesmith.errors import RowError
from tunesmith.plugin.formats import Format
from tunesmith.plugin.options import NoOptions
from tunesmith_plugins.formats._fields import count, got
from tunesmith_plugins.formats._turns import turns, with_system

__all__ = ["Prompts"]

_ANSWERED = frozenset(
    (
        *("chosen", "rejected", "completion", "completions", "response", "responses", "output"),
        *("label", "kto_tag", "messages", "conversations", "instruction", "text"),
    )
)
"""Fields of other layouts: with one of them a row may well be meant to be learned from."""


class Prompts(Format[NoOptions]):
    """Rows of `prompt` (a text or turns) and optionally `system`; all other fields go on with it.

    What goes on, such as `answer` or `solution`, is what a reward may compare with. Layout: the
    prompt-only data sets of TRL.
    """

    def recognise(self, row: Mapping[str, Any]) -> int:
        """Return how many fields are this layout's; 0 beside what another layout would learn."""
        return 0 if _ANSWERED & row.keys() else count(row, ("prompt",), ("system",))

    def convert(self, row: Mapping[str, Any]) -> Prompt:
        """Return the prompt in a row; `RowError` names the field that is wrong."""
        given = row.get("prompt")
        if isinstance(given, str):
            if not given.strip():
                raise RowError("prompt", got(given), "text that is not blank")
            messages = [Message("user", given)]
        else:
            messages = turns(row, "prompt")
        if messages[-1].role == "assistant":
            raise RowError(
                "prompt", "turns that end with the assistant's", "turns that wait for an answer"
            )
        others = {key: value for key, value in row.items() if key not in ("prompt", "system")}
        return Prompt(with_system(row, messages), others)
