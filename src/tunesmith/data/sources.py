"""Files, directories, hub ids, frames and iterables to rows that remember where they came from.

Nothing here knows what a row means; data formats do. Every fault is told with the file and the
line, row or byte where it stands, because that is what the reader has to mend. Rows are read one
at a time, none longer than `MAX_ROW`; their values are plain Python, whatever they came from.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from gzip import BadGzipFile
from itertools import islice
from typing import Any

from tunesmith.data.reading.arrow_rows import arrow_rows, parquet_rows
from tunesmith.data.reading.bounds import MAX_ROW
from tunesmith.data.reading.csv_rows import csv_rows
from tunesmith.data.reading.files import (
    SUFFIXES,
    File,
    files_of,
    is_path,
    is_paths,
    not_utf8,
    opened,
    suffix_of,
)
from tunesmith.data.reading.json_rows import json_lines_rows, json_rows
from tunesmith.data.reading.objects import hub_rows, object_rows, split_of
from tunesmith.data.reading.row import Row
from tunesmith.errors import DataError, listed
from tunesmith.strict_json import JsonError
from tunesmith.strict_json import parse as parse_json

__all__ = [
    "MAX_ROW",
    "SUFFIXES",
    "JsonError",
    "Reading",
    "Row",
    "describe",
    "fingerprint",
    "iter_rows",
    "parse_json",
    "read_rows",
    "refuse_iterator",
]


def read_rows(data: Any, *, limit: int | None = None) -> list[Row]:
    """Return the rows of a data description, all of them or the first `limit`.

    `data` is a path or several (.json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow, each also
    .gz), a directory of such files or one that `save_to_disk` wrote, a hub id "owner/name" or
    "owner/name:split", a `datasets.Dataset` or dict of them, a pandas, polars or arrow table, or
    an iterable of mappings. Cells of CSV files stay text.
    Errors: `DataError` for data that is missing, empty, broken, too large or of another kind.
    """
    return list(islice(iter_rows(data), limit))


def iter_rows(data: Any) -> Iterator[Row]:
    """Yield the rows of a data description one by one; see `read_rows` for kinds and errors."""
    return iter(Reading(data))


class Reading:
    """The rows of a data description, read once, and the hash of exactly what was read.

    Iterate to its end, then ask for the fingerprint.
    """

    def __init__(self, data: Any, *, marked: bool = False) -> None:
        """Get ready to read; with `marked` the rows of this process are hashed on the way."""
        self._data = data
        self._marked = marked
        self._digests: list[bytes] = []
        self._rows = hashlib.sha256()
        self._files: list[File] | None = None
        self.count = 0
        """Rows read so far."""

    def __iter__(self) -> Iterator[Row]:
        try:
            for row in self._read():
                self.count += 1
                yield row
        except MemoryError as error:
            raise DataError(
                f"{describe(self._data)}: memory ran out after {self.count} rows; split the data, "
                "take a sample of it, or use a machine with more memory"
            ) from error
        if not self.count:
            raise DataError(
                f"{describe(self._data)} holds no rows; give data with at least one row"
            )

    def fingerprint(self) -> str:
        """Return the sha256 of what was read; see `fingerprint`."""
        return _joined(self._digests) if self._files is not None else self._rows.hexdigest()

    def _read(self) -> Iterator[Row]:
        data = self._data
        if is_path(data) or is_paths(data):
            self._files = files_of(data)
            if self._files is not None:
                for file in self._files:
                    yield from _file_rows(file, self._digests)
                return
        for row in hub_rows(data) if isinstance(data, str) else object_rows(data):
            if self._marked:
                self._rows.update(_canonical(row.values))
            yield row


def describe(data: Any) -> str:
    """Return a short text that says what the data is, such as "train.json" or "12 rows"."""
    if is_path(data):
        return _shortened(os.fsdecode(data))
    if is_paths(data):
        return _shortened(", ".join(map(os.fsdecode, data)))
    if isinstance(data, Mapping) and not hasattr(data, "num_rows"):
        return f"a {type(data).__name__} with the keys {_shortened(listed(map(str, data)))}"
    kind = "" if isinstance(data, (list, tuple)) else f" of a {type(data).__name__}"
    if isinstance(data, Mapping):
        data, split = split_of(data)
        kind = f" in the split '{split}'{kind}"
    try:
        count = len(data)
    except Exception:  # of whatever the object is made of; reading it tells what is wrong
        return f"rows of a {type(data).__name__}"
    return f"{count} row{'' if count == 1 else 's'}{kind}"


def _shortened(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 300 else text[:297] + "..."


def fingerprint(data: Any) -> str:
    """Return a sha256, in hexadecimal, that changes exactly when the content of the data does.

    For files it is taken over their bytes, so a file may move; for rows in this process and from
    the hub over their JSON with sorted keys. Errors: `DataError` for an iterator, which would be
    used up, and whatever `read_rows` finds.
    """
    if is_path(data) or is_paths(data):
        files = files_of(data)
        if files is not None:
            return _joined([_file_digest(file) for file in files])
    refuse_iterator(data)
    reading = Reading(data, marked=True)
    for _ in reading:
        pass
    return reading.fingerprint()


def refuse_iterator(data: Any) -> None:
    """Raise for data that can be read only once: a second look would find nothing."""
    if isinstance(data, Iterator):
        raise DataError(
            f"got a {type(data).__name__}, which can be read only once; pass list(...) of it"
        )


def _joined(digests: list[bytes]) -> str:
    if len(digests) == 1:
        return digests[0].hex()
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _file_digest(file: File) -> bytes:
    try:
        with file.path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read: {error.strerror or error}") from error


def _file_rows(file: File, digests: list[bytes]) -> Iterator[Row]:
    try:
        if file.path.stat().st_size == 0:
            raise DataError(f"{file.name}: the file is empty; expected at least one row")
        suffix = suffix_of(file.path.name)
        if suffix in _SEEKING:
            yield from _SEEKING[suffix](file, digests)
            return
        with opened(file) as stream:
            yield from _STREAMING[suffix](stream)
            digests.append(stream.digest())
    except UnicodeDecodeError as error:
        raise not_utf8(file) from error
    except (BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{file.name}: not a whole gzip file ({error}); compress or fetch it again"
        ) from error
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read: {error.strerror or error}") from error


_SEEKING = {".parquet": parquet_rows, ".arrow": arrow_rows}
_STREAMING = {
    ".json": json_rows,
    ".jsonl": json_lines_rows,
    ".ndjson": json_lines_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
}


def _canonical(values: Mapping[str, Any]) -> bytes:
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, default=_jsonable)
    return text.encode() + b"\n"


def _jsonable(value: Any) -> Any:
    """Return a stand-in for bytes, the one value of a row that JSON does not know."""
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"a row holds a {type(value).__name__}")
