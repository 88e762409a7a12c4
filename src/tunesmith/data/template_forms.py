"""A chat template, given calls and thoughts in the form that it takes.

Data names things as the API did that it comes from, and templates read what their authors had in
mind: ids of nine letters, arguments as text, thoughts under one key of three. What a template takes
is found out by trying it on a short conversation, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from tunesmith.data import templates
from tunesmith.data.chat_template import needs_template
from tunesmith.data.examples import Message
from tunesmith.data.tool_calls import FORMS, has_calls
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["THOUGHTS", "FormedTemplate"]

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which a message may have the assistant's thought."""

_ASKED = Message("user", "a")
_MARK = "f_zq"


class FormedTemplate:
    """Renders messages with a tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._form: int | None = None
        self._thoughts: tuple[str, ...] | None = None

    def text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        answer: bool = False,
    ) -> str:
        """Return what the chat template writes, with the header of an answer if `answer`.

        Errors: `DataError` for what the template raises, in every form that calls can be given in.
        """
        if any(key in message.extra for message in messages for key in THOUGHTS):
            messages = self._with_thoughts(messages)
        if not has_calls(messages):
            return self.written(messages, tools, answer=answer)
        if self._form is None:
            self._form = self._form_of_calls()
        try:
            return self.written(FORMS[self._form](messages), tools, answer=answer)
        except DataError:
            for number, form in enumerate(FORMS):
                try:
                    text = self.written(form(messages), tools, answer=answer)
                except DataError:
                    continue
                self._form = number
                return text
            raise

    def written(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        answer: bool = False,
    ) -> str:
        """Return what the template writes of messages as they are; the one place that runs it."""
        needs_template(self.tokenizer)
        given = [message.to_dict() for message in messages]
        return templates.render(self.tokenizer, given, tools, answer=answer)

    def _form_of_calls(self) -> int:
        """Return the number of the first form in which the template writes all of a call.

        Some refuse ids of another form than theirs, some write an id that has to have the name in
        it, and some write arguments that are no text as Python prints them.
        """
        call = {"name": _MARK, "arguments": {"zq": True}}
        made = {"id": "call_0123456789", "type": "function", "function": call}
        asks = [_ASKED, Message("assistant", "", {"tool_calls": [made]})]
        result = Message("tool", "b", {"tool_call_id": "call_0123456789", "name": _MARK})
        for probe in ([*asks, result], asks):
            for number, form in enumerate(FORMS):
                try:
                    text = self.written(form(probe))
                except DataError:
                    continue
                if _MARK in text and str(call["arguments"]) not in text:
                    return number
        return 0

    def _with_thoughts(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages with thoughts under a key that the template reads, if it does any."""
        if self._thoughts is None:
            self._thoughts = tuple(key for key in THOUGHTS if self._reads(key))
        return [_renamed(message, self._thoughts) for message in messages]

    def _reads(self, key: str) -> bool:
        try:
            return _MARK in self.written([_ASKED, Message("assistant", "b", {key: _MARK})])
        except DataError:
            return False


def _renamed(message: Message, read: Sequence[str]) -> Message:
    own = [key for key in THOUGHTS if key in message.extra]
    if not own or not read or any(key in read for key in own):
        return message
    others = {key: item for key, item in message.extra.items() if key != own[0]}
    return attrs.evolve(message, extra={**others, read[0]: message.extra[own[0]]})
