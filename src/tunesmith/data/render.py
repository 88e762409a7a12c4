"""Examples to token ids and labels: the one place where a token becomes trainable or not.

What is trained follows from characters, not from ids: the chat template writes the whole
conversation once, that text is tokenised once (so the ids are those that inference sees), and a
token is trained if it lies in the span of an assistant turn. No id is ever compared with the
padding token, which for many models is the very token that ends a turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

from tunesmith.data import templates
from tunesmith.data.chat_template import CHATML, needs_template, set_chat_template
from tunesmith.data.examples import Conversation, Message, Preference, Text
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHATML", "IGNORE_INDEX", "Rendered", "Renderer", "set_chat_template"]

IGNORE_INDEX = -100
"""Label of a token that is not trained; the value that torch's cross entropy leaves out."""

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_OTHER_TEMPLATE = 'drop these rows, or pass chat_template="chatml" or the path of a .jinja template'

Span: TypeAlias = tuple[int, int]
"""Start and end of a stretch of the rendered text, in characters."""


def _tokens(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(values)


class _NoSpanError(DataError):
    """Where an assistant turn stands in the rendered text cannot be told."""


@attrs.frozen
class Rendered:
    """Token ids with a label each: the id itself where it is trained, else `IGNORE_INDEX`."""

    input_ids: tuple[int, ...] = attrs.field(converter=_tokens)
    labels: tuple[int, ...] = attrs.field(converter=_tokens)
    truncated: bool = False
    """Whether tokens were cut off at the end to fit max_length."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained(self) -> int:
        """How many tokens are learned; the first one is not, as nothing predicts it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


class Renderer:
    """Renders examples with a tokenizer's chat template, at most `max_length` tokens each.

    Every assistant turn is trained up to and including the token that ends it; never a system,
    user or tool turn, the header that begins a turn, or the whitespace a template writes after its
    end. With `completion_only_loss=False` every token of a conversation is. Errors: `DataError`
    where a template makes it impossible to tell, or leaves out what a turn says.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        completion_only_loss: bool = True,
    ) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"got the tokenizer {type(tokenizer).__name__}, which does not tell which "
                "characters a token stands for; a fast tokenizer (one with a tokenizer.json) is "
                "needed; save the model's tokenizer with `AutoTokenizer` and use_fast=True"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.completion_only_loss = completion_only_loss
        added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        self._special = {*tokenizer.all_special_ids, *(i for i, t in added.items() if t.special)}
        self._special_texts = {str(added[i]) for i in self._special if i in added}
        self._shows_tools = False

    def conversation(self, conversation: Conversation) -> Rendered:
        """Return a conversation up to its last assistant turn; what follows teaches nothing.

        Where the template does not end the last turn with a special token, the tokenizer's eos
        token is put there and trained: without it the model would never learn to stop.
        """
        last = _last_assistant(conversation.messages)
        if last is None:
            ids = self._ids(self._text(conversation.messages, conversation.tools))
            labels = [IGNORE_INDEX] * len(ids) if self.completion_only_loss else ids
            return self._cut(ids, labels)
        messages = conversation.messages[: last + 1]
        everything = not self.completion_only_loss
        return self._render(messages, conversation.tools, 0, everything=everything)

    def completion(
        self,
        prompt: Sequence[Message],
        completion: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Rendered:
        """Return a prompt, ignored, with a continuation whose assistant turns are trained."""
        last = _last_assistant(completion)
        if last is None:
            roles = ", ".join(message.role for message in completion) or "nothing"
            raise DataError(f"got a completion of {roles}; expected a turn of the assistant")
        messages = (*prompt, *completion[: last + 1])
        return self._render(messages, tools, len(prompt), everything=False)

    def preference(self, preference: Preference) -> tuple[Rendered, Rendered]:
        """Return chosen and rejected, each as the prompt, ignored, and its trained completion."""
        return (
            self.completion(preference.prompt, preference.chosen, preference.tools),
            self.completion(preference.prompt, preference.rejected, preference.tools),
        )

    def text(self, text: Text) -> Rendered:
        """Return plain text, every token trained, ended by the tokenizer's eos token if it has one.

        A beginning-of-sequence token is there if the tokenizer writes one.
        """
        ids: list[int] = list(self.tokenizer(text.text, verbose=False)["input_ids"])
        eos = self.tokenizer.eos_token_id
        if eos is not None and (not ids or ids[-1] != eos):
            ids.append(eos)
        return self._cut(ids, ids)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Return the ids that the assistant's answer is to follow; never cut to max_length."""
        return self._ids(self._text(messages, tools, answer=True))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a turn: the tokenizer's eos token, and the template's own end if another."""
        probe = (Message("user", "a"), Message("assistant", "b"))
        last = self._render(probe, (), 0, everything=False, cut=False).labels[-1::-1]
        trained = next(label for label in last if label != IGNORE_INDEX)
        eos = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys(i for i in (eos, trained) if i is not None))

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        first: int,
        *,
        everything: bool,
        cut: bool = True,
    ) -> Rendered:
        """Render messages that end with an assistant turn; train those from `first` on."""
        text = self._text(messages, tools)
        self._check_tools(messages, tools, text)
        spans = self._spans(messages, tools, text, first)
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids: list[int] = list(encoding["input_ids"])
        starts = _token_starts(encoding["offset_mapping"])
        labels = [
            token if everything or any(start <= at < end for start, end in spans) else IGNORE_INDEX
            for token, at in zip(ids, starts, strict=True)
        ]
        final = sum(at < spans[-1][1] for at in starts)  # tokens up to the end of the last turn
        if not final or ids[final - 1] not in self._special:
            eos = self.tokenizer.eos_token_id
            if eos is None:
                raise DataError(
                    "the chat template does not end the assistant's turn with a special token, "
                    "and the tokenizer has no eos_token to put there; set tokenizer.eos_token, or "
                    "pass a chat_template that writes an end"
                )
            ids = [*ids[:final], eos]
            labels = [*labels[:final], eos]
        return self._cut(ids, labels) if cut else Rendered(ids, labels)

    def _cut(self, ids: Sequence[int], labels: Sequence[int]) -> Rendered:
        limit = self.max_length
        return Rendered(ids[:limit], labels[:limit], truncated=len(ids) > limit)

    def _ids(self, text: str) -> list[int]:
        # the template writes the beginning-of-sequence token itself
        encoding = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoding["input_ids"])

    def _text(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        *,
        answer: bool = False,
    ) -> str:
        """Return what the chat template writes, with the header of an answer if `answer`."""
        needs_template(self.tokenizer)
        written = [message.to_dict() for message in messages]
        return templates.render(self.tokenizer, written, tools, answer=answer)

    # --- which characters are trained -------------------------------------------------------------

    def _spans(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        text: str,
        first: int,
    ) -> list[Span]:
        """Return the spans to train, in order; the last one ends with the last turn."""
        needs_template(self.tokenizer)
        template = self.tokenizer.get_chat_template(None, [dict(tool) for tool in tools] or None)
        if not _GENERATION_BLOCK.search(template):
            return self._turn_spans(messages, tools, text, first)
        marked = self._marked_spans(messages, tools, template)
        try:
            turns = self._turn_spans(messages, tools, text, first)
        except _NoSpanError:
            spans = self._trimmed(marked, messages, tools, text, first)
        else:
            spans = [span for turn in turns for span in self._within(marked, turn, text)]
        if not spans:
            raise DataError(
                "the chat template has {% generation %} but marks nothing of the assistant's "
                "turns with it, so there is nothing to train; mend the template, or pass "
                'chat_template="chatml"'
            )
        return spans

    def _turn_spans(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        text: str,
        first: int,
    ) -> list[Span]:
        """Return the span of each assistant turn from `first` on, found by rendering prefixes."""
        spans: list[Span] = []
        for index in range(first, len(messages)):
            if messages[index].role != "assistant":
                continue
            start = self._start(messages, tools, text, index)
            end = self._end(messages, tools, text, index, start)
            if end < start:
                raise _NoSpanError(
                    f"turn {index + 1}: the chat template writes nothing for this assistant turn; "
                    + _OTHER_TEMPLATE
                )
            self._check_kept(messages[index], index, text[start:end])
            spans.append((start, end))
        return spans

    def _start(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        text: str,
        index: int,
    ) -> int:
        """Return where an assistant turn begins: after what inference gives the model to answer."""
        if index == 0:  # no template renders a conversation without messages
            return self._content_start(messages, tools, text, index)
        before = self._text(messages[:index], tools, answer=True)
        if not text.startswith(before):
            raise _NoSpanError(
                f"turn {index + 1}: the chat template writes what stands before this assistant "
                "turn in another way once the turn is there (some put a thinking header before an "
                "answer and strip it afterwards), so which tokens are the answer's cannot be told; "
                + _OTHER_TEMPLATE
            )
        if before == self._text(messages[:index], tools):
            header = text[len(before) : self._content_start(messages, tools, text, index)].strip()
            if header:
                raise _NoSpanError(
                    f"turn {index + 1}: the chat template has no generation prompt "
                    f"(add_generation_prompt changes nothing), so the model would have to write "
                    f'the header {header!r} by itself; pass chat_template="chatml" or a '
                    "template with one"
                )
        return len(before)

    def _end(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        text: str,
        index: int,
        start: int,
    ) -> int:
        """Return where an assistant turn ends, its end token included and no space after it."""
        after = text if index == len(messages) - 1 else self._text(messages[: index + 1], tools)
        if text.startswith(after):
            return len(after.rstrip())
        # Some templates write a last turn in another way than one in the middle (an empty thinking
        # block, say). Its end is still found by what closes it, if that stands there just once.
        message = messages[index]
        longer = attrs.evolve(message, content=message.content + _other(message.content[-1:]))
        closing = _common_end(after, self._text((*messages[:index], longer), tools)).rstrip()
        region = text[start : self._content_start(messages, tools, text, index + 1)]
        if not closing or region.count(closing) != 1:
            raise _NoSpanError(
                f"turn {index + 1}: the chat template writes this assistant turn in another way "
                "once a further turn follows, so where it ends cannot be told; " + _OTHER_TEMPLATE
            )
        return start + region.index(closing) + len(closing)

    def _content_start(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        text: str,
        index: int,
    ) -> int:
        """Return where the content of a turn begins, found by beginning it with another letter."""
        content = messages[index].content
        other = attrs.evolve(messages[index], content=_other(content.lstrip()[:1]) + content)
        changed = self._text((*messages[:index], other, *messages[index + 1 :]), tools)
        return _common_start(text, changed)

    def _marked_spans(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], template: str
    ) -> list[Span]:
        """Return the spans that the template marks with {% generation %}.

        Taken as characters: transformers' own mask of tokens trains all that follows where a marked
        span ends in whitespace and the tokenizer trims its offsets.
        """
        written = [message.to_dict() for message in messages]
        return templates.render_marked(self.tokenizer, written, tools, template)

    def _within(self, marked: Iterable[Span], turn: Span, text: str) -> list[Span]:
        """Return the marked spans cut to one turn, with the token that ends the turn."""
        inside = [
            (max(start, turn[0]), min(end, turn[1]))
            for start, end in marked
            if start < turn[1] and end > turn[0]
        ]
        if inside and text[inside[-1][1] : turn[1]].strip() in self._special_texts:
            inside[-1] = (inside[-1][0], turn[1])
        return inside

    def _trimmed(
        self,
        marked: Iterable[Span],
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        text: str,
        first: int,
    ) -> list[Span]:
        """Return the marked spans from `first` on, where the span of a turn is not known."""
        begin = 0
        if first:
            before = self._text(messages[:first], tools, answer=True)
            if not text.startswith(before):
                raise DataError(
                    "the chat template writes the prompt in another way once the answer is there, "
                    "so which tokens are the answer's cannot be told; " + _OTHER_TEMPLATE
                )
            begin = len(before)
        eos = self.tokenizer.eos_token or ""
        spans: list[Span] = []
        for start, end in marked:
            stop = len(text[:end].rstrip())
            if eos and text.startswith(eos, end):
                stop = end + len(eos)
            if max(start, begin) < stop:
                spans.append((max(start, begin), stop))
        return spans

    # --- what a template must not lose ------------------------------------------------------------

    def _check_tools(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], text: str
    ) -> None:
        if tools and not self._shows_tools:
            if text == self._text(messages, ()):
                raise DataError(
                    "the data has tools, and the chat template does not show them to the model; "
                    'pass chat_template="chatml", which does, or take the tools out of the data'
                )
            self._shows_tools = True

    def _check_kept(self, message: Message, index: int, written: str) -> None:
        """Raise if the template leaves out anything that an assistant turn says."""
        said = _without_space(written)
        thoughts = [message.extra.get(key) for key in _REASONING]
        for part in (message.content, *thoughts):
            if isinstance(part, str) and _without_space(part) not in said:
                raise DataError(
                    f"turn {index + 1}: the chat template leaves out or rewrites part of this "
                    f"assistant turn (it says {part.strip()[:60]!r}, the template writes "
                    f"{written.strip()[:60]!r}; some strip the thinking of earlier turns); "
                    + _OTHER_TEMPLATE
                )
        for name in _called(message):
            if name not in written:
                raise DataError(
                    f"turn {index + 1}: the assistant calls the tool '{name}', and the chat "
                    'template does not write tool calls; pass chat_template="chatml", which does, '
                    "or another template with tool_calls"
                )


def _token_starts(offsets: Sequence[Span]) -> list[int]:
    """Return the character at which each token begins.

    A tokenizer that trims its offsets gives whitespace no width and puts it at its end, which is
    where the next turn begins; such a token begins where the one before it ended.
    """
    starts: list[int] = []
    reached = 0
    for start, end in offsets:
        starts.append(min(start, reached) if start == end else start)
        reached = max(reached, end)
    return starts


def _last_assistant(messages: Sequence[Message]) -> int | None:
    indices = [index for index, message in enumerate(messages) if message.role == "assistant"]
    return indices[-1] if indices else None


def _called(message: Message) -> list[str]:
    """Return the names of the tools that a message calls."""
    names: list[str] = []
    for call in message.extra.get("tool_calls") or ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            names.append(function["name"])
    return names


def _other(character: str) -> str:
    """Return a letter that is not this one."""
    return "y" if character == "x" else "x"


def _common_start(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _common_end(one: str, other: str) -> str:
    """Return what two texts have in common at their end."""
    return one[len(one) - _common_start(one[::-1], other[::-1]) :]


def _without_space(text: str) -> str:
    return "".join(text.split())
