"""ShareGPT: turns of from and value, with tool calls and observations as Glaive writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.data.examples import Conversation
from tunesmith.plugin.formats import Format
from tunesmith.plugin.options import NoOptions
from tunesmith_plugins.formats._calls import tools, without_filled
from tunesmith_plugins.formats._fields import count, no_label
from tunesmith_plugins.formats._turns import needs_assistant, turns, with_system

__all__ = ["ShareGPT"]


class ShareGPT(Format[NoOptions]):
    """Rows of `conversations` [{from, value}], optionally with `system` and `tools`.

    A function_call turn that spells {"name", "arguments"} as JSON becomes `tool_calls`, which is
    what chat templates read, of one turn with what the assistant says right before; one that spells
    something else stays as text. An observation becomes a turn of the role tool.
    """

    def recognise(self, row: Mapping[str, Any]) -> int:
        """Return how many fields are ShareGPT's; 0 without conversations."""
        return count(row, ("conversations",), ("system", "tools"))

    def convert(self, row: Mapping[str, Any]) -> Conversation:
        """Return the conversation in a row; `RowError` names the field that is wrong."""
        no_label(row)
        messages = turns(row, "conversations")
        needs_assistant(messages, "conversations")
        known = tools(row)
        return Conversation(without_filled(with_system(row, messages), known), known)
