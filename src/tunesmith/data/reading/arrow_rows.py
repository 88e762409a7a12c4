"""Parquet files, Arrow files and Arrow tables to rows, batch by batch, by the types of the columns.

Arrow gives every object of a column the same keys, and null to those that an object did not have.
So a null within an object is a key that was not there, and is taken out; a null column stays null.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tunesmith.data.reading.bounds import MAX_ROW, MemoryWatch, free_memory
from tunesmith.data.reading.files import File, seekable
from tunesmith.data.reading.plain import plain_scalar
from tunesmith.data.reading.row import Row
from tunesmith.errors import DataError, TunesmithError, listed
from tunesmith.strict_json import MAX_DEPTH, JsonError, parse
from tunesmith.units import byte_size

__all__ = ["arrow_rows", "batch_rows", "parquet_rows"]

_BATCH_ROWS = 1024
_BATCH_BYTES = 16_000_000
_LEAST_BYTES = 300
"""What a row takes in memory at the least: its values, its place, its example."""

_Convert = Callable[[Any], Any]


def parquet_rows(file: File, digests: list[bytes]) -> Iterator[Row]:
    """Yield the rows of a parquet file; appends the hash of its bytes to `digests`."""
    import pyarrow.parquet

    with seekable(file, digests) as source:
        with _told(file.name, "parquet"):
            reader = pyarrow.parquet.ParquetFile(source)
            metadata = reader.metadata
            groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
            size = sum(max(0, group.total_byte_size) for group in groups)
            rows = max(1, metadata.num_rows)
            per_row = size // rows + 1
            need = max(size, rows * _LEAST_BYTES)
            if need > 32_000_000 and need > (free := free_memory()):
                raise DataError(
                    f"{file.name}: holds {rows:,} rows of {byte_size(size)} unpacked, and "
                    f"{byte_size(free)} of memory are free; split the data or take a sample of it"
                )
            count = max(1, min(_BATCH_ROWS, _BATCH_BYTES // per_row))
            batches = reader.iter_batches(batch_size=count)
        yield from batch_rows(_told_batches(batches, file.name, "parquet"), file.name, file.name)


def arrow_rows(file: File, digests: list[bytes]) -> Iterator[Row]:
    """Yield the rows of an Arrow file, of either of its two layouts; see `parquet_rows`."""
    import pyarrow

    with seekable(file, digests) as source:
        with _told(file.name, "arrow"):
            magic = source.read(6)
            source.seek(0)
            if magic == b"ARROW1":
                reader = pyarrow.ipc.open_file(source)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(source))
        yield from batch_rows(_told_batches(batches, file.name, "arrow"), file.name, file.name)


def batch_rows(batches: Iterable[Any], prefix: str, name: str) -> Iterator[Row]:
    """Yield the rows of Arrow record batches; `prefix` begins each row's place.

    Errors: `DataError` for two columns of one name, a row that is too long, text that is none.
    """
    place = f"{prefix}, row " if prefix else "row "
    watch = MemoryWatch(name or "the rows", None)
    converters: list[_Convert | None] | None = None
    number = 0
    for whole in batches:
        for batch in _slices(whole):
            if converters is None:
                converters = _converters(batch.schema, name or "the table")
            if batch.nbytes > MAX_ROW:
                _check_rows(batch, place, number)
            watch.add(batch.nbytes)
            names = batch.schema.names
            columns = [
                _column(batch.column(index), converter, name, names[index], place, number)
                for index, converter in enumerate(converters)
            ]
            for values in zip(*columns, strict=True):
                number += 1
                yield Row(dict(zip(names, values, strict=True)), f"{place}{number}")


class _told:  # noqa: N801 (reads as a word at its `with`)
    """Turns whatever the Arrow library raises on a broken file into an error with its name."""

    def __init__(self, name: str, kind: str) -> None:
        self._name = name
        self._kind = kind

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception) or isinstance(error, TunesmithError):
            return
        if isinstance(error, MemoryError):
            problem = f"asks for more memory than there is ({_first_line(error)})"
            raise DataError(f"{self._name}: {problem}; it may be broken: write it again") from error
        raise DataError(
            f"{self._name}: not a whole {self._kind} file: {_first_line(error)}; write or fetch "
            "it again"
        ) from error


def _first_line(error: BaseException) -> str:
    return (next(iter(str(error).splitlines()), "") or type(error).__name__)[:200]


def _told_batches(batches: Iterator[Any], name: str, kind: str) -> Iterator[Any]:
    while True:
        with _told(name, kind):
            batch = next(batches, None)
            if batch is not None and kind == "arrow":
                batch.validate(full=True)  # offsets that lead out of the file would end the process
        if batch is None:
            return
        yield batch


def _slices(batch: Any) -> Iterator[Any]:
    """Yield a batch in parts that are small in Python, too."""
    rows = batch.num_rows
    step = max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(1, batch.nbytes)))
    for begin in range(0, rows, step):
        yield batch.slice(begin, step)


def _check_rows(batch: Any, place: str, number: int) -> None:
    for index in range(batch.num_rows):
        size = batch.slice(index, 1).nbytes
        if size > MAX_ROW:
            raise DataError(
                f"{place}{number + index + 1}: {size:,} bytes; a row may have {MAX_ROW:,}, as no "
                "model trains on more at once: split the row or drop the columns not needed"
            )


def _column(
    column: Any, converter: _Convert | None, name: str, field: str, place: str, number: int
) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist(maps_as_pydicts="strict")
        return values if converter is None else [*map(converter, values)]
    except Exception:
        # cell by cell, to say which one it is
        for index in range(len(column)):
            try:
                value = column[index].as_py(maps_as_pydicts="strict")
                if converter is not None:
                    converter(value)
            except Exception as error:
                raise DataError(
                    f"{place}{number + index + 1}: field '{field}': cannot be read: "
                    f"{_first_line(error)}; mend or drop the column"
                ) from error
        raise


# --- types ----------------------------------------------------------------------------------------


def _converters(schema: Any, name: str) -> list[_Convert | None]:
    twice = sorted({field for field in schema.names if schema.names.count(field) > 1})
    if twice:
        raise DataError(
            f"{name}: the column {listed(twice)} is there twice; give every column a name of "
            "its own"
        )
    try:
        return [_converter(field.type, 1) for field in schema]
    except _TwiceError as error:
        raise DataError(f"{name}: {error}; give every field a name of its own") from error
    except RecursionError as error:
        raise DataError(f"{name}: {_DEEP}") from error


_DEEP = f"columns nested more than {MAX_DEPTH} deep; write what lies deeper as JSON text"


class _TwiceError(Exception):
    """An object's type names two fields alike."""


