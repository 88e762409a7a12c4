"""Exact match: whether an answer is the one that a column of the row holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import attrs

from tunesmith.data.examples import Prompt
from tunesmith.errors import DataError, listed
from tunesmith.plugin.rewards import Reward

__all__ = ["ExactMatch", "ExactMatchConfig"]


def _is_pattern(instance: Any, attribute: Any, value: str | None) -> None:
    if value is None:
        return
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"got {value!r}; expected a regular expression ({error})") from error


@attrs.frozen(kw_only=True)
class ExactMatchConfig:
    """Options of the reward exact_match."""

    column: str = "answer"
    """Column of the rows that holds the right answer."""
    pattern: str | None = attrs.field(default=None, validator=_is_pattern)
    """Regular expression that finds the answer in a completion: its first group, or all of it, of
    the last match; unset compares the whole completion."""


class ExactMatch(Reward[ExactMatchConfig]):
    """Gives 1 to an answer that is equal but for white space around it, 0 to any other.

    A completion in which the pattern finds nothing gets 0; one whose row has no answer, None.
    """

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        ids: Sequence[Sequence[int]],
    ) -> Sequence[float | None]:
        """Return 1.0, 0.0 or None for each completion; `DataError` if no row has the column."""
        column = self.config.column
        if prompts and not any(column in prompt.extra for prompt in prompts):
            known = {name for prompt in prompts for name in prompt.extra}
            raise DataError(
                f"exact_match: no row has the column '{column}'; they have: {listed(known)}; name "
                "the one that holds the answer: column=..."
            )
        return [
            self._score(prompt.extra.get(column), completion)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def _score(self, answer: Any, completion: str) -> float | None:
        if answer is None:
            return None
        said: str | None = completion
        if self.config.pattern is not None:
            said = None
            for match in re.finditer(self.config.pattern, completion):
                said = match.group(1) if match.re.groups else match.group()
        return float(said is not None and said.strip() == str(answer).strip())
