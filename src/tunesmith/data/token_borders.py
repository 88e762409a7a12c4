"""Text to ids, cut where an answer begins and ends: no token stands across such a border.

Inference tokenises the prompt by itself. Tokenised together with the answer, the last space or
line break of a header may merge with the first letters of what follows.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Bordered", "BorderedText", "special_texts"]

_REMEMBERED = 4096
"""Stretches between a special token and a border that are remembered; most are headers."""


def special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the texts of a tokenizer's special tokens, the longest first."""
    added: Mapping[int, Any] = tokenizer.added_tokens_decoder
    texts = {*tokenizer.all_special_tokens, *(str(t) for t in added.values() if t.special)}
    return tuple(sorted(filter(None, texts), key=lambda text: (-len(text), text)))


class Bordered:
    """A tokenizer that tells how many tokens lie before a place in a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.specials = special_texts(tokenizer)
        added: Mapping[int, Any] = tokenizer.added_tokens_decoder
        self.special_ids = {
            *tokenizer.all_special_ids,
            *(i for i, token in added.items() if token.special),
        }
        self.special = re.compile("|".join(map(re.escape, self.specials)) or r"(?!)")
        self._stretches: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text in which a chat template has written what begins a sequence."""
        encoding = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoding["input_ids"])

    def text(self, text: str) -> BorderedText:
        """Return a text with its ids."""
        return BorderedText(self, text)

    def stretch(self, text: str) -> list[int]:
        """Return the ids of a short text that is likely to come again."""
        known = self._stretches.get(text)
        if known is None:
            known = self.ids(text)
            if len(self._stretches) < _REMEMBERED:
                self._stretches[text] = known
        return known

    def parted(self, before: str, more: str) -> tuple[list[int], list[int]]:
        """Return the ids of a text, and those that go on from it with more text.

        Both together spell the whole (but for white space, with a tokenizer that does not keep it).
        Where a token of the whole stands across the border, `more` is tokenised after something
        that it does not merge with.
        """
        whole = self.text(before + more)
        at = whole.tokens_before(len(before))
        if at is not None:
            return whole.ids[:at], whole.ids[at:]
        head = self.ids(before)
        spelled = self._spelled(whole.ids)
        near: list[int] | None = None
        for anchor in ("", "\n", *self.specials[:2], "a", "."):
            begun, both = self.ids(anchor), self.ids(anchor + more)
            if both[: len(begun)] != begun:
                continue
            rest = both[len(begun) :]
            if self._spelled([*head, *rest]) == spelled:
                return head, rest
            if near is None and _letters(self._spelled(rest)) == _letters(more):
                near = rest
        if near is not None:
            return head, near
        raise DataError(
            f"the tokenizer cannot write {more[:40]!r} after {before[-40:]!r} but by a token that "
            "belongs to both, so the answer cannot be told from what stands before it; "
            'pass chat_template="chatml" or another template'
        )

    def _spelled(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text


class BorderedText:
    """A text and its ids."""

    def __init__(self, tokenizer: Bordered, text: str) -> None:
        self.ids = tokenizer.ids(text)
        self._tokenizer = tokenizer
        self._text = text
        self._found = [match.span() for match in tokenizer.special.finditer(text)]
        self._ends = [end for _, end in self._found]
        self._places = [i for i, id in enumerate(self.ids) if id in tokenizer.special_ids]

    def tokens_before(self, at: int) -> int | None:
        """Return how many tokens the text up to a place has by itself.

        None if they are not those that the whole text begins with: a token stands across.
        """
        number = bisect_right(self._ends, at)
        # what stands before a special token is tokenised without regard to what comes after it
        if number and len(self._places) == len(self._found):
            start = self._found[number - 1][0]
            place = self._places[number - 1]
            here = self._tokenizer.stretch(self._text[start:at])
            if here[:1] == [self.ids[place]]:
                return place + len(here) if self.ids[place : place + len(here)] == here else None
        before = self._tokenizer.ids(self._text[:at])
        return len(before) if self.ids[: len(before)] == before else None


def _letters(text: str) -> str:
    return "".join(text.split())
