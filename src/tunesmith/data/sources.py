"""Files, directories, hub ids, frames and iterables to rows that remember where they came from.

Nothing here knows what a row means; data formats do. Every fault is told with the file and the
line, row or byte where it stands, because that is what the reader has to mend.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import attrs

from tunesmith.errors import DataError, listed

__all__ = ["SUFFIXES", "Row", "describe", "fingerprint", "iter_rows", "read_rows"]

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Suffixes of the files that can be read; each may be followed by ".gz"."""

_TURN_KEYS = ({"role", "content"}, {"from", "value"})


@attrs.frozen
class Row:
    """One row as its source holds it, and where it stands there."""

    values: Mapping[str, Any]
    where: str
    """"train.json, row 12", "train.jsonl, line 12", "owner/name[train], row 12" or "row 12"."""


def read_rows(data: Any, *, limit: int | None = None) -> list[Row]:
    """Return the rows of a data description, all of them or the first `limit`.

    `data` is a path or several (.json, .jsonl, .ndjson, .csv, .tsv, .parquet, each also .gz), a
    directory of such files, a hub id "owner/name" or "owner/name:split", a `datasets.Dataset`, a
    pandas, polars or arrow table, or an iterable of mappings. Cells of CSV files stay text.
    Errors: `DataError` for data that is missing, empty, broken or of another kind.
    """
    return list(islice(iter_rows(data), limit))


def iter_rows(data: Any) -> Iterator[Row]:
    """Yield the rows of a data description one by one; see `read_rows` for kinds and errors."""
    empty = True
    for row in _rows(data):
        empty = False
        yield row
    if empty:
        raise DataError(f"{describe(data)} holds no rows; give data with at least one row")


def describe(data: Any) -> str:
    """Return a short text that says what the data is, such as "train.json" or "12 rows"."""
    if isinstance(data, (str, Path)):
        return str(data)
    if _is_paths(data):
        return ", ".join(str(item) for item in data)
    if isinstance(data, Mapping):
        return f"a {type(data).__name__} with the keys {listed(map(str, data))}"
    try:
        count = len(data)
    except TypeError:
        return f"rows of a {type(data).__name__}"
    kind = "" if isinstance(data, (list, tuple)) else f" of a {type(data).__name__}"
    return f"{count} row{'' if count == 1 else 's'}{kind}"


