"""Data of a plan: each source is read once, and goes through its transforms.

What a trainer's options ask for is done by the same transforms: rows with nothing to learn and
repeated rows are left out before a `Data`'s own, and its eval_split is held out after them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from tunesmith.data.clean import DropLog
from tunesmith.data.examples import EXAMPLE_TYPES, Sourced
from tunesmith.engine.dataset import LoadedData
from tunesmith.engine.readings import Readings
from tunesmith.errors import DataError, PluginError, TunesmithError
from tunesmith.plugin.registry import Registered, Registry
from tunesmith.plugin.transforms import Transformed, check_rows
from tunesmith.recipe import Data, plain
from tunesmith.recipe_data import Source, Transformation

__all__ = ["DataReader", "after", "before"]

CLEAN = Transformation("clean")
DEDUPLICATE = Transformation("deduplicate")


def before(config: Any) -> tuple[Transformation, ...]:
    """Return what a trainer's options do to the rows before the transforms of its data."""
    return (CLEAN, DEDUPLICATE) if config.deduplicate else (CLEAN,)


def after(config: Any) -> tuple[Transformation, ...]:
    """Return what a trainer's options do to the rows after the transforms of its data."""
    share = config.eval_split
    return (Transformation("split", {"held_out": share}),) if share else ()


