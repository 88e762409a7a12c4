"""From a step's data description to examples: read, detect the format, convert, clean."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import attrs

from tunesmith.data.clean import Dropped
from tunesmith.data.examples import EXAMPLE_TYPES, Example, Sourced
from tunesmith.data.sources import Reading, Row, describe, refuse_iterator
from tunesmith.errors import DataError, PluginError, RowError, TunesmithError
from tunesmith.plugin.formats import Format
from tunesmith.plugin.registry import Registered, Registry

__all__ = ["LoadedData", "detect_format", "load_data"]

SAMPLE = 50
"""Rows that detection looks at."""
SHOWN = 5
"""Bad rows that are named; the rest are counted."""


@attrs.frozen
class LoadedData:
    """A step's data, read and understood."""

    description: str
    format: str
    examples: Sequence[Sourced] = attrs.field(repr=False)
    fingerprint: str
    """sha256 of all that decides the rows: content, formats, transforms."""
    held_out: Sequence[Sourced] = attrs.field(default=(), repr=False)
    """What a transform has held out, for a trainer to evaluate on."""
    dropped: tuple[Dropped, ...] = attrs.field(default=(), repr=False)
    """Rows that were left out, by transforms or since they could not be read, and why."""
    rows: int = 0
    """How many rows were read."""

    @property
    def shape(self) -> str:
        """Name of the examples' shape, a key of `EXAMPLE_TYPES`."""
        kind = type(self.examples[0].example)
        return next(name for name, cls in EXAMPLE_TYPES.items() if cls is kind)


def load_data(
    data: Any,
    format_name: str | None,
    registry: Registry,
    format_options: Mapping[str, Any] | None = None,
    *,
    drop_bad: bool = False,
) -> LoadedData:
    """Read one source and convert every row; `format_options` are those of the named format.

    With `drop_bad` a row that the format cannot read is left out and listed, as long as there is
    one that it can.

    Errors: `DataError` that lists what is wrong, with file and row; `PluginError` for a format that
    is unknown.
    """
    refuse_iterator(data)
    description = describe(data)
    # one pass: rows are dropped as soon as they are examples, and what is hashed is what was read
    reading = Reading(data, marked=True)
    rows = iter(reading)
    sample = list(islice(rows, SAMPLE))
    if format_name is None:
        item, reader = detect_format(sample, description, registry)
    else:
        item = registry.find("formats", format_name)
        reader = _reader(item, format_options or {})
    examples: list[Sourced] = []
    bad: list[str] = []
    dropped: list[Dropped] = []
    count = 0
    for row in chain(sample, rows):
        try:
            examples.append(Sourced(_example(reader, item, row), row.where))
        except DataError as error:
            count += 1
            if len(bad) < SHOWN:
                bad.append(str(error))
            if drop_bad:
                detail = str(error).removeprefix(f"{row.where}: ")
                dropped.append(Dropped(row.where, f"cannot be read as {item.spec.name}", detail))
    if bad and not (drop_bad and examples):
        if count > SHOWN:
            bad.append(f"... and {count - SHOWN} more rows of {reading.count} like these")
        remedy = "" if drop_bad else '; mend them, or leave such rows out by on_bad_row="drop"'
        raise DataError(f"read as {item.spec.name}:\n     " + "\n     ".join(bad) + remedy)
    _same_shape(examples, item)
    return LoadedData(
        description,
        item.spec.name,
        examples,
        reading.fingerprint(),
        dropped=tuple(dropped),
        rows=len(examples) + len(dropped),
    )


def _example(reader: Format[Any], item: Registered, row: Row) -> Example:
    """Return the example in a row; whatever the format raises becomes an error with its place."""
    try:
        example = reader.convert(row.values)
    except RowError as error:
        raise error.at(row.where) from error
    except TunesmithError as error:
        raise DataError(f"{row.where}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # a plugin's own fault, or a row it was not made for
        raise DataError(f"{row.where}: {_failed(item, error)}") from error
    if type(example) not in EXAMPLE_TYPES.values():
        raise DataError(
            f"{row.where}: the format '{item.key}' made a {type(example).__name__} of it; expected "
            f"one of {', '.join(kind.__name__ for kind in EXAMPLE_TYPES.values())}"
        )
    return example


def _failed(item: Registered, error: Exception) -> str:
    problem = next(iter(str(error).splitlines()), "")[:200]
    return (
        f"the format '{item.key}' failed with {type(error).__name__}: {problem}; mend the row, or "
        "name another format"
    )


def _same_shape(examples: Sequence[Sourced], item: Registered) -> None:
    first = examples[0]
    for other in examples:
        if type(other.example) is not type(first.example):
            raise DataError(
                f"{other.where}: the format '{item.key}' made a {type(other.example).__name__} of "
                f"it, and of {first.where} a {type(first.example).__name__}; give rows of one kind"
            )


def detect_format(
    rows: Sequence[Row], description: str, registry: Registry
) -> tuple[Registered, Format[Any]]:
    """Return the format that accounts for most fields of the first rows.

    Errors: `DataError` if none knows the rows, or two account for equally many fields.
    """
    sample = rows[:SAMPLE]
    scored: list[tuple[int, Registered, Format[Any]]] = []
    untried: list[str] = []
    for item in registry.of_kind("formats"):
        try:
            reader = _reader(item)
        except (TunesmithError, ImportError) as error:
            untried.append(f"the format '{item.key}' could not be tried: {error}")
            continue
        score = sum(_scores(reader, item, sample))
        if score > 0:
            scored.append((score, item, reader))
    if not scored:
        fields = ", ".join(sorted(map(str, sample[0].values)))[:500] or "none"
        known = "; ".join(
            f"{item.spec.name} ({item.spec.summary})" for item in registry.of_kind("formats")
        )
        raise DataError(
            f"{description}: no format knows rows with the fields {fields}; "
            f"known formats: {known}; rename the fields, or name a format"
            + "".join(f"; {problem}" for problem in untried)
        )
    scored.sort(key=lambda entry: -entry[0])
    best = [entry for entry in scored if entry[0] == scored[0][0]]
    if len(best) > 1:
        # a built-in is what a bare row means when a stranger claims the very same fields
        builtin = [entry for entry in best if entry[1].builtin]
        if len(builtin) == 1:
            best = builtin
        else:
            names = " or ".join(f'format="{item.key}"' for _, item, _ in best)
            raise DataError(f"{description}: {len(best)} formats fit equally well; give {names}")
    for problem in untried:  # it might have known the rows better
        chosen = best[0][1]
        warnings.warn(
            f"{description}: taken as {chosen.spec.name}; {problem}; give "
            f'format="{chosen.key}" to say that this is meant',
            stacklevel=2,
        )
    return best[0][1], best[0][2]


def _scores(reader: Format[Any], item: Registered, sample: Sequence[Row]) -> Iterator[int]:
    for row in sample:
        try:
            yield int(reader.recognise(row.values))
        except Exception as error:  # a plugin's own fault
            raise DataError(f"{row.where}: {_failed(item, error)}") from error


def _reader(item: Registered, options: Mapping[str, Any] | None = None) -> Format[Any]:
    try:
        reader: Format[Any] = item.load()(item.structure(options or {}))
    except (TunesmithError, ImportError):
        raise
    except Exception as error:  # a plugin's own fault
        raise PluginError(
            f"'{item.key}' cannot be used: it failed with {type(error).__name__}: {error}"
        ) from error
    return reader