def fingerprint(data: Any) -> str:
    """Return a sha256, in hexadecimal, that changes exactly when the content of the data does.

    For files it is taken over their bytes, so a file may move; for rows in this process and from
    the hub over their JSON with sorted keys. Errors: `DataError` for an iterator, which would be
    used up, and whatever `read_rows` finds.
    """
    if isinstance(data, (str, Path)) or _is_paths(data):
        files = _files(data)
        if files is not None:
            digests = [_file_digest(path) for path in files]
            if len(digests) == 1:
                return digests[0].hex()
            return hashlib.sha256(b"".join(digests)).hexdigest()
    if isinstance(data, Iterator):
        raise DataError(
            f"got a {type(data).__name__}, which can be read only once; pass list(...) of it"
        )
    digest = hashlib.sha256()
    for row in iter_rows(data):
        text = json.dumps(row.values, sort_keys=True, ensure_ascii=False, default=_jsonable)
        digest.update(text.encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


def _rows(data: Any) -> Iterator[Row]:
    if isinstance(data, (str, Path)) or _is_paths(data):
        files = _files(data)
        if files is None:
            return _hub_rows(str(data))
        return _file_rows(files)
    return _process_rows(data)


# --- in this process ------------------------------------------------------------------------------


def _process_rows(data: Any) -> Iterator[Row]:
    for number, values in enumerate(_mappings(data), 1):
        where = f"row {number}"
        if isinstance(values, (str, Path)):
            raise DataError(
                f"{where}: got the text {str(values)[:60]!r} among other things; expected "
                "either only paths or only mappings"
            )
        if not isinstance(values, Mapping):
            raise DataError(f"{where}: got {_kind(values)}; expected a mapping of field to value")
        yield Row(values, where)


def _mappings(data: Any) -> Iterable[Any]:
    if _is_dataset_dict(data):
        if "train" not in data:
            raise DataError(
                f"got a {type(data).__name__} with the splits {listed(data)}; expected one with "
                "a 'train' split; pass one of its splits, such as "
                f"data[{next(iter(data), 'train')!r}]"
            )
        rows: Iterable[Any] = data["train"]
        return rows
    if isinstance(data, Mapping):
        raise DataError(
            f"got {describe(data)}; expected a list of mappings, one a row; put a single row in "
            "a list"
        )
    if hasattr(data, "to_dict") and hasattr(data, "itertuples"):  # pandas
        return map(_without_nan, data.to_dict("records"))
    for method in ("to_dicts", "to_pylist"):  # polars; pyarrow
        if hasattr(data, method):
            dicts: Iterable[Any] = getattr(data, method)()
            return dicts
    if isinstance(data, (bytes, bytearray)) or not isinstance(data, Iterable):
        raise DataError(
            f"got {_kind(data)} as data; expected a path, a list of paths, a hub id "
            "'owner/name', a datasets.Dataset, a data frame, or a list of mappings"
        )
    return data


def _without_nan(record: Mapping[Any, Any]) -> dict[str, Any]:
    # NaN is how pandas writes "nothing stands here", also in columns of text
    return {
        str(key): None if isinstance(value, float) and value != value else value
        for key, value in record.items()
    }


def _is_dataset_dict(data: Any) -> bool:
    # looked up rather than imported: whoever holds such an object has imported it
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(
        data, (datasets.DatasetDict, datasets.IterableDatasetDict)
    )


def _is_paths(data: Any) -> bool:
    return (
        isinstance(data, (list, tuple))
        and len(data) > 0
        and all(isinstance(item, (str, Path)) for item in data)
    )


# --- the hub --------------------------------------------------------------------------------------


def _hub_rows(name: str) -> Iterator[Row]:
    import datasets

    repository, _, split = name.partition(":")
    split = split or "train"
    try:
        rows = datasets.load_dataset(repository, split=split)
    except Exception as error:  # each of hub, network, cache and builder raises its own kind
        problem = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(
            f"'{name}' is no file or directory here, and the split '{split}' of a hub data set "
            f"'{repository}' cannot be loaded: {problem}; check the spelling, the network, or "
            "name another split as 'owner/name:split'"
        ) from error
    for number, values in enumerate(rows, 1):
        yield Row(values, f"{repository}[{split}], row {number}")


def _is_hub_id(name: str) -> bool:
    repository = name.partition(":")[0]
    owner, slash, rest = repository.partition("/")
    if not (slash and owner and rest) or "/" in rest or owner[0] in ".~" or _suffix(repository):
        return False
    return all(
        part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in (owner, rest)
    )


# --- files ----------------------------------------------------------------------------------------


def _files(data: Any) -> list[Path] | None:
    """Return the files a path or several stand for, or None if it is a hub id."""
    if isinstance(data, str) and not Path(data).exists() and _is_hub_id(data):
        return None
    found: list[Path] = []
    for item in [data] if isinstance(data, (str, Path)) else data:
        path = Path(item)
        if path.is_dir():
            inside = sorted(
                entry for entry in path.iterdir() if entry.is_file() and _suffix(entry.name)
            )
            if not inside:
                raise DataError(
                    f"{path}: a directory without any data file; expected files that end in "
                    f"{_allowed()}"
                )
            found.extend(inside)
            continue
        if not path.exists():
            raise DataError(_missing(path))
        if not _suffix(path.name):
            raise DataError(
                f"{path}: got a file that ends in '{path.suffix}'; expected {_allowed()}; "
                "rename or convert it"
            )
        found.append(path)
    return found


def _missing(path: Path) -> str:
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=2, cutoff=0.5)
    if near:
        hint = "did you mean " + " or ".join(f"'{path.parent / name}'" for name in near) + "?"
    elif not path.parent.is_dir():
        hint = f"there is no directory '{path.parent}' either"
    else:
        hint = "check the path, or give a hub id as 'owner/name'"
    return f"{path}: no such file or directory; {hint}"


def _allowed() -> str:
    return ", ".join(SUFFIXES) + ", each also with .gz"


def _suffix(name: str) -> str:
    """Return the known suffix of a file name without ".gz", or nothing."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else ""


def _file_rows(files: list[Path]) -> Iterator[Row]:
    names = [path.name for path in files]
    for path in files:
        name = path.name if names.count(path.name) == 1 else str(path)
        if path.stat().st_size == 0:
            raise DataError(f"{name}: the file is empty; expected at least one row")
        try:
            yield from _READERS[_suffix(path.name)](path, name)
        except UnicodeDecodeError as error:
            raise DataError(_not_utf8(path, name)) from error
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(
                f"{name}: not a whole gzip file ({error}); compress or fetch it again"
            ) from error
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if _is_gzip(path) else path.open("rb"))


def _is_gzip(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _file_digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return digest.digest()


def _not_utf8(path: Path, name: str) -> str:
    # found by a second pass over all bytes: a stream's decoder counts from the start of its chunk
    with _open(path) as stream:
        raw = stream.read()
    try:
        raw.decode("utf-8")
        place = ""
    except UnicodeDecodeError as error:
        place = f", byte {error.start} (0x{raw[error.start]:02x})"
    return f"{name}{place}: not UTF-8 text; save the file in the encoding UTF-8"


def _json_rows(path: Path, name: str) -> Iterator[Row]:
    with _open(path) as stream:
        text = stream.read().decode("utf-8-sig")
    if not text.strip():
        raise DataError(f"{name}: the file is empty; expected a list of objects")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if _is_json_lines(text):
            yield from _lines_rows(text.encode().split(b"\n"), name)
            return
        raise DataError(_broken_json(name, error)) from error
    for number, item in enumerate(_json_list(value, text, name), 1):
        where = f"{name}, row {number}"
        if not isinstance(item, dict):
            raise DataError(f"{where}: got {_kind(item)}; expected an object of field to value")
        yield Row(item, where)


def _json_list(value: Any, text: str, name: str) -> list[Any]:
    """Return the rows in a JSON document: a list, or an object that holds exactly one list."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        lists = [item for item in value.values() if _is_row_list(item)]
        if len(lists) == 1 and len(value) == 1 + sum(
            not isinstance(item, (list, dict)) for item in value.values()
        ):
            rows: list[Any] = lists[0]
            return rows
        if "\n" not in text.strip():  # JSON Lines with a single line
            return [value]
        raise DataError(
            f"{name}: got one object with the keys {listed(value)}; expected a list of objects, "
            "or an object that holds exactly one such list; put a single row in [ ]"
        )
    raise DataError(f"{name}: got {_kind(value)}; expected a list of objects")


