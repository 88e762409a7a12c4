"""The layout of databricks-dolly-15k: instruction, context, response, category.

https://huggingface.co/datasets/databricks/databricks-dolly-15k
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.data.examples import Conversation, Message
from tunesmith.errors import RowError
from tunesmith.plugin.formats import Format
from tunesmith.plugin.options import NoOptions

__all__ = ["Dolly"]

_FIELDS = ("instruction", "context", "response", "category")


class Dolly(Format[NoOptions]):
    """An instruction, the context it may refer to, and the response.

    The context stands below the instruction, a blank line between. The category says what kind of
    task it is and goes to no model.
    """

    def recognise(self, row: Mapping[str, Any]) -> int:
        """Return how many of the four fields there are, if the two that matter are."""
        if "instruction" not in row or "response" not in row:
            return 0
        return sum(field in row for field in _FIELDS)

    def convert(self, row: Mapping[str, Any]) -> Conversation:
        """Return the row as a question and its answer."""
        instruction = _text(row, "instruction")
        response = _text(row, "response")
        context = row.get("context")
        if context is not None and not isinstance(context, str):
            raise RowError("context", f"a {type(context).__name__}", "text, or nothing")
        question = f"{instruction}\n\n{context}" if context else instruction
        return Conversation((Message("user", question), Message("assistant", response)))


def _text(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if field not in row:
        raise RowError(field, "nothing", "text")
    if not isinstance(value, str):
        raise RowError(field, f"a {type(value).__name__}", "text")
    return value
