"""Questions about a passage: rows of question, context and answers, as SQuAD has them.

https://huggingface.co/datasets/rajpurkar/squad (Rajpurkar et al. 2016, arXiv:1606.05250)
"""

import attrs

from tunesmith.data.examples import Conversation, Message
from tunesmith.errors import RowError
from tunesmith.plugin import Spec, hookimpl
from tunesmith.plugin.formats import Format

FIELDS = ("question", "context", "answers")


@attrs.frozen(kw_only=True)
class NewNameConfig:
    """Options of the format newname."""

    context: bool = True
    """Put the passage before its question; false asks without it."""


class NewName(Format[NewNameConfig]):
    """A passage, a question about it, and the first of its answers."""

    def recognise(self, row):
        """Return how many of a row's fields are known here; 0 for a row of another kind."""
        if "question" not in row or "answers" not in row:
            return 0
        return sum(field in row for field in FIELDS)

    def convert(self, row):
        """Return the row as a question and its answer."""
        question = _text(row, "question")
        if self.config.context and row.get("context") is not None:
            question = f"{_text(row, 'context')}\n\n{question}"
        answers = row.get("answers")
        texts = answers.get("text") if isinstance(answers, dict) else None
        if not isinstance(texts, list) or not texts or not isinstance(texts[0], str):
            raise RowError("answers", repr(answers)[:60], 'a mapping with texts under "text"')
        return Conversation((Message("user", question), Message("assistant", texts[0])))


def _text(row, field):
    value = row.get(field)
    if not isinstance(value, str):
        raise RowError(field, repr(value)[:60], "text")
    return value


@hookimpl
def tunesmith_formats():
    """Register the format."""
    return [
        Spec(
            "newname",
            NewNameConfig,
            f"{__name__}:NewName",
            summary="question, context, answers",
        )
    ]
