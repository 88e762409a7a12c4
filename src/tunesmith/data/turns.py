"""What a chat template writes for each turn of the assistant: which characters are trained.

Found by rendering: the conversation up to a turn, with the header of an answer, is what inference
gives the model; what the template writes beyond that, once the turn is there, is what the model
then has to write. See docs/adr/0015-what-is-trained.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from tunesmith.data.examples import Message
from tunesmith.data.template_forms import THOUGHTS, FormedTemplate
from tunesmith.data.token_borders import special_texts
from tunesmith.data.tool_calls import called
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Turn", "TurnReader"]

_OTHER_TEMPLATE = 'drop these rows, or pass chat_template="chatml" or the path of a .jinja template'
_OPENED = re.compile(r"<(think|thinking|thought|reasoning)>\s*\Z")
"""What a template leaves open for the model to think in, such as "<think>" and a new line."""


@attrs.frozen
class Turn:
    """A turn of the assistant as the last one: what it is given, and what it then writes."""

    message: Message
    prompt: str
    """What inference gives the model, up to and with the header of its answer."""
    answer: str
    """What the template writes after that."""
    end: int
    """Characters of `answer` up to the end of the turn; whitespace may follow."""
    body: int
    """Characters of `answer` up to the special tokens that end it; `end` where there are none."""
    opened: str = ""
    """The tag that the prompt leaves open for a thought, such as "<think>"."""

    @property
    def ended(self) -> bool:
        """Whether the template itself ends the turn with a special token."""
        return self.body < self.end

    def place(self, text: str, specials: Sequence[str]) -> int | None:
        """Return where this turn ends in a longer conversation; None if it is not all there.

        A template may write a turn in the middle in another way than a last one: without an empty
        thinking block, say, or without the end of text after its end. What counts is that it
        begins behind the same prompt, keeps all that is said, and closes with the same token.
        """
        start = len(self.prompt)
        if not text.startswith(self.prompt):
            return None
        if text.startswith(self.answer[: self.end], start):
            return start + self.end
        if not self.ended or not (self.message.content.strip() or called(self.message)):
            return None
        closing = self.answer[self.body : self.end].lstrip()
        stop = _first_special(closing, specials)
        body = self.answer[: self.body]
        at = text.find(stop, start)
        while at >= 0:
            stands = text[start:at].rstrip()
            if not body.endswith(stands):
                return None
            if not _lost(self.message, self.opened + stands):
                return at + _whole_specials(closing, text[at:], specials)
            at = text.find(stop, at + len(stop))
        return None


class TurnReader:
    """Reads the turns of a conversation off what a tokenizer's chat template writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._template = FormedTemplate(tokenizer)
        self.specials = special_texts(tokenizer)
        self._generation_prompt: str | None = None
        self._strips: bool | None = None
        self._shows_tools = False

    def text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        answer: bool = False,
    ) -> str:
        """Return what the chat template writes, with the header of an answer if `answer`."""
        return self._template.text(messages, tools, answer=answer)

    def turn(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], index: int
    ) -> Turn:
        """Return the assistant's turn at an index as if it were the last one.

        Errors: `DataError` where the template loses what the turn says, or writes it so that what
        inference gives the model does not stand before it.
        """
        message = messages[index]
        written = self.text(messages[: index + 1], tools)
        if index == 0:  # no template renders a conversation without messages
            answer = self._after_header(message, written)
            if answer is None:
                answer = written[self._content_start(messages[:1], tools, written) :]
            prompt = written[: len(written) - len(answer)]
        else:
            prompt = self.text(messages[:index], tools, answer=True)
            answer = self._answer(prompt, written, message, index)
        tag = _OPENED.search(prompt)
        opened = tag[0] if tag is not None else ""
        end, body = self._end(message, answer, opened)
        turn = Turn(message, prompt, answer, end, body, opened)
        _check_kept(turn, index)
        if index:
            self._check_header(messages[: index + 1], tools, turn)
        return turn

    def check_shown(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: str
    ) -> None:
        """Raise `DataError` if the template leaves out the tools, or a turn as a whole."""
        if tools and not self._shows_tools:
            if text == self.text(messages, ()):
                raise DataError(
                    "the data has tools, and the chat template does not show them to the model; "
                    'pass chat_template="chatml", which does, or take the tools out of the data'
                )
            self._shows_tools = True
        for index, message in enumerate(messages):
            if message.role != "assistant" and not _shown(message.content, text):
                raise DataError(
                    f"turn {index + 1}: the chat template leaves out this {message.role} turn "
                    f"(it says {message.content.strip()[:60]!r}); {_OTHER_TEMPLATE}"
                )

    def _answer(self, prompt: str, written: str, message: Message, index: int) -> str:
        """Return what follows the prompt in what is written with the answer."""
        if written.startswith(prompt):
            return written[len(prompt) :]
        common = _common_start(prompt, written)
        rest = written[common:]
        said = _without_space(message.content)
        if not prompt[common:].strip() and said and _without_space(rest).startswith(said):
            return rest  # a header that is written with less space once the answer is there
        opened = _OPENED.search(prompt)
        if opened is not None and written.startswith(prompt[: opened.start()]):
            return _thought(message, opened[1], written[opened.start() :])
        after = self._after_header(message, written) if prompt.endswith(self._header()) else None
        if after is None:
            raise DataError(
                f"turn {index + 1}: the chat template writes what stands before this assistant "
                "turn in another way once the turn is there, and the header of the answer as well, "
                f"so which tokens are the answer's cannot be told; {_OTHER_TEMPLATE}"
            )
        return after

    def _after_header(self, message: Message, written: str) -> str | None:
        """Return what is written of a last turn after the header of an answer, found from behind.

        For turns before which something changes once they are there, or nothing stands.
        """
        header = self._header()
        opened = _OPENED.search(header)
        at = written.rfind(header) if header.strip() else -1
        while at >= 0:
            rest = written[at + len(header) :]
            if not _lost(message, (opened[0] if opened else "") + rest):
                return rest
            at = written.rfind(header, 0, at)
        return None

    def _end(self, message: Message, answer: str, opened: str) -> tuple[int, int]:
        """Return where in an answer the turn ends, and where the special tokens that end it begin.

        What looks like a special token and belongs to what is said ends nothing.
        """
        end = len(answer.rstrip())
        body = end
        while special := _last_special(answer[:body], self.specials):
            before = len(answer[: body - len(special)].rstrip())
            if _lost(message, opened + answer[:before]):
                break
            body = before
        if body == end and message.content.strip() and not self._strips_content():
            # no token ends it, so whitespace at the end is what the answer says
            at = answer.rfind(message.content)
            end = body = max(end, at + len(message.content)) if at >= 0 else end
        return end, body

    def _check_header(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], turn: Turn
    ) -> None:
        """Raise if the model would have to write the header of its answer by itself."""
        header = self._header()
        if header.strip() and turn.prompt.endswith(header):
            return
        content = turn.message.content.strip()
        if not content or called(turn.message):
            return
        if turn.prompt != self.text(messages[:-1], tools):
            return
        written = turn.prompt + turn.answer
        start = self._content_start(messages, tools, written)
        header = written[len(turn.prompt) : start].strip()
        if header:
            raise DataError(
                f"turn {len(messages)}: the chat template has no generation prompt "
                "(add_generation_prompt changes nothing), so the model would have to write the "
                f'header {header!r} by itself; pass chat_template="chatml" or a template with one'
            )

    def _header(self) -> str:
        """Return what add_generation_prompt adds after a user's turn; "" if that cannot be told.

        A template may write something else, such as the end of the text, where it is not asked to.
        """
        if self._generation_prompt is None:
            probe = [Message("user", "a")]
            try:
                without, header = self.text(probe), self.text(probe, answer=True)
            except DataError:
                return ""
            self._generation_prompt = header[_common_start(without, header) :]
        return self._generation_prompt

    def _strips_content(self) -> bool:
        """Return whether the template takes away the white space at the end of a content."""
        if self._strips is None:
            said = "a \n \n"
            try:
                text = self.text([Message("user", "a"), Message("assistant", said)])
            except DataError:
                return False
            self._strips = said not in text
        return self._strips

    def _content_start(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: str
    ) -> int:
        """Return where the content of the last turn begins, found by another first letter."""
        content = messages[-1].content
        letter = "y" if content.lstrip()[:1] == "x" else "x"
        other = attrs.evolve(messages[-1], content=letter + content)
        return _common_start(text, self.text((*messages[:-1], other), tools))


