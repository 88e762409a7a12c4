"""Reading single fields of a row, with errors that name what stood there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tunesmith.data.sources import JsonError, parse_json
from tunesmith.errors import RowError

__all__ = ["NOTHING", "count", "from_json", "got", "no_label", "text", "without_nulls"]

NOTHING = object()
"""What stands in a field that is not there."""

_LABELS = ("label", "kto_tag")


def count(row: Mapping[str, Any], required: Iterable[str], optional: Iterable[str]) -> int:
    """Return how many fields of a row are among the named ones; 0 unless all required are there."""
    needed = set(required)
    if not needed <= row.keys():
        return 0
    return len(row.keys() & (needed | set(optional)))


def got(value: Any) -> str:
    """Return what stood in a field, as a person would say it."""
    if value is NOTHING:
        return "nothing"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"a number ({value})"
    if isinstance(value, str):
        return f"the text {value[:40]!r}" if value.strip() else "blank text"
    if isinstance(value, Mapping):
        keys = ", ".join(map(str, value))
        return f"an object with the keys {keys}" if value else "an empty object"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes that are no text"
    if isinstance(value, Sequence):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"a {type(value).__name__}"


def text(row: Mapping[str, Any], field: str, *, optional: bool = False) -> str:
    """Return the text in a field; "" for an optional one that is not there or null."""
    value = row.get(field, NOTHING)
    if isinstance(value, str):
        return value
    if optional and (value is None or value is NOTHING):
        return ""
    raise RowError(field, got(value), "text")


def from_json(value: str, field: str, expected: str) -> Any:
    """Return the value that a JSON text spells, also where it was encoded more than once."""
    found: Any = value
    while isinstance(found, str):
        try:
            found = parse_json(found)
        except JsonError as error:
            if error.position is None:
                problem = f"JSON beyond what can be read ({error})"
            else:
                column = error.position - found.rfind("\n", 0, error.position)
                problem = f"text that is not JSON ({error.problem} at column {column})"
            raise RowError(field, problem, expected) from error
    return found


def without_nulls(value: Any, *, keep: Iterable[str] = ()) -> Any:
    """Return a value without the keys, at any depth, that hold null; those in `keep` stay."""
    kept = frozenset(keep)
    if isinstance(value, Mapping):
        return {
            key: without_nulls(item, keep=kept)
            for key, item in value.items()
            if item is not None or key in kept
        }
    if isinstance(value, (list, tuple)):
        return [without_nulls(item, keep=kept) for item in value]
    return value


def no_label(row: Mapping[str, Any]) -> None:
    """Raise for a row that says whether its answer is wanted: it would be learned either way."""
    for field in _LABELS:
        value = row.get(field)
        if isinstance(value, bool) or str(value).lower() in ("true", "false"):
            raise RowError(
                field,
                got(value),
                "no such field: it marks wanted and unwanted answers, as KTO has them, and both "
                "would be learned; keep the wanted rows and leave the field out",
            )
