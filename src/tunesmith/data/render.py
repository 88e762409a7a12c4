"""Examples to token ids and labels: the one place where a token becomes trainable or not.

The ids before an answer are those that inference sees there: the prompt is tokenised by itself,
and the answer goes on from it, so no token stands across their border. What is trained follows
from where the answer lies, never from what an id is: the padding token is for many models the very
token that ends a turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from tunesmith.data.chat_template import CHATML, set_chat_template
from tunesmith.data.examples import Conversation, Message, Preference, Text
from tunesmith.data.token_borders import Bordered
from tunesmith.data.tool_calls import with_ids
from tunesmith.data.turns import Turn, TurnReader
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CHATML", "IGNORE_INDEX", "Rendered", "Renderer", "set_chat_template"]

IGNORE_INDEX = -100
"""Label of a token that is not trained; the value that torch's cross entropy leaves out."""


def _tokens(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(values)


@attrs.frozen
class Rendered:
    """Token ids with a label each: the id itself where it is trained, else `IGNORE_INDEX`."""

    input_ids: tuple[int, ...] = attrs.field(converter=_tokens)
    labels: tuple[int, ...] = attrs.field(converter=_tokens)
    truncated: bool = False
    """Whether trained tokens, the end of the last answer among them, were cut off at max_length."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained(self) -> int:
        """How many tokens are learned; the first one is not, as nothing predicts it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


class Renderer:
    """Renders examples with a tokenizer's chat template, at most `max_length` tokens each.

    Every assistant turn is trained up to and including the token that ends it, unless its message
    says otherwise; never a system, user or tool turn, the header that begins a turn, or the
    whitespace a template writes after its end. With `completion_only_loss=False` every token of a
    conversation is. Errors: `DataError` where a template makes it impossible to tell, or leaves out
    what a turn says.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        completion_only_loss: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.completion_only_loss = completion_only_loss
        self._tokens = Bordered(tokenizer)
        self._reader = TurnReader(tokenizer)

    def conversation(self, conversation: Conversation) -> Rendered:
        """Return a conversation up to its last trained turn, all in one sequence.

        Where the template does not end the last turn with a special token, the tokenizer's eos
        token is put there and trained: without it the model would never learn to stop. Errors:
        `DataError` where one sequence cannot hold every answer, as where the template strips the
        thoughts of earlier turns; `sequences` takes such a conversation.
        """
        whole = _Whole(self._reader, conversation.messages, conversation.tools)
        if not whole.trained:
            return self._untrained(whole)
        return self._joined(whole)

    def sequences(self, conversation: Conversation) -> list[Rendered]:
        """Return the fewest sequences that train every answer behind what inference puts there.

        One, as a rule. A turn gets a sequence of its own where later turns change how it stands:
        its thoughts are stripped, it closes with another token, a token stands across its border.
        """
        whole = _Whole(self._reader, conversation.messages, conversation.tools)
        if not whole.trained:
            return [self._untrained(whole)]
        if not self.completion_only_loss:
            return [self._joined(whole)]
        made: list[Rendered] = []
        remaining = list(whole.trained)
        while remaining:
            ids, labels, trained = self._exact(whole, remaining)
            made.append(self._cut(ids, labels))
            remaining = [index for index in remaining if index not in trained]
        return made[::-1]

    def completion(
        self,
        prompt: Sequence[Message],
        completion: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Rendered:
        """Return a prompt, ignored, with a continuation whose assistant turns are trained."""
        whole = _Whole(self._reader, (*prompt, *completion), tools, first=len(prompt))
        if not whole.trained:
            roles = ", ".join(message.role for message in completion) or "nothing"
            raise DataError(
                f"got a completion of {roles}; expected a turn of the assistant to train"
            )
        return self._joined(whole, everything=False)

    def preference(self, preference: Preference) -> tuple[Rendered, Rendered]:
        """Return chosen and rejected, each as the prompt, ignored, and its trained completion."""
        return (
            self.completion(preference.prompt, preference.chosen, preference.tools),
            self.completion(preference.prompt, preference.rejected, preference.tools),
        )

    def text(self, text: Text) -> Rendered:
        """Return plain text, every token trained, ended by the tokenizer's eos token if it has one.

        A beginning-of-sequence token is there if the tokenizer writes one, and once where the text
        begins with one as well.
        """
        ids: list[int] = list(self.tokenizer(text.text, verbose=False)["input_ids"])
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        eos = self.tokenizer.eos_token_id
        if eos is not None and (not ids or ids[-1] != eos):
            ids.append(eos)
        return self._cut(ids, ids)

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[int]:
        """Return the ids that the assistant's answer is to follow; never cut to max_length."""
        return self._tokens.ids(self._reader.text(with_ids(messages), tools, answer=True))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a turn: the tokenizer's eos token, and the template's own end if another."""
        probe = (Message("user", "a"), Message("assistant", "b"))
        _, labels, _ = self._exact(_Whole(self._reader, probe, ()), [1])
        trained = next(label for label in reversed(labels) if label != IGNORE_INDEX)
        eos = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys(i for i in (eos, trained) if i is not None))

    # --- which ids are trained --------------------------------------------------------------------

    def _exact(self, whole: _Whole, wanted: Sequence[int]) -> tuple[list[int], list[int], set[int]]:
        """Return the ids and labels of the last of the wanted turns, and which turns they train.

        Earlier ones are trained along where all of them stands there, between borders of tokens.
        """
        last = whole.turn(wanted[-1])
        text = last.prompt + last.answer
        whole.check_shown(wanted[-1], text)
        answer = last.answer[: self._stop(last)]
        given = self._tokens.text(last.prompt + answer)
        border = given.tokens_before(len(last.prompt))
        if border is None:
            head, rest = self._tokens.parted(last.prompt, answer)
            ids, border = [*head, *rest], len(head)
            given = self._tokens.text(last.prompt)
        else:
            ids = list(given.ids)
        labels = [IGNORE_INDEX] * border + ids[border:]
        if last.ended:
            self._ignore_after_end(labels)
        else:
            self._add_eos(ids, labels)
        trained = {wanted[-1]}
        for index in wanted[:-1]:
            turn = whole.turn(index)
            end = turn.place(last.prompt, self._reader.specials)
            if end is None:
                continue
            start, stop = given.tokens_before(len(turn.prompt)), given.tokens_before(end)
            if start is not None and stop is not None:
                labels[start:stop] = ids[start:stop]
                trained.add(index)
        return ids, labels, trained

    def _joined(self, whole: _Whole, *, everything: bool | None = None) -> Rendered:
        """Return one sequence that trains every turn, cut into tokens where each begins and ends.

        Exact where that can be; else the text is the same, and a token that inference would see
        across the border of an earlier turn is two.
        """
        if everything is None:
            everything = not self.completion_only_loss
        wanted = whole.trained[-1:] if everything else whole.trained
        ids, labels, trained = self._exact(whole, wanted)
        if everything:
            return self._cut(ids, self._all_but(whole, ids))
        if len(trained) < len(wanted):
            ids, labels = self._cut_at_borders(whole)
        return self._cut(ids, labels)

    def _cut_at_borders(self, whole: _Whole) -> tuple[list[int], list[int]]:
        last = whole.turn(whole.trained[-1])
        text = last.prompt + last.answer[: last.end]
        ids: list[int] = []
        labels: list[int] = []
        reached = 0
        for index in whole.trained:
            turn = whole.turn(index)
            start, end = len(turn.prompt), whole.place(turn, index, text)
            for stop, trains in ((start, False), (end, True)):
                _, more = self._tokens.parted(text[:reached], text[reached:stop])
                ids += more
                labels += more if trains else [IGNORE_INDEX] * len(more)
                reached = stop
        if not last.ended:
            self._add_eos(ids, labels)
        return ids, labels

    def _all_but(self, whole: _Whole, ids: Sequence[int]) -> list[int]:
        """Return the ids as labels, but for the turns that are shown and not trained."""
        labels = list(ids)
        last = whole.turn(whole.trained[-1])
        text = last.prompt + last.answer
        for index, message in enumerate(whole.messages[: whole.trained[-1]]):
            if message.role == "assistant" and not message.trained:
                turn = whole.turn(index)
                end = whole.place(turn, index, text)
                start, stop = len(self._tokens.ids(turn.prompt)), len(self._tokens.ids(text[:end]))
                labels[start:stop] = [IGNORE_INDEX] * (stop - start)
        return labels

    def _untrained(self, whole: _Whole) -> Rendered:
        ids = self._tokens.ids(self._reader.text(whole.messages, whole.tools))
        everything = not (self.completion_only_loss or whole.has_assistant)
        return self._cut(ids, ids if everything else [IGNORE_INDEX] * len(ids))

    def _stop(self, turn: Turn) -> int:
        """Return how much of an answer is tokenised; eos takes the place of the rest."""
        return len(turn.answer) if turn.ended else turn.end

    def _ignore_after_end(self, labels: list[int]) -> None:
        """Untrain what follows the last special token: the whitespace after the end of a turn."""
        at = len(labels) - 1
        while labels[at] != IGNORE_INDEX and labels[at] not in self._tokens.special_ids:
            labels[at] = IGNORE_INDEX
            at -= 1

    def _add_eos(self, ids: list[int], labels: list[int]) -> None:
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise DataError(
                "the chat template does not end the assistant's turn with a special token, and the "
                "tokenizer has no eos_token to put there; set tokenizer.eos_token, or pass a "
                "chat_template that writes an end"
            )
        ids.append(eos)
        labels.append(eos)

    def _cut(self, ids: Sequence[int], labels: Sequence[int]) -> Rendered:
        limit = self.max_length
        lost = any(label != IGNORE_INDEX for label in labels[limit:])
        return Rendered(ids[:limit], labels[:limit], truncated=lost)


class _Whole:
    """A conversation up to the last turn that is trained, and its turns, each read once."""

    def __init__(
        self,
        reader: TurnReader,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        first: int = 0,
    ) -> None:
        self.has_assistant = any(message.role == "assistant" for message in messages[first:])
        self.trained = [
            index
            for index, message in enumerate(messages)
            if index >= first and message.role == "assistant" and message.trained
        ]
        every = with_ids(messages)
        self.messages = every[: self.trained[-1] + 1] if self.trained else every
        self.tools = tools
        self._reader = reader
        self._turns: dict[int, Turn] = {}

    def turn(self, index: int) -> Turn:
        """Return the turn at an index as if it were the last one."""
        if index not in self._turns:
            self._turns[index] = self._reader.turn(self.messages, self.tools, index)
        return self._turns[index]

    def place(self, turn: Turn, index: int, text: str) -> int:
        """Return where a turn ends in a longer text; `DataError` if it is not all there."""
        end = turn.place(text, self._reader.specials)
        if end is None:
            raise DataError(
                f"turn {index + 1}: the chat template writes this assistant turn in another way "
                "once a further turn follows (some strip the thinking of earlier turns), so one "
                "sequence cannot train it; end the row with this turn, or pass "
                'chat_template="chatml" or the path of a .jinja template'
            )
        return end

    def check_shown(self, index: int, text: str) -> None:
        """Raise if the template leaves out a turn before an index, or the tools."""
        self._reader.check_shown(self.messages[: index + 1], self.tools, text)
