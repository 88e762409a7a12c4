"""Values that a recipe holds: checked names, frozen options, and what of them a file can hold."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from tunesmith.errors import RecipeError
from tunesmith.recipe_text import MAX_BYTES, MAX_VALUES
from tunesmith.strict_json import MAX_DEPTH, MAX_DIGITS, is_text

__all__ = [
    "MAX_NAME",
    "check_finite",
    "check_keys",
    "check_name",
    "dotted_name",
    "frozen",
    "frozen_options",
    "is_name",
    "plain",
    "plain_data",
    "shown",
]

MAX_NAME = 100
"""Bytes of the longest name of a plugin: names of directories are made of them."""

_NAME = re.compile(r"(?:[\w.+-]+:)?[\w+-][\w.+-]*")


def frozen(value: Any, field: str = "an option", depth: int = 0) -> Any:
    """Return a value with its lists as tuples, so that equal recipes compare equal."""
    if depth > MAX_DEPTH:
        raise RecipeError(f"'{field[:60]}' is nested more than {MAX_DEPTH} deep; expected less")
    if isinstance(value, Mapping):
        return {key: frozen(item, str(key), depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(frozen(item, field, depth + 1) for item in value)
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise RecipeError(f"'{field}' is {shown(value)}; expected at most {MAX_DIGITS} digits")
    if isinstance(value, str) and not is_text(value):
        raise RecipeError(f"'{field}' is {shown(value)}, which holds half of a character; mend it")
    return value


_MAX_BITS = int(MAX_DIGITS * math.log2(10))


def check_finite(value: Any, field: str) -> None:
    """Raise for NaN and infinity, which no option takes; one given in Python the plan refuses."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            check_finite(item, str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_finite(item, field)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"'{field}' is {float(value)}; expected a finite number")


def frozen_options(value: Mapping[str, Any]) -> Any:
    """Return options as a recipe holds them."""
    return frozen(value)


def shown(value: Any) -> str:
    """Return a value as Python writes it, cut to what fits into a message."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"a whole number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number too long to write, a nesting too deep to show
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:197] + "..."


def is_name(name: Any) -> bool:
    """Return whether a value names a plugin: a plain word that no file system takes for a path."""
    return (
        isinstance(name, str)
        and _NAME.fullmatch(name) is not None
        and len(name.encode()) <= MAX_NAME
    )


def check_name(name: Any, what: str) -> None:
    """Raise unless a value names a plugin."""
    if is_name(name):
        return
    raise RecipeError(
        f"{what} is {shown(name)}; expected a name of at most {MAX_NAME} letters, digits, '_', "
        "'-', '+' and '.', such as 'lora', or 'distribution:name'"
    )


def check_keys(row: Mapping[Any, Any], where: str) -> None:
    """Raise for a key of a mapping that is no text."""
    for key in row:
        if not isinstance(key, str):
            raise RecipeError(
                f"{where}: the key {shown(key)} is no text; write the name of an option, or put "
                "it in quotes"
            )


def plain(value: Any) -> Any:
    """Return an option value as YAML and JSON can hold it: tuples become lists, paths strings."""
    try:
        return _plain(value)
    except RecursionError as error:
        raise RecipeError("an option is nested too deep for a file; make it flatter") from error


def dotted_name(function: Any) -> str:
    """Return "package.module:name" of a function or class that can be imported by it.

    Errors: `RecipeError` for a lambda, a function within another one, and one of the script that is
    running: no other process finds those.
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    found: Any = sys.modules.get(module or "")
    for part in (name or "").split("."):
        found = getattr(found, part, None)
    if not module or module == "__main__" or found is not function:
        called = getattr(function, "__name__", None) or type(function).__name__
        raise RecipeError(
            f"got the function {called}, which lives in this process only; define it at the top "
            "of a module that can be imported and give it, or its name 'package.module:function'"
        )
    return f"{module}:{name}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [_plain(item) for item in items]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "to_option"):  # a value of an option's own type, which knows its short form
        return _plain(value.to_option())
    if callable(value):
        return dotted_name(value)
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float):
        if isinstance(value, kind):  # a subclass too, such as numpy's, which YAML cannot write
            number = kind(value)
            if not math.isfinite(number) if kind is float else int(number).bit_length() > _MAX_BITS:
                raise RecipeError(f"got {shown(number)}; a recipe holds finite numbers only")
            return number
    if isinstance(value, str):
        if not is_text(value):
            raise RecipeError(f"got {shown(value)}, which holds half of a character; mend it")
        return str.__str__(value)  # an enum's value, not its name
    raise RecipeError(
        f"got a {type(value).__name__} as an option; a recipe holds text, numbers, booleans, "
        "lists and mappings"
    )


def _count(value: Any) -> int:
    """Return how many keys and values a plain value holds."""
    if isinstance(value, dict):
        return 1 + sum(1 + _count(item) for item in value.values())
    return 1 + sum(map(_count, value)) if isinstance(value, list) else 1


def _size(value: Any) -> int:
    """Return how many characters the texts of a plain value have."""
    if isinstance(value, dict):
        return sum(len(key) + _size(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str) else 0


def plain_data(data: Any) -> Any:
    """Return a data description as a file can hold it: paths, ids and literal rows."""
    if isinstance(data, (str, os.PathLike)):
        return os.fsdecode(data)
    if isinstance(data, (list, tuple)) and all(
        isinstance(item, (str, os.PathLike)) for item in data
    ):
        return [os.fsdecode(item) for item in data]
    if isinstance(data, (list, tuple)) and all(isinstance(item, Mapping) for item in data):
        rows = [plain(item) for item in data]
        if _size(rows) > MAX_BYTES // 4 or _count(rows) > MAX_VALUES // 2:
            raise RecipeError(
                f"{len(rows)} rows are too much for a recipe; save them to a .jsonl or .parquet "
                "file and give its path to keep it in a recipe"
            )
        return rows
    raise RecipeError(
        f"data given as a {type(data).__module__}.{type(data).__name__} lives in this process "
        "only; save it to a .jsonl or .parquet file and give its path to keep it in a recipe"
    )
