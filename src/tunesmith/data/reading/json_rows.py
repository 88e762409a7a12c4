"""JSON and JSON Lines to rows, one row at a time, so that no text lies in memory as a whole."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, BinaryIO, NoReturn

from tunesmith.data.reading.bounds import MAX_BLANK, MAX_ROW, all_blank, too_long
from tunesmith.data.reading.files import Stream
from tunesmith.data.reading.row import Row
from tunesmith.data.reading.words import kind_of, shortened
from tunesmith.errors import DataError, listed
from tunesmith.strict_json import JsonError, parse, parse_at

__all__ = ["json_lines_rows", "json_rows"]

_TURN_KEYS = ({"role", "content"}, {"from", "value"})
_CHUNK = 1 << 18
_BLANK = " \t\n\r"
_LIST = "a file that is one JSON list is named .json"


def json_lines_rows(stream: Stream) -> Iterator[Row]:
    """Yield the rows of a file with an object on each line; blank lines are counted, not read."""
    return _lines_rows(_bounded_lines(stream.reader), stream.name)


def json_rows(stream: Stream) -> Iterator[Row]:
    """Yield the rows of a JSON file: a list, an object that holds one, or an object on each line.

    The rows of a list stand at the top or in an object beside nothing but single values.
    """
    chunks = iter(lambda: stream.reader.read(_CHUNK), b"")
    if stream.reader.peek().removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return _document_rows(chunks, stream)
    lines = _bounded_lines(stream.reader)
    # the first line that is not blank says which; in a document it need not be a whole value
    head: list[bytes] = []
    text = ""
    try:
        for line in lines:
            head.append(line)
            text = line.decode("utf-8-sig" if len(head) == 1 else "utf-8").strip(_BLANK)
            if text:
                break
            if len(head) > MAX_BLANK:
                raise all_blank(f"{stream.name}, line {len(head)}")
    except UnicodeDecodeError:
        text = "["  # a character may be cut where a line is too long; read on as a document
    if not text:
        raise DataError(f"{stream.name}: the file is empty; expected a list of objects")
    if not _is_object(text):
        return _document_rows(chain(head, chunks), stream)
    rows = _lines_rows(chain(head, lines), stream.name)
    first = list(islice(rows, 2))
    if len(first) == 1:
        listing = _row_list(first[0].values)
        if listing is not None:
            return _checked(listing, stream.name)
    return chain(first, rows)


# --- an object on each line -----------------------------------------------------------------------


def _bounded_lines(stream: BinaryIO) -> Iterator[bytes]:
    # a character has up to four bytes; what is longer is handed on cut, and refused by its length
    most = 4 * MAX_ROW + 1
    return iter(lambda: stream.readline(most), b"")


def _lines_rows(lines: Iterable[bytes], name: str) -> Iterator[Row]:
    last = 0
    for number, raw in enumerate(lines, 1):
        if len(raw) > MAX_ROW:
            _check_length(raw, f"{name}, line {number}")
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        if line.isspace():
            if number - last > MAX_BLANK:
                raise all_blank(f"{name}, line {number}")
            continue
        last = number
        try:
            value = parse(line)
        except JsonError as error:
            _refuse_line(error, line, name, number)
        if type(value) is not dict:
            hint = f"; {_LIST}" if type(value) is list else ""
            raise DataError(
                f"{name}, line {number}: got {kind_of(value)}; "
                f"expected an object of field to value{hint}"
            )
        yield Row(value, f"{name}, line {number}")


def _check_length(raw: bytes, where: str) -> None:
    if len(raw) > 4 * MAX_ROW or len(raw.decode("utf-8", "replace")) > MAX_ROW:
        raise too_long(where)


def _refuse_line(error: JsonError, line: str, name: str, number: int) -> NoReturn:
    where = f"{name}, line {number}"
    if error.position is None:
        raise DataError(f"{where}: {error}") from error
    hint = f"; {_LIST}" if number == 1 and line.lstrip().startswith("[") else ""
    raise DataError(
        f"{where}, column {error.position + 1}: not valid JSON: {error.problem}{hint}; "
        f"the line is: {shortened(line)}"
    ) from error


# --- one document ---------------------------------------------------------------------------------


def _is_object(text: str) -> bool:
    """Return whether a line is an object by itself, be it one that is refused."""
    if not text.startswith("{"):
        return False
    try:
        return isinstance(parse(text), dict)
    except JsonError as error:
        return error.position is None and text.endswith("}")


def _row_list(value: Any, *, whole: bool = True) -> list[Any] | None:
    """Return the rows in an object that holds exactly one list, or None if it is not such a one."""
    lists = [item for item in value.values() if _is_row_list(item, whole)]
    nested = sum(isinstance(item, (list, dict)) for item in value.values())
    return lists[0] if len(lists) == 1 and nested == 1 else None


def _is_row_list(value: Any, whole: bool) -> bool:
    if not isinstance(value, list) or not value:
        return False
    objects = [item for item in value if isinstance(item, dict)]
    if not objects or (whole and len(objects) < len(value)):
        return False
    return not _is_turn(objects[0])


def _is_turn(value: dict[str, Any]) -> bool:
    # a list of turns belongs to one row and is not itself a list of rows
    return any(keys <= value.keys() for keys in _TURN_KEYS)


def _checked(listing: list[Any], name: str) -> Iterator[Row]:
    for number, item in enumerate(listing, 1):
        yield _object_row(item, f"{name}, row {number}")


def _object_row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{where}: got {kind_of(value)}; expected an object of field to value")
    return Row(value, where)


def _document_rows(chunks: Iterable[bytes], stream: Stream) -> Iterator[Row]:
    window = _Window(chunks, stream.name)
    first = window.character()
    if first == "[":
        yield from _list_rows(window)
    elif first == "{":
        value = window.value(stream.name, beyond=None)
        if value is _BEYOND:
            yield from _member_rows(window)
        else:
            window.end()
            # where one is an object, what stands beside it is a row that is wrong
            listing = _row_list(value, whole=False)
            if listing is None:
                raise _no_rows(stream.name, value)
            yield from _checked(listing, stream.name)
            return
    else:
        value = window.value(stream.name)
        raise DataError(f"{stream.name}: got {kind_of(value)}; expected a list of objects")
    window.end()


def _list_rows(window: _Window) -> Iterator[Row]:
    """Yield the rows of the list that begins here, and pass it."""
    window.take()
    if window.character() == "]":
        window.take()
        return
    number = 0
    while True:
        number += 1
        where = f"{window.name}, row {number}"
        yield _object_row(window.value(where), where)
        if window.separator("]"):
            return


def _member_rows(window: _Window) -> Iterator[Row]:
    """Yield the rows of the one list in the object that begins here, part by part."""
    window.take()
    seen: dict[str, Any] = {}
    found = False
    while True:
        if window.character() != '"':
            window.broken("expecting property name enclosed in double quotes")
        key = window.value(f"{window.name}, a key")
        if key in seen:
            raise DataError(f"{window.name}: the key {key[:80]!r} stands twice in one object")
        if window.character() != ":":
            window.broken("expecting ':' delimiter")
        window.take()
        seen[key] = None
        if window.character() == "[":
            rows = _list_rows(window)
            first = next(rows, None)
            if first is None or found or _is_turn(dict(first.values)):
                raise _no_rows(window.name, seen)
            found = True
            yield first
            yield from rows
        elif isinstance(window.value(f"{window.name}, the key {key[:80]!r}"), dict):
            raise _no_rows(window.name, seen)
        if window.separator("}"):
            break
    if not found:
        raise _no_rows(window.name, seen)


def _no_rows(name: str, value: dict[str, Any]) -> DataError:
    return DataError(
        f"{name}: got one object with the keys {listed(value)}; expected a list of objects, "
        "or an object that holds exactly one such list; put a single row in [ ]"
    )


_BEYOND = object()
"""In the place of a value that can be read only part by part."""


class _Window:
    """The part of a JSON document that is being read; what was read before is forgotten."""

    def __init__(self, chunks: Iterable[bytes], name: str) -> None:
        self.name = name
        self._chunks = iter(chunks)
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._line = 1
        self._before = 0
        """Characters of the current line that were forgotten."""
        self._ended = False

    def character(self) -> str:
        """Return the next character that is not blank, or nothing at the end."""
        while True:
            text, at = self._text, self._at
            while at < len(text) and text[at] in _BLANK:
                at += 1
            self._at = at
            if at < len(text):
                return text[at]
            if not self._more(_CHUNK):
                return ""

    def take(self) -> None:
        """Pass the next character."""
        self._at += 1

    def separator(self, end: str) -> bool:
        """Pass a comma, or the end of a list or an object; return whether it was the end."""
        character = self.character()
        if character not in (",", end) or not character:
            self.broken("expecting ',' delimiter")
        self.take()
        return character == end

    def end(self) -> None:
        """Raise unless nothing more follows."""
        if self.character():
            self.broken("extra data")

    def value(self, where: str, beyond: str | None = "") -> Any:
        """Return the value that begins here and pass it.

        One that cannot be kept, or is longer than a row may be, is refused; or it is `_BEYOND` and
        not passed if `beyond` is None.
        """
        self.character()
        size = _CHUNK
        while True:
            try:
                value, end = parse_at(self._text, self._at)
            except JsonError as error:
                if error.position is None:
                    if beyond is None:
                        return _BEYOND  # row by row, to say which one it is
                    raise DataError(f"{where}: {error}") from error
                if not self._is_cut(error):
                    self.broken(error.problem, error.position)
                if len(self._text) - self._at > MAX_ROW:
                    if beyond is None:
                        return _BEYOND
                    raise too_long(where) from error
                if not self._more(size):
                    self.broken(error.problem, min(error.position, len(self._text)))
                size *= 2
                continue
            if end - self._at > MAX_ROW:
                if beyond is None:
                    return _BEYOND
                raise too_long(where)
            # a number may go on in the next chunk
            if end < len(self._text) or isinstance(value, (dict, list, str)):
                self._at = end
                return value
            if not self._more(size):
                self._at = len(self._text)
                return value

    def broken(self, problem: str, position: int | None = None) -> NoReturn:
        """Raise the error for text that is no JSON at a position, or here."""
        at = self._at if position is None else position
        line = self._line + self._text.count("\n", 0, at)
        begin = self._text.rfind("\n", 0, at) + 1
        column = at - begin + 1 + (self._before if begin == 0 else 0)
        end = self._text.find("\n", at)
        shown = self._text[max(begin, at - 200) : end if end >= 0 else at + 200]
        raise DataError(
            f"{self.name}, line {line}, column {column}: not valid JSON: {problem}; "
            f"the line is: {shortened(shown)}"
        )

    def _is_cut(self, error: JsonError) -> bool:
        """Return whether a text is no JSON only because it goes on in the next chunk."""
        at = error.position or 0
        # 16 characters hold the longest literal and an escaped pair
        return not self._ended and (
            error.problem.startswith("unterminated string") or at > len(self._text) - 16
        )

    def _more(self, size: int) -> bool:
        """Append at least so many characters, if there are as many; return whether there were."""
        parts: list[str] = []
        count = 0
        while count < size and not self._ended:
            chunk = next(self._chunks, b"")
            self._ended = not chunk
            part = self._decoder.decode(chunk, final=self._ended)
            parts.append(part)
            count += len(part)
        if self._at:
            self._line += (lines := self._text.count("\n", 0, self._at))
            last = self._text.rfind("\n", 0, self._at)
            self._before = self._at - last - 1 if lines else self._before + self._at
            self._text = self._text[self._at :]
            self._at = 0
        self._text += "".join(parts)
        return count > 0
