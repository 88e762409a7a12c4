"""Objects of this process to rows: data sets, frames, tables, lists of mappings; and hub ids."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tunesmith.data.reading.arrow_rows import batch_rows
from tunesmith.data.reading.bounds import MemoryWatch
from tunesmith.data.reading.plain import plain_row
from tunesmith.data.reading.row import Row
from tunesmith.data.reading.words import kind_of
from tunesmith.errors import DataError, TunesmithError, listed

__all__ = ["hub_rows", "object_rows", "split_of"]

_ROW_BYTES = 1000
"""What a row of this process is counted as; its values are there already."""


def hub_rows(name: str) -> Iterator[Row]:
    """Yield the rows of a hub data set, given as "owner/name" or "owner/name:split"."""
    import datasets

    repository, _, split = name.partition(":")
    split = split or "train"
    try:
        rows = datasets.load_dataset(repository, split=split)
    except Exception as error:  # each of hub, network, cache and builder raises its own kind
        problem = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(
            f"'{name}' is no file or directory here, and the split '{split}' of a hub data set "
            f"'{repository}' cannot be loaded: {problem[:300]}; check the spelling, the network, "
            "or name another split as 'owner/name:split'"
        ) from error
    yield from object_rows(rows, f"{repository}[{split}]")


def split_of(data: Any) -> tuple[Any, str]:
    """Return the data set to read and the name of its split, "" where there are no splits.

    Of a dict of data sets it is 'train', or the only one there is.
    """
    datasets = _imported("datasets")
    if datasets is None or not isinstance(
        data, (datasets.DatasetDict, datasets.IterableDatasetDict)
    ):
        return data, ""
    split = "train" if "train" in data else next(iter(data), "") if len(data) == 1 else ""
    if not split:
        raise DataError(
            f"got a {type(data).__name__} with the splits {listed(map(str, data))}; expected one "
            "with a 'train' split, or with a single one; pass one of its splits, such as "
            f"data[{next(iter(data), 'train')!r}]"
        )
    return data[split], str(split)


def object_rows(data: Any, prefix: str = "") -> Iterator[Row]:
    """Yield the rows of an object; `prefix` begins each row's place."""
    data, split = split_of(data)
    prefix = prefix or split
    datasets, pandas = _imported("datasets"), _imported("pandas")
    if datasets is not None and isinstance(data, datasets.Dataset):
        return _data_set_rows(data, prefix)
    if datasets is not None and isinstance(data, datasets.IterableDataset):
        return _streamed_rows(data, prefix)
    if pandas is not None and isinstance(data, pandas.DataFrame):
        return _frame_rows(data, prefix)
    if isinstance(data, Mapping):
        raise DataError(
            f"got a {type(data).__name__} with the keys {listed(map(str, data))[:200]}; expected "
            "a list of mappings, one a row; put a single row in a list"
        )
    if hasattr(data, "__arrow_c_stream__") and not isinstance(data, (list, tuple)):
        return _stream_rows(data, prefix)
    for method in ("to_dicts", "to_pylist"):  # tables of older libraries
        if hasattr(data, method):
            return _mapping_rows(getattr(data, method)(), prefix)
    if isinstance(data, (bytes, bytearray)) or not isinstance(data, Iterable):
        hint = "; collect() it first" if hasattr(data, "collect") else ""
        raise DataError(
            f"got {kind_of(data)} as data; expected a path, a list of paths, a hub id "
            f"'owner/name', a datasets.Dataset, a data frame, or a list of mappings{hint}"
        )
    return _mapping_rows(data, prefix)


def _imported(name: str) -> Any:
    # looked up rather than imported: whoever holds an object of a library has imported it
    return sys.modules.get(name)


def _place(prefix: str) -> str:
    return f"{prefix}, row " if prefix else "row "


def _mapping_rows(data: Iterable[Any], prefix: str, *, nan_is_null: bool = False) -> Iterator[Row]:
    place = _place(prefix)
    watch = MemoryWatch(prefix or "the rows", None)
    for number, values in enumerate(_told(data, place), 1):
        where = f"{place}{number}"
        if isinstance(values, (str, os.PathLike)):
            raise DataError(
                f"{where}: got the text {str(values)[:60]!r} among other things; expected "
                "either only paths or only mappings"
            )
        if not isinstance(values, Mapping):
            raise DataError(f"{where}: got {kind_of(values)}; expected a mapping of field to value")
        watch.add(_ROW_BYTES)
        yield Row(plain_row(values, where, nan_is_null=nan_is_null), where)


def _told(data: Iterable[Any], place: str) -> Iterator[Any]:
    """Yield what an iterable gives; tell its errors with the row before which they came."""
    number = 0
    try:
        items = iter(data)
    except Exception as error:
        raise DataError(f"got {kind_of(data)}, which cannot be read: {_named(error)}") from error
    while True:
        number += 1
        try:
            item = next(items)
        except StopIteration:
            return
        except (TunesmithError, MemoryError):
            raise
        except Exception as error:  # of whatever the iterable is made of
            raise DataError(f"{place}{number}: cannot be read: {_named(error)}") from error
        yield item


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"


def _data_set_rows(data: Any, prefix: str) -> Iterator[Row]:
    kind = data.format["type"]
    if kind == "custom":  # a transform is part of what its author means by a row
        return _mapping_rows(data, prefix)
    columns = data.format["columns"]
    if columns is not None and list(columns) != list(data.column_names):
        data = data.select_columns(list(columns))
    # not as numpy, torch or pandas show it: the rows are the same, and lists stay lists
    tables = data.with_format("arrow").iter(batch_size=1000)
    return batch_rows(_batches(tables, prefix), prefix, prefix or "the data set")


def _streamed_rows(data: Any, prefix: str) -> Iterator[Row]:
    if data.features is None:  # nobody knows the types before the rows are there
        return _mapping_rows(data, prefix)
    tables = data.with_format("arrow").iter(batch_size=1000)
    return batch_rows(_batches(tables, prefix), prefix, prefix or "the data set")


def _stream_rows(data: Any, prefix: str) -> Iterator[Row]:
    import pyarrow

    def tables() -> Iterator[Any]:
        # looked at as a whole, since the schema stands in the stream
        yield data if isinstance(data, pyarrow.Table) else pyarrow.table(data)

    return batch_rows(_batches(tables(), prefix), prefix, prefix or f"the {type(data).__name__}")


def _batches(tables: Iterable[Any], prefix: str) -> Iterator[Any]:
    for table in _told(tables, _place(prefix)):
        yield from table.to_batches()


def _frame_rows(frame: Any, prefix: str) -> Iterator[Row]:
    names = [name if isinstance(name, str) else str(name) for name in frame.columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"got a {type(frame).__name__} with the column {listed(twice)} twice; give every "
            "column a name of its own"
        )
    # NaN is how pandas writes "nothing stands here", also in columns of text
    rows = (
        dict(zip(names, values, strict=True)) for values in frame.itertuples(index=False, name=None)
    )
    return _mapping_rows(rows, prefix, nan_is_null=True)
