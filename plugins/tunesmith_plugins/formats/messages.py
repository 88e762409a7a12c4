"""Messages: turns of role and content, the layout of chat APIs and of most data sets on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.data.examples import Conversation
from tunesmith.plugin.formats import Format
from tunesmith.plugin.options import NoOptions
from tunesmith_plugins.formats._calls import tools, without_filled
from tunesmith_plugins.formats._fields import count, no_label
from tunesmith_plugins.formats._turns import needs_assistant, turns, with_system

__all__ = ["Messages"]


class Messages(Format[NoOptions]):
    """Rows of `messages` [{role, content}], optionally with `system` and `tools`.

    Roles are system, user, assistant and tool. A turn with `weight` 0 is shown and not learned.
    Further keys of a message, such as tool_calls or name, go on to the chat template. Layout: the
    messages of OpenAI's chat API.
    """

    def recognise(self, row: Mapping[str, Any]) -> int:
        """Return how many fields are this layout's; 0 without messages."""
        return count(row, ("messages",), ("system", "tools", "functions"))

    def convert(self, row: Mapping[str, Any]) -> Conversation:
        """Return the conversation in a row; `RowError` names the field that is wrong."""
        no_label(row)
        messages = turns(row, "messages")
        needs_assistant(messages, "messages")
        known = tools(row)
        return Conversation(without_filled(with_system(row, messages), known), known)
