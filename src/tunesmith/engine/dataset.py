"""From a step's data description to examples: read, detect the format, convert, clean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs

from tunesmith.data.examples import EXAMPLE_TYPES, Sourced
from tunesmith.data.sources import Row, describe, fingerprint, read_rows
from tunesmith.errors import DataError, RowError
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
    examples: Sequence[Sourced]
    fingerprint: str
    """sha256 of the content."""

    @property
    def shape(self) -> str:
        """Name of the examples' shape, a key of `EXAMPLE_TYPES`."""
        kind = type(self.examples[0].example)
        return next(name for name, cls in EXAMPLE_TYPES.items() if cls is kind)


def load_data(data: Any, format_name: str | None, registry: Registry) -> LoadedData:
    """Read data and convert every row.

    Errors: `DataError` that lists what is wrong, with file and row; `PluginError` for a format that
    is unknown.
    """
    rows = read_rows(data)
    description = describe(data)
    if not rows:
        raise DataError(f"{description}: holds no rows; expected at least one")
    if format_name is None:
        item, reader = detect_format(rows, description, registry)
    else:
        item = registry.find("formats", format_name)
        reader = _reader(item)
    examples: list[Sourced] = []
    bad: list[RowError] = []
    for row in rows:
        try:
            examples.append(Sourced(reader.convert(row.values), row.where))
        except RowError as error:
            bad.append(error.at(row.where))
    if bad:
        lines = [str(error) for error in bad[:SHOWN]]
        if len(bad) > SHOWN:
            lines.append(f"... and {len(bad) - SHOWN} more rows of {len(rows)} like these")
        raise DataError(f"read as {item.spec.name}:\n     " + "\n     ".join(lines))
    return LoadedData(description, item.spec.name, examples, fingerprint(data))


def detect_format(
    rows: Sequence[Row], description: str, registry: Registry
) -> tuple[Registered, Format[Any]]:
    """Return the format that accounts for most fields of the first rows.

    Errors: `DataError` if none knows the rows, or two account for equally many fields.
    """
    sample = rows[:SAMPLE]
    scored: list[tuple[int, Registered, Format[Any]]] = []
    for item in registry.of_kind("formats"):
        try:
            reader = _reader(item)
        except Exception:
            continue
        score = sum(reader.recognise(row.values) for row in sample)
        if score > 0:
            scored.append((score, item, reader))
    if not scored:
        fields = ", ".join(sorted(map(str, sample[0].values))) or "none"
        known = "; ".join(
            f"{item.spec.name} ({item.spec.summary})" for item in registry.of_kind("formats")
        )
        raise DataError(
            f"{description}: no format knows rows with the fields {fields}; "
            f"known formats: {known}; rename the fields, or name a format"
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
    return best[0][1], best[0][2]


def _reader(item: Registered) -> Format[Any]:
    reader: Format[Any] = item.load()(item.structure({}))
    return reader
