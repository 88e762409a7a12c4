"""Messages: turns of role and content, the layout of chat APIs and of most data sets on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.data.examples import Conversation
from tunesmith.plugin.formats import Format
from tunesmith.plugin.options import NoOptions
from tunesmith_plugins.formats._fields import count, needs_assistant, tools, turns

__all__ = ["Messages"]


class Messages(Format[NoOptions]):
    """Rows of `messages` [{role, content}], and optionally `tools` as a list or its JSON text.

    Roles are system, user, assistant and tool. Further keys of a message, such as tool_calls or
    name, go on to the chat template. Layout: the messages of OpenAI's chat API.
    """

    def recognise(self, row: Mapping[str, Any]) -> int:
        """Return how many fields are this layout's; 0 without messages."""
        return count(row, ("messages",), ("tools",))

    def convert(self, row: Mapping[str, Any]) -> Conversation:
        """Return the conversation in a row; `RowError` names the field that is wrong."""
        messages = turns(row, "messages")
        needs_assistant(messages, "messages")
        return Conversation(messages, tools(row))
