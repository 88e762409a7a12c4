"""Values of other libraries to plain Python: dict, list, str, int, float, bool and None.

Data formats read plain values only. Arrays, scalars and missing values of numpy and pandas,
tensors, dates and decimals become what a JSON file would hold in their place.
"""

from __future__ import annotations

import datetime
import decimal
import math
import os
import uuid
from collections.abc import Mapping, Set
from typing import Any

from tunesmith.data.reading.bounds import MAX_ROW, too_long
from tunesmith.data.reading.words import kind_of
from tunesmith.errors import DataError
from tunesmith.strict_json import MAX_DEPTH, MAX_DIGITS, is_text

__all__ = ["plain_row", "plain_scalar"]

_MAX_BITS = int(MAX_DIGITS * math.log2(10))
_TEXTS = (datetime.date, datetime.time, datetime.timedelta, uuid.UUID, os.PathLike)
_MISSING = {"NAType", "NaTType"}
"""Types of pandas' missing values, told by name: whoever holds one has imported pandas."""


def plain_row(
    values: Mapping[Any, Any], where: str, *, nan_is_null: bool = False
) -> dict[str, Any]:
    """Return a row's values as plain ones; with `nan_is_null` NaN says that nothing stands there.

    Errors: `DataError` that names the field of a value that no file could hold.
    """
    walk = _Walk(nan_is_null)
    try:
        return walk.mapping(values, 0, filled=False)
    except _FieldError as error:
        field = error.field.encode("utf-8", "backslashreplace").decode()[:200]
        raise DataError(f"{where}: field '{field}': {error.problem}") from error.__cause__
    except _TooLongError:
        raise too_long(where) from None


def plain_scalar(value: Any) -> Any:
    """Return a date, a decimal, bytes or the like as a JSON file would hold it.

    Bytes that are UTF-8 are text; others stay what they are, which no format takes for text.
    """
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            return bytes(value).decode()
        except UnicodeDecodeError:
            return bytes(value)
    if isinstance(value, datetime.timedelta):
        return str(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return _decimal(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def _decimal(value: decimal.Decimal) -> int | float | str | None:
    if value.is_nan():
        return None
    if not value.is_finite() or abs(value.adjusted()) > 300:
        return str(value)
    if value == value.to_integral_value():
        return int(value)
    nearest = float(value)
    return nearest if decimal.Decimal(repr(nearest)) == value else str(value)


class _FieldError(Exception):
    """A value that cannot be kept; its field is put together on the way up."""

    def __init__(self, problem: str) -> None:
        self.problem = problem
        self.field = ""
        super().__init__(problem)

    def under(self, part: str) -> None:
        """Say which field or item the value stands in."""
        self.field = part + ("" if not self.field or self.field[0] == "[" else ".") + self.field


class _TooLongError(Exception):
    """A row of more characters and values than a row may have."""


class _Walk:
    """One way through the values of a row, which counts them."""

    def __init__(self, nan_is_null: bool) -> None:
        self._nan_is_null = nan_is_null
        self._left = MAX_ROW

    def mapping(self, value: Mapping[Any, Any], depth: int, *, filled: bool) -> dict[str, Any]:
        self._enter(depth)
        row: dict[str, Any] = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise _FieldError(f"a field is named by {kind_of(key)}; expected text")
            key = str.__str__(key)
            try:
                if not is_text(key):
                    raise _FieldError("its name holds half of a character; rename it")
                kept = self.value(item, depth + 1, filled=filled)
            except _FieldError as error:
                error.under(key)
                raise
            if kept is None and filled:
                continue  # Arrow gives all objects of a list the keys of each
            row[key] = kept
        return row

    def sequence(self, value: Any, depth: int, *, filled: bool = False) -> list[Any]:
        self._enter(depth)
        items: list[Any] = []
        for index, item in enumerate(value):
            try:
                items.append(self.value(item, depth + 1, filled=filled))
            except _FieldError as error:
                error.under(f"[{index}]")
                raise
        return items

    def value(self, value: Any, depth: int, *, filled: bool = False) -> Any:
        kind = type(value)
        if kind is str:
            self._spend(len(value) + 2)
            if not is_text(value):
                raise _FieldError(
                    "the text holds half of a character (a lone surrogate), which no UTF-8 file "
                    "and no tokenizer can hold; mend or drop it"
                )
            return value
        if value is None or kind is bool:
            self._spend(4)
            return value
        if kind is int:
            self._spend(8)
            if value.bit_length() > _MAX_BITS:
                raise _FieldError(
                    f"a whole number of more than {MAX_DIGITS} digits; write it as text"
                )
            return value
        if kind is float:
            self._spend(8)
            return None if self._nan_is_null and value != value else value
        if isinstance(value, Mapping):
            return self.mapping(value, depth, filled=filled)
        if isinstance(value, (list, tuple)):
            return self.sequence(value, depth, filled=filled)
        return self._other(value, depth)

    def _other(self, value: Any, depth: int) -> Any:
        """Return a value of another library as plain Python."""
        if type(value).__name__ in _MISSING:
            return None
        for plain in (str, int, float):
            if isinstance(value, plain):  # an enum's value, a subclass such as numpy's
                return self.value(plain.__str__(value) if plain is str else plain(value), depth)
        if isinstance(value, (bytes, bytearray, memoryview)):
            self._spend(len(value))
            kept = plain_scalar(value)
            return self.value(kept, depth) if isinstance(kept, str) else kept
        if isinstance(value, (*_TEXTS, decimal.Decimal)):
            return self.value(plain_scalar(value), depth)
        if isinstance(value, Set):
            return self.sequence(sorted(value, key=repr), depth)
        if hasattr(value, "tolist"):  # arrays and scalars of numpy, tensors
            count = getattr(value, "size", 1)
            self._spend(8 * count if isinstance(count, int) else 1)
            try:
                listed = value.tolist()
            except Exception as error:  # a tensor on a device that is gone, a lazy array
                raise _FieldError(f"{kind_of(value)} that gives no values: {error}") from error
            if isinstance(listed, list):
                # objects in an array come from Arrow, which fills them with nulls
                return self.sequence(listed, depth, filled=True)
            return (
                self._other(listed, depth)
                if type(listed) is type(value)
                else self.value(listed, depth)
            )
        raise _FieldError(
            f"got {kind_of(value)}; expected text, a number, true, false, null, a list or a mapping"
        )

    def _enter(self, depth: int) -> None:
        self._spend(16)  # a list or a dict by itself takes more than 50 bytes
        if depth > MAX_DEPTH:
            raise _FieldError(f"nested more than {MAX_DEPTH} deep; write what lies deeper as text")

    def _spend(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise _TooLongError
