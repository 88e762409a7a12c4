"""CSV and TSV to rows, record by record; cells stay text."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tunesmith.data.reading.bounds import MAX_BLANK, MAX_ROW, all_blank, too_long
from tunesmith.data.reading.files import Stream, suffix_of
from tunesmith.data.reading.row import Row
from tunesmith.data.reading.words import shortened
from tunesmith.errors import DataError, listed

__all__ = ["csv_rows"]

_DELIMITERS = {"\t": "tabs", ";": "semicolons", ",": "commas", "|": "bars"}


def csv_rows(stream: Stream) -> Iterator[Row]:
    """Yield the rows of a file of comma-separated cells, or of tabs where it is named .tsv.

    Errors: `DataError` for a row with more or fewer cells than columns, for columns of one name,
    for cells that another character separates, and for a file that seems to be cut off.
    """
    name = stream.name
    delimiter = "\t" if suffix_of(stream.file.path.name) == ".tsv" else ","
    lines = _Lines(io.TextIOWrapper(stream.reader, encoding="utf-8-sig", newline=""), name)
    header: list[str] | None = None
    number = last = 0
    for line, cells in _records(lines, delimiter, name):
        if not cells:
            if line - last > MAX_BLANK:
                raise all_blank(f"{name}, line {line}")
            continue
        last = line
        if header is None:
            header = _header(cells, delimiter, f"{name}, line {line}")
            continue
        number += 1
        if len(cells) != len(header):
            raise DataError(
                f"{name}, line {line}: got {len(cells)} cells; expected {len(header)}, one "
                f"for each of the columns {shortened(', '.join(header))}; a cell that holds the "
                'delimiter or a line break stands in double quotes ("...")'
            )
        if lines.is_cut():
            raise DataError(
                f"{name}, line {line}: the file ends within its last row, without the line break "
                f"that ends a row, as a file does that was cut off; if its last cell "
                f"({shortened(cells[-1])[-40:]!r}) is whole, end the file with a line break, "
                "else fetch it again"
            )
        yield Row(dict(zip(header, cells, strict=True)), f"{name}, row {number}")


class _Lines:
    """The lines of a text with their ends, none longer than a row may be."""

    def __init__(self, text: io.TextIOWrapper, name: str) -> None:
        self._text = text
        self._name = name
        self._last = ""
        self.number = 0
        self.held = 0
        """Characters since the last record began."""

    def __iter__(self) -> Iterator[str]:
        while line := self._text.readline(MAX_ROW + 1):
            self.number += 1
            self.held += len(line)
            if self.held > MAX_ROW:
                raise too_long(f"{self._name}, line {self.number}")
            if "\0" in line:
                raise DataError(
                    f"{self._name}, line {self.number}: holds the character NUL, which no text "
                    "does; save the file as text in the encoding UTF-8"
                )
            self._last = line
            yield line

    def is_cut(self) -> bool:
        """Return whether the text may have ended too early: in a cell that nothing closes."""
        # a quoted cell is known to be whole, and so is every row that a line break ends
        return not self._last.endswith(("\n", "\r", '"'))


def _records(lines: _Lines, delimiter: str, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each record with the line it begins in."""
    reader: Any = csv.reader(iter(lines), delimiter=delimiter, strict=True)
    while True:
        begin = lines.number + 1
        lines.held = 0
        # the limit is the whole process's, so it is ours only while a record is read
        limit = csv.field_size_limit(MAX_ROW)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{name}, line {begin}: not a valid row: {error}; a double quote inside a quoted "
                'cell is written twice ("")'
            ) from error
        finally:
            csv.field_size_limit(limit)
        yield begin, cells


def _header(cells: list[str], delimiter: str, where: str) -> list[str]:
    twice = sorted(cell for cell, count in Counter(cells).items() if count > 1)
    if twice:
        raise DataError(
            f"{where}: the column {listed(cell or repr(cell) for cell in twice)} is named twice; "
            "give every column a name of its own"
        )
    if len(cells) == 1:
        other = next((mark for mark in _DELIMITERS if mark != delimiter and mark in cells[0]), "")
        if other:
            raise DataError(
                f"{where}: got the one column {shortened(cells[0])!r}, whose cells "
                f"{_DELIMITERS[other]} seem to separate; expected {_DELIMITERS[delimiter]}"
                + ("; name a file with tabs .tsv" if other == "\t" else "")
            )
    return cells