def _converter(kind: Any, depth: int) -> _Convert | None:
    """Return what makes values of an Arrow type plain, or None where they are."""
    from pyarrow import types

    if depth > MAX_DEPTH:
        raise RecursionError
    if isinstance(kind, _extension_type()):
        if kind.extension_name == "arrow.json":
            return _json
        return _converter(kind.storage_type, depth)
    if types.is_struct(kind):
        names = [kind.field(index).name for index in range(kind.num_fields)]
        if len(set(names)) < len(names):
            raise _TwiceError(f"an object has two of the fields {listed(names)}")
        inner = {
            name: _converter(kind.field(index).type, depth + 1) for index, name in enumerate(names)
        }
        return lambda value: None if value is None else _object(value, inner)
    if types.is_map(kind):
        each = _converter(kind.item_type, depth + 1)
        return lambda value: None if value is None else _map(value, each)
    if _is_list(kind):
        item = _converter(kind.value_type, depth + 1)
        if item is None:
            return None
        return lambda value: None if value is None else [*map(item, value)]
    if types.is_dictionary(kind):
        return _converter(kind.value_type, depth)
    if types.is_run_end_encoded(kind):
        return _converter(kind.value_type, depth)
    plain = types.is_string(kind) or types.is_large_string(kind) or types.is_boolean(kind)
    if plain or types.is_integer(kind) or types.is_null(kind) or types.is_string_view(kind):
        return None
    if types.is_floating(kind):
        return None
    return lambda value: None if value is None else plain_scalar(value)


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return any(
        test(kind)
        for test in (
            types.is_list,
            types.is_large_list,
            types.is_fixed_size_list,
            types.is_list_view,
            types.is_large_list_view,
        )
    )


def _extension_type() -> Any:
    import pyarrow

    return pyarrow.BaseExtensionType


def _object(value: dict[str, Any], inner: dict[str, _Convert | None]) -> dict[str, Any]:
    row = {}
    for key, item in value.items():
        if item is not None:
            convert = inner[key]
            row[key] = item if convert is None else convert(item)
    return row


def _map(value: dict[Any, Any], convert: _Convert | None) -> dict[str, Any]:
    # a map's keys are its own, so its nulls are meant
    return {
        str(key): item if convert is None or item is None else convert(item)
        for key, item in value.items()
    }


def _json(value: str | None) -> Any:
    if value is None:
        return None
    try:
        return parse(value)
    except JsonError as error:
        raise ValueError(f"not valid JSON: {error}") from error
