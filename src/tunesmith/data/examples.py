"""What a data format produces: the five shapes of example that everything downstream knows.

A format turns a row into one of these; `tunesmith.data.render` turns these into token ids and
labels. A trainer says which shape it wants by its `example` attribute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs

__all__ = [
    "EXAMPLE_TYPES",
    "Conversation",
    "Example",
    "Labeled",
    "Message",
    "Preference",
    "Prompt",
    "Sourced",
    "Text",
]


@attrs.frozen
class Message:
    """One turn of a conversation, as chat templates take it."""

    role: str
    """"system", "user", "assistant" or "tool"."""
    content: str
    extra: Mapping[str, Any] = attrs.field(factory=dict)
    """Further keys that the template may read, such as "tool_calls" or "name"."""
    trained: bool = True
    """False for a turn of the assistant that is shown and not learned; others are never learned."""

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that `apply_chat_template` reads."""
        return {"role": self.role, "content": self.content, **self.extra}


def _messages(messages: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(messages)


def _tools(tools: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    return tuple(tools)


@attrs.frozen
class Conversation:
    """Turns in order; the assistant's are what supervised fine-tuning learns."""

    messages: tuple[Message, ...] = attrs.field(converter=_messages)
    tools: tuple[Mapping[str, Any], ...] = attrs.field(default=(), converter=_tools)
    """JSON schemas of the tools the assistant may call."""


@attrs.frozen
class Preference:
    """A prompt with a better and a worse continuation, each one or more turns."""

    prompt: tuple[Message, ...] = attrs.field(converter=_messages)
    chosen: tuple[Message, ...] = attrs.field(converter=_messages)
    rejected: tuple[Message, ...] = attrs.field(converter=_messages)
    tools: tuple[Mapping[str, Any], ...] = attrs.field(default=(), converter=_tools)


@attrs.frozen
class Labeled:
    """A prompt with one continuation and whether it is wanted."""

    prompt: tuple[Message, ...] = attrs.field(converter=_messages)
    completion: tuple[Message, ...] = attrs.field(converter=_messages)
    label: bool
    """True for a continuation that is wanted."""


@attrs.frozen
class Prompt:
    """A prompt alone, for methods that generate the continuation, with what a reward may read."""

    prompt: tuple[Message, ...] = attrs.field(converter=_messages)
    extra: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen
class Text:
    """Plain text, every token of which is learned."""

    text: str


Example: TypeAlias = Conversation | Preference | Labeled | Prompt | Text

EXAMPLE_TYPES: dict[str, type] = {
    "conversation": Conversation,
    "preference": Preference,
    "labeled": Labeled,
    "prompt": Prompt,
    "text": Text,
}
"""Example shapes by the name that a Spec uses for them."""


@attrs.frozen
class Sourced:
    """An example that remembers where it came from."""

    example: Example
    where: str
    """"train.json, row 12" or the like, for messages and for the list of dropped rows."""