class DataReader:
    """Reads the data of one plan; what several steps read is read once and shared."""

    def __init__(self, registry: Registry, readings: Readings | None = None) -> None:
        """Get ready to read, but for what `readings` have of an earlier plan."""
        self.registry = registry
        self._readings = readings or Readings()
        # with the data itself, so that no other object is given its id
        self._read: dict[Any, tuple[Any, LoadedData]] = {}

    def read(
        self,
        data: Data,
        *,
        seed: int,
        before: Sequence[Transformation] = (),
        after: Sequence[Transformation] = (),
        on_bad_row: str = "error",
    ) -> LoadedData:
        """Return data as its step gets it, what was left out on the way included.

        `on_bad_row` is for sources that say nothing of it. `before` is done with the rows of all
        sources, `after` with what their transforms leave. Errors: `DataError`, `PluginError` and
        `OptionError` with what is wrong and where.
        """
        leaves = list(_leaves(data))
        loaded = [self._source(leaf, leaf.on_bad_row or on_bad_row) for leaf in leaves]
        work = _Work(self.registry, seed)
        work.log.entries += [entry for each in loaded for entry in each.dropped]
        rows = [row for part in _named(leaves, loaded) for row in part]
        _one_shape(rows, "the sources")
        owner = {id(row): number for number, row in _numbered(rows, loaded)}
        kept = rows
        for step in before:
            kept = list(work.through(step, kept).rows)
        parts: list[list[Sourced]] = [[] for _ in leaves]
        for row in kept:
            parts[owner[id(row)]].append(row)
        description = _description(data, loaded)
        total = sum(each.rows for each in loaded)
        if not kept:
            raise DataError(_nothing(total, description, work.log))
        done = work.walk(data, iter(parts))
        for step in after:
            if not done.rows:
                break
            made = work.through(step, done.rows)
            done = Transformed(made.rows, (*done.held_out, *made.held_out))
        if not done.rows:
            raise DataError(_nothing(total, description, work.log))
        _one_shape((*done.rows, *done.held_out), "the transforms")
        return LoadedData(
            description,
            " + ".join(dict.fromkeys(each.format for each in loaded)),
            done.rows,
            self._fingerprint(data, iter(loaded)),
            held_out=done.held_out,
            dropped=tuple(work.log.entries),
            rows=total,
        )

    def _source(self, source: Source, on_bad_row: str) -> LoadedData:
        """Return a source as it is read; a second time the same."""
        data, options = source.data, source.format_options
        key: Any = (_key(data), source.format, repr(sorted(options.items())), on_bad_row)
        if key not in self._read:
            drop_bad = on_bad_row == "drop"
            found = self._readings.load(
                data, source.format, self.registry, options, drop_bad=drop_bad
            )
            self._read[key] = (data, found)
            if not options:  # also for who asks for the format that was detected
                self._read.setdefault((key[0], found.format, *key[2:]), (data, found))
        return self._read[key][1]

    def _fingerprint(self, data: Data, loaded: Iterator[LoadedData]) -> str:
        """Return a hash of all that decides the rows: that of the content, if there is no more."""
        if _is_plain(data):
            return next(loaded).fingerprint
        text = json.dumps(self._tree(data, loaded), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _tree(self, data: Data, loaded: Iterator[LoadedData]) -> Any:
        sources = []
        for source in data.sources:
            if isinstance(source.data, Data):
                row: dict[str, Any] = {"data": self._tree(source.data, loaded)}
            else:
                read = next(loaded)
                item = self.registry.find("formats", source.format or read.format)
                row = {
                    "sha256": read.fingerprint,
                    "format": self._identity(item, source.format_options),
                }
            if source.weight != 1:
                row["weight"] = self._transform(_weighed(source))
            sources.append(row)
        return [sources, [self._transform(each) for each in data.transforms]]

    def _transform(self, step: Transformation) -> Any:
        return self._identity(self.registry.find("transforms", step.plugin), step.options)

    def _identity(self, item: Registered, options: Mapping[str, Any]) -> Any:
        return [item.key, item.version, plain(attrs.asdict(item.structure(options)))]


@attrs.define
class _Work:
    """Transforms at work on one step's rows."""

    registry: Registry
    seed: int
    log: DropLog = attrs.field(factory=DropLog)

    def walk(self, data: Data, parts: Iterator[list[Sourced]]) -> Transformed:
        """Take each source's rows in turn, then go through the transforms."""
        rows: list[Sourced] = []
        held_out: list[Sourced] = []
        for source in data.sources:
            if isinstance(source.data, Data):
                made = self.walk(source.data, parts)
            else:
                made = Transformed(next(parts))
            held_out += made.held_out
            if source.weight != 1:
                made = self.through(_weighed(source), made.rows)
            rows += made.rows
        for step in data.transforms:
            made = self.through(step, rows)
            rows = list(made.rows)
            held_out += made.held_out
        return Transformed(rows, held_out)

    def through(self, step: Transformation, rows: Sequence[Sourced]) -> Transformed:
        """Return what one transform makes of rows; every row is accounted for."""
        item = self.registry.find("transforms", step.plugin)
        transform = item.load()(item.structure(step.options))
        name = item.spec.name if item.builtin else item.key
        shape = _shape(rows[0]) if rows else None
        if shape is not None and transform.examples and shape not in transform.examples:
            raise DataError(
                f"the transform '{name}' takes {' or '.join(transform.examples)} examples, and "
                f"these are {shape} examples; leave it out, or give other data"
            )
        log = DropLog()
        try:
            made: Transformed = transform.apply(tuple(rows), seed=self.seed, drop=log.add)
        except TunesmithError as error:
            raise DataError(f"the transform '{name}': {error}") from error
        except MemoryError:
            raise
        except Exception as error:  # a plugin's own fault
            raise PluginError(
                f"the transform '{item.key}' failed with {type(error).__name__}: {error}"
            ) from error
        check_rows(name, rows, made, log.entries, adds_rows=transform.adds_rows)
        self.log.entries += log.entries
        return made


def _leaves(data: Data) -> Iterator[Source]:
    for source in data.sources:
        if isinstance(source.data, Data):
            yield from _leaves(source.data)
        else:
            yield source


def _is_plain(data: Data) -> bool:
    """Return whether there is nothing but one source, read in a format with its defaults."""
    (first, *more), transforms = data.sources, data.transforms
    nested = isinstance(first.data, Data)
    return not (more or transforms or nested or first.format_options or first.weight != 1)


def _weighed(source: Source) -> Transformation:
    """Return what the weight of a source does."""
    return Transformation("sample", {"share": source.weight})


def _key(data: Any) -> Any:
    """Return what tells data from other data: the path or paths, or which object it is."""
    if isinstance(data, (str, os.PathLike)):
        return os.fsdecode(data)
    if isinstance(data, (list, tuple)) and all(isinstance(x, (str, os.PathLike)) for x in data):
        return tuple(map(os.fsdecode, data))
    return id(data)


def _named(leaves: Sequence[Source], loaded: Sequence[LoadedData]) -> Iterator[list[Sourced]]:
    """Yield each source's rows; of several, those of rows in memory are told apart."""
    for number, (leaf, read) in enumerate(zip(leaves, loaded, strict=True), 1):
        if len(leaves) == 1:
            yield list(read.examples)
            continue
        place = f"source {number}, " if isinstance(_key(leaf.data), int) else ""
        yield [Sourced(row.example, f"{place}{row.where}") for row in read.examples]


def _numbered(
    rows: Sequence[Sourced], loaded: Sequence[LoadedData]
) -> Iterator[tuple[int, Sourced]]:
    """Yield each row with the number of the source it came from."""
    every = iter(rows)
    for number, read in enumerate(loaded):
        for _ in read.examples:
            yield number, next(every)


def _shape(row: Sourced) -> str:
    return next(name for name, cls in EXAMPLE_TYPES.items() if cls is type(row.example))


def _one_shape(rows: Sequence[Sourced], whose: str) -> None:
    first = rows[0]
    for other in rows:
        if type(other.example) is not type(first.example):
            raise DataError(
                f"{whose} hold examples of several shapes: {first.where} is a {_shape(first)}, and "
                f"{other.where} a {_shape(other)}; give data of one shape, or name its format"
            )


def _description(data: Data, loaded: Sequence[LoadedData]) -> str:
    if _is_plain(data):
        return loaded[0].description
    return _told(data, iter(loaded))


def _told(data: Data, loaded: Iterator[LoadedData]) -> str:
    parts = []
    for source in data.sources:
        if isinstance(source.data, Data):
            text = f"({_told(source.data, loaded)})"
        else:
            text = next(loaded).description
        parts.append(text if source.weight == 1 else f"{text} x {source.weight:g}")
    return ", ".join([" + ".join(parts), *(each.plugin for each in data.transforms)])


def _nothing(total: int, description: str, log: DropLog) -> str:
    return f"every one of {total} rows of {description} was dropped: {log.reasons}"