def _thought(message: Message, tag: str, rest: str) -> str:
    """Return an answer behind an open tag, for a template that opens it and never writes thoughts.

    `rest` is what the template writes after the header without the tag.
    """
    before, closed, after = message.content.partition(f"</{tag}>")
    if closed:
        space = "" if rest[:1].isspace() else after[: len(after) - len(after.lstrip())]
        thought = before.lstrip().removeprefix(f"<{tag}>").lstrip("\n")
        return thought + closed + space + rest
    thoughts = [message.extra.get(key) for key in THOUGHTS]
    thought = next((text for text in thoughts if isinstance(text, str)), "").strip("\n")
    return f"{thought}\n</{tag}>\n\n" + rest


def _check_kept(turn: Turn, index: int) -> None:
    """Raise if the template leaves out anything that an assistant turn says."""
    written = turn.answer[: turn.end]
    lost = _lost(turn.message, turn.opened + written)
    if not lost:
        return
    if lost in called(turn.message):
        raise DataError(
            f"turn {index + 1}: the assistant calls the tool '{lost}', and the chat template does "
            'not write tool calls; pass chat_template="chatml", which does, or another template '
            "with tool_calls"
        )
    raise DataError(
        f"turn {index + 1}: the chat template leaves out or rewrites part of this assistant turn "
        f"(it says {lost.strip()[:60]!r}, the template writes {written.strip()[:60]!r}); "
        + _OTHER_TEMPLATE
    )


def _lost(message: Message, written: str) -> str:
    """Return the first thing that a message says and a text does not, or nothing."""
    said = _without_space(written)
    thoughts = [message.extra.get(key) for key in THOUGHTS]
    for part in (message.content, *thoughts):
        if isinstance(part, str) and _without_space(part) not in said:
            return part
    return next((name for name in called(message) if name not in written), "")


def _shown(content: str, text: str) -> bool:
    """Return whether a turn's beginning or end stands in a text, as it is or as JSON writes it."""
    content = content.strip()
    if content in text:
        return True
    written = _without_space(text)
    for form in (content, *(json.dumps(content, ensure_ascii=ascii) for ascii in (False, True))):
        letters = _without_space(form).strip('"')
        if letters[:24] in written or letters[-24:] in written:
            return True
    return False


def _whole_specials(one: str, other: str, specials: Sequence[str]) -> int:
    """Return how many characters of special tokens two texts begin with in common."""
    common = one[: _common_start(one, other)]
    while common and not _last_special(common, specials):
        common = common[:-1]
    return len(common)


def _first_special(text: str, specials: Sequence[str]) -> str:
    return next((special for special in specials if text.startswith(special)), text)


def _last_special(text: str, specials: Sequence[str]) -> str:
    return next((special for special in specials if text.endswith(special)), "")


def _common_start(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _without_space(text: str) -> str:
    return "".join(text.split())
