"""JSON as its standard has it, within bounds: what Python reads beyond that is told, not taken.

Python's reader keeps the last of two equal keys, takes NaN, makes half a character of an escape and
infinity of 1e999, and ends in errors of its own on a number of 5,000 digits or a nesting of 1,000.
Each is a `JsonError` here, with the field it stands in. The speed is the C reader's: the costly
looks are taken only at a text that gives reason to.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

__all__ = ["MAX_DEPTH", "MAX_DIGITS", "JsonError", "is_text", "parse", "parse_at"]

MAX_DEPTH = 100
"""Lists and objects that may stand in each other."""
MAX_DIGITS = 4300
"""Digits of the longest whole number, which is Python's own limit."""

_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SAFE_RECURSION = 3000
"""Up to this limit Python stops a recursion long before the stack of a thread is used up."""


class JsonError(ValueError):
    """A text that is not JSON, or JSON beyond what can be kept; says where it breaks."""

    def __init__(self, problem: str, *, position: int | None = None, field: str = "") -> None:
        self.problem = problem
        self.position = position
        """Character at which the text is no JSON; None where it is, and is refused."""
        self.field = field[:200].encode("utf-8", "backslashreplace").decode()
        """Path of the value that is refused, such as "messages[2].content"; "" for the text."""
        super().__init__(f"field '{self.field}': {problem}" if field else problem)


def parse(text: str) -> Any:
    """Return what a JSON text holds.

    Errors: `JsonError` for text that is not JSON, equal keys in one object, NaN and infinity,
    numbers of more than `MAX_DIGITS` digits, nesting deeper than `MAX_DEPTH`, and escapes that
    are half of a character.
    """
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(text)
    try:
        value, end = _SCAN(text, 0)
        whole = end == len(text) or text[end:].isspace()
    except (StopIteration, ValueError, RecursionError):
        whole = False  # blanks at the start, or an error that the careful way finds again
    if not whole:
        value = _decoded(_STRICT.decode, _MARKING.decode, text)
    if "\\" in text and _SURROGATE_ESCAPE.search(text):
        _check_characters(value)
    return value


def parse_at(text: str, start: int) -> tuple[Any, int]:
    """Return the JSON value that begins at a character, and where it ends; see `parse`."""
    if sys.getrecursionlimit() > _SAFE_RECURSION:
        _check_depth(text[start:])
    try:
        value, end = _SCAN(text, start)
    except (StopIteration, ValueError, RecursionError):
        value, end = _decoded(_STRICT.raw_decode, _MARKING.raw_decode, text, start)
    own = text[start:end]
    if own.count("[") + own.count("{") > MAX_DEPTH:
        _check_depth(own)
    if "\\" in own and _SURROGATE_ESCAPE.search(own):
        _check_characters(value)
    return value, end


def is_text(value: str) -> bool:
    """Return whether all characters are whole; half a surrogate pair has no UTF-8 bytes."""
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decoded(strict: Callable[..., Any], marking: Callable[..., Any], *where: Any) -> Any:
    try:
        return strict(*where)
    except json.JSONDecodeError as error:
        problem = error.msg[:1].lower() + error.msg[1:]
        raise JsonError(problem, position=error.pos) from None
    except RecursionError:
        raise JsonError(_TOO_DEEP) from None
    except ValueError as refused:  # ours, or Python's for a number that is too long
        problem = str(refused)
    # read once more, with a mark in the place of what is refused, to find its field
    try:
        value = marking(*where)
        for field, found in _walk(value[0] if isinstance(value, tuple) else value):
            if isinstance(found, _Mark):
                raise JsonError(found.problem, field=field)
    except RecursionError:  # the way through takes more of the stack than reading did
        raise JsonError(_TOO_DEEP) from None
    raise JsonError(problem)


class _Mark:
    """Stands where a value is refused."""

    def __init__(self, problem: str) -> None:
        self.problem = problem


def _refuse(problem: str) -> NoReturn:
    raise ValueError(problem)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        _refuse(_twice(pairs))
    return row


def _twice(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            break
        seen.add(key)
    return f"the key {key[:80]!r} stands twice in one object; keep one of them"


def _whole(digits: str) -> int | str:
    if len(digits) > MAX_DIGITS:
        return (
            f"a whole number of {len(digits.lstrip('-'))} digits; the longest that is read has "
            f"{MAX_DIGITS}; write it as text"
        )
    return int(digits)


def _real(digits: str) -> float | str:
    value = float(digits)
    if value in (_INFINITY, -_INFINITY):
        return f"the number {digits[:40]} is larger than a float can hold; write it as text"
    return value


def _constant(word: str) -> str:
    return f"{word} is no JSON; write null for a number that is not there"


_INFINITY = float("inf")


def _strict_float(digits: str) -> Any:
    value = _real(digits)
    return _refuse(value) if isinstance(value, str) else value


def _marking(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def marked(digits: str) -> Any:
        value = read(digits)
        return _Mark(value) if isinstance(value, str) else value

    return marked


def _marked_pairs(pairs: list[tuple[str, Any]]) -> Any:
    row = dict(pairs)
    return row if len(row) == len(pairs) else _Mark(_twice(pairs))


_STRICT = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_float=_strict_float,
    parse_constant=lambda word: _refuse(_constant(word)),
)
_SCAN: Callable[[str, int], tuple[Any, int]] = _STRICT.scan_once  # type: ignore[attr-defined]
_MARKING = json.JSONDecoder(
    object_pairs_hook=_marked_pairs,
    parse_int=_marking(_whole),
    parse_float=_marking(_real),
    parse_constant=lambda word: _Mark(_constant(word)),
)
_TOO_DEEP = f"nested more than {MAX_DEPTH} deep; write what lies deeper as JSON text"


def _check_depth(text: str) -> None:
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > MAX_DEPTH:
            raise JsonError(_TOO_DEEP)


def _check_characters(value: Any) -> None:
    for field, found in _walk(value):
        if isinstance(found, str) and not is_text(found):
            raise JsonError(
                f"the text {found[:40]!r} holds half of a character (a lone surrogate), which no "
                "UTF-8 file and no tokenizer can hold; mend or drop it",
                field=field,
            )


def _walk(value: Any, field: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value within a value, keys included, with the path of its field."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield f"{field}.{key}"[:200].lstrip("."), key
            yield from _walk(item, f"{field}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(item, f"{field}[{index}]")
    else:
        yield field, value
