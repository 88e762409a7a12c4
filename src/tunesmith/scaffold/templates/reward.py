"""How far the words of an answer are those of the right one: F1, as SQuAD counts it
(Rajpurkar et al. 2016, arXiv:1606.05250).
"""

from collections import Counter

import attrs

from tunesmith.errors import DataError
from tunesmith.plugin import Spec, hookimpl
from tunesmith.plugin.rewards import Reward


@attrs.frozen(kw_only=True)
class NewNameConfig:
    """Options of the reward newname."""

    column: str = "answer"
    """Column of the rows that holds the right answer."""


class NewName(Reward[NewNameConfig]):
    """2 P R / (P + R): P the share of its words that are right, R of the right ones it has."""

    def score(self, prompts, completions, ids):
        """Return a number from 0 to 1 for each completion; None where there is no right answer."""
        return [
            _f1(text, self._right(prompt))
            for prompt, text in zip(prompts, completions, strict=True)
        ]

    def _right(self, prompt):
        column = self.config.column
        if column not in prompt.extra:
            raise DataError(
                f"newname: a row has no column '{column}'; it has: "
                f"{', '.join(prompt.extra) or 'none'}; name another one by column="
            )
        return prompt.extra[column]


def _f1(said, right):
    if right is None:
        return None
    ours, theirs = Counter(said.lower().split()), Counter(str(right).lower().split())
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


@hookimpl
def tunesmith_rewards():
    """Register the reward."""
    return [
        Spec(
            "newname",
            NewNameConfig,
            f"{__name__}:NewName",
            summary="F1 over words",
        )
    ]