def _is_row_list(value: Any) -> bool:
    # a list of turns belongs to one row and is not itself a list of rows
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) for item in value)
        and not any(keys <= value[0].keys() for keys in _TURN_KEYS)
    )


def _is_json_lines(text: str) -> bool:
    first = next(line for line in text.split("\n") if line.strip())
    try:
        return isinstance(json.loads(first), dict)
    except json.JSONDecodeError:
        return False


def _json_lines_rows(path: Path, name: str) -> Iterator[Row]:
    with _open(path) as stream:
        yield from _lines_rows(stream, name)


def _lines_rows(lines: Iterable[bytes], name: str) -> Iterator[Row]:
    for number, raw in enumerate(lines, 1):
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            hint = ""
            if number == 1 and line.lstrip().startswith("["):
                hint = "; a file that is one JSON list is named .json"
            raise DataError(
                f"{where}, column {error.colno}: not valid JSON: {_word(error)}{hint}; "
                f"the line is: {_shortened(line)}"
            ) from error
        if not isinstance(value, dict):
            hint = "; a file that is one JSON list is named .json" if type(value) is list else ""
            raise DataError(
                f"{where}: got {_kind(value)}; expected an object of field to value{hint}"
            )
        yield Row(value, where)


def _broken_json(name: str, error: json.JSONDecodeError) -> str:
    lines = error.doc.split("\n")
    return (
        f"{name}, line {error.lineno}, column {error.colno}: not valid JSON: {_word(error)}; "
        f"the line is: {_shortened(lines[error.lineno - 1])}"
    )


def _word(error: json.JSONDecodeError) -> str:
    return error.msg[:1].lower() + error.msg[1:]


def _shortened(line: str) -> str:
    line = line.strip()
    return line if len(line) <= 120 else line[:117] + "..."


def _separated_rows(path: Path, name: str) -> Iterator[Row]:
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with _open(path) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            delimiter = "\t" if _suffix(path.name) == ".tsv" else ","
            yield from _cell_rows(csv.reader(text, delimiter=delimiter, strict=True), name)
    finally:
        csv.field_size_limit(limit)


def _cell_rows(reader: Any, name: str) -> Iterator[Row]:
    header: list[str] | None = None
    number = 0
    begin = 1
    try:
        for cells in reader:
            line, begin = begin, reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
                twice = {cell for cell in header if header.count(cell) > 1}
                if twice:
                    raise DataError(
                        f"{name}, line {line}: the column {listed(twice)} is named twice; "
                        "give every column a name of its own"
                    )
                continue
            number += 1
            if len(cells) != len(header):
                raise DataError(
                    f"{name}, line {line}: got {len(cells)} cells; expected {len(header)}, one "
                    f"for each of the columns {', '.join(header)}; a cell that holds the "
                    'delimiter or a line break stands in double quotes ("...")'
                )
            yield Row(dict(zip(header, cells, strict=True)), f"{name}, row {number}")
    except csv.Error as error:
        raise DataError(
            f"{name}, line {begin}: not a valid row: {error}; a double quote inside a quoted "
            'cell is written twice ("")'
        ) from error


def _parquet_rows(path: Path, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    with _open(path) as stream:
        # the reader seeks, which a gzip stream can do only by unpacking again and again
        source = io.BytesIO(stream.read()) if _is_gzip(path) else stream
        try:
            for batch in pyarrow.parquet.ParquetFile(source).iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{name}, row {number}")
        except pyarrow.ArrowException as error:
            problem = str(error).splitlines()[0]
            raise DataError(f"{name}: not a whole parquet file: {problem}") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".json": _json_rows,
    ".jsonl": _json_lines_rows,
    ".ndjson": _json_lines_rows,
    ".csv": _separated_rows,
    ".tsv": _separated_rows,
    ".parquet": _parquet_rows,
}


# --- words ----------------------------------------------------------------------------------------


def _kind(value: Any) -> str:
    """Return what a value is, as a person would say it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"a number ({value})"
    if isinstance(value, str):
        return f"text ({_shortened(value)[:40]!r})"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"a {type(value).__name__}"


def _jsonable(value: Any) -> Any:
    """Return a stand-in for a value JSON does not know, the same in every process."""
    for method in ("tolist", "isoformat"):  # numpy arrays and scalars; dates
        if hasattr(value, method):
            return getattr(value, method)()
    if isinstance(value, (bytes, bytearray)):
        return value.hex()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return str(value)
