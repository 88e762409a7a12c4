"""What stands in a place, as a person would say it; the words of errors about data."""

from __future__ import annotations

from typing import Any

__all__ = ["SHOWN_CHARACTERS", "kind_of", "shortened"]

SHOWN_CHARACTERS = 120


def kind_of(value: Any) -> str:
    """Return what a value is, as a person would say it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"a number ({shortened(number(value))})"
    if isinstance(value, str):
        return f"text ({shortened(value)[:40]!r})"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"a {type(value).__name__}"


def number(value: int | float) -> str:
    """Return a number's digits, or how many bits it has where Python refuses to write it."""
    try:
        return str(value)
    except ValueError:
        return f"{int(value).bit_length()} bits"


def shortened(line: str) -> str:
    """Return a line without blanks around it, cut to what fits into a message."""
    line = line[: 4 * SHOWN_CHARACTERS].strip()
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 3] + "..."
