"""Data: where a step's rows come from and what is done with them first, as plain data.

In Python::

    Data("a.json").mix(Data("b.jsonl", format="alpaca"), weight=0.3).dedupe().split(0.1)

In a recipe file::

    data:
      sources:
        - a.json
        - data: b.jsonl
          format: alpaca
          weight: 0.3
      transforms:
        - transform: deduplicate
        - transform: split
          held_out: 0.1

Nothing here is read, and nothing here knows which formats and transforms exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs

from tunesmith.errors import RecipeError, close_matches, listed
from tunesmith.recipe_values import (
    check_finite,
    check_keys,
    check_name,
    frozen_options,
    plain,
    plain_data,
    shown,
)

__all__ = ["ON_BAD_ROW", "Data", "Source", "Transformation"]

ON_BAD_ROW = ("error", "drop")
"""What can be done about a row that its format cannot read."""


@attrs.frozen
class Transformation:
    """A transform by its plugin's name, with the options given to it."""

    plugin: str
    options: Mapping[str, Any] = attrs.field(factory=dict, converter=frozen_options)

    def __attrs_post_init__(self) -> None:
        check_name(self.plugin, "'transform'")

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values; see `Data.to_dict`."""
        given = {key: plain(value) for key, value in self.options.items()}
        if given.keys() & {"transform", "with"}:
            return {"transform": self.plugin, "with": given}
        return {"transform": self.plugin, **given}

    @classmethod
    def from_dict(cls, row: Any) -> Transformation:
        """Read one from a mapping, or from the name of a transform that is given no options."""
        if isinstance(row, str):
            return cls(row)
        if not isinstance(row, Mapping) or "transform" not in row:
            raise RecipeError(
                f"got {shown(row)}; expected a mapping such as 'transform: limit' with its options"
            )
        check_keys(row, "a transform")
        options = {key: value for key, value in row.items() if key not in ("transform", "with")}
        extra = row.get("with", {})
        if not isinstance(extra, Mapping):
            raise RecipeError(f"'with' is {shown(extra)}; expected a mapping of options")
        check_keys(extra, "a transform: 'with'")
        if twice := options.keys() & extra.keys():
            raise RecipeError(
                f"{listed(twice)} given beside 'with' and in it; give it in one place"
            )
        check_finite({**options, **extra}, "an option")
        return cls(row["transform"], {**options, **extra})


@attrs.frozen
class Source:
    """One place that rows come from, read in a format of its own."""

    data: Any
    """Path or paths, hub id, `datasets.Dataset`, rows; or a `Data` with transforms of its own."""
    format: str | None = None
    """Name of the data format; None detects it from the rows."""
    format_options: Mapping[str, Any] = attrs.field(factory=dict, converter=frozen_options)
    """Options of the format."""
    weight: float = 1.0
    """How much of it is used: 0.3 is three rows in ten, chosen by the seed, 2 is each row twice."""
    on_bad_row: str | None = None
    """What is done about a row that the format cannot read: "error", or "drop", which lists it;
    None is as the step says."""

    def __attrs_post_init__(self) -> None:
        if self.on_bad_row not in (None, *ON_BAD_ROW):
            raise RecipeError(
                f"'on_bad_row' is {shown(self.on_bad_row)}; expected one of {listed(ON_BAD_ROW)}"
            )
        if self.format is not None:
            check_name(self.format, "'format'")
        if self.format_options and self.format is None:
            raise RecipeError(
                f"options of a format without its name: {listed(self.format_options)}; give format"
            )
        if isinstance(self.data, Data) and self.format is not None:
            raise RecipeError(
                "'format' beside a Data, each source of which has a format of its own; give it "
                "there, as in Data(source, format=...)"
            )
        if self.data is None:
            raise RecipeError("a source without data; give a file, a hub id or rows")
        weight = self.weight
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight <= 0:
            raise RecipeError(
                f"'weight' is {shown(weight)}; expected a number above 0: 0.3 for three rows in "
                "ten, 2 for each row twice"
            )

    def to_dict(self) -> Any:
        """Return it as plain values: the data alone where there is nothing else to say."""
        data = self.data.to_dict() if isinstance(self.data, Data) else plain_data(self.data)
        row: dict[str, Any] = {"data": data}
        if self.format is not None:
            row["format"] = self.format
        if self.format_options:
            row["format_options"] = plain(self.format_options)
        if self.weight != 1:
            row["weight"] = plain(self.weight)
        if self.on_bad_row is not None:
            row["on_bad_row"] = self.on_bad_row
        return data if len(row) == 1 and isinstance(data, str) else row

    @classmethod
    def from_dict(cls, row: Any) -> Source:
        """Read one from a mapping, or from a path or hub id."""
        if not isinstance(row, Mapping):
            return cls(row)
        if "sources" in row:
            return cls(Data.from_dict(row))
        _check_known(row, cls, "a source")
        given = dict(row)
        if isinstance(given.get("data"), Mapping):
            given["data"] = Data.from_dict(given["data"])
        options = given.get("format_options", {})
        if not isinstance(options, Mapping):
            raise RecipeError(f"'format_options' is {shown(options)}; expected a mapping")
        check_keys(options, "'format_options'")
        check_finite(options, "an option")
        return cls(given.pop("data", None), **given)


@attrs.frozen(init=False)
class Data:
    """Rows to be read and what is done with them: immutable and lazy, so branching is safe.

    `source` is a path or paths, a hub id, a `datasets.Dataset`, or a list of dicts; `format` names
    its format instead of detecting it, and further options are that format's. `on_bad_row` is
    "error", or "drop" to leave out rows that the format cannot read, and list them; unset, the step
    says which. Nothing is read before a plan is made. Each method returns a new `Data`. Errors:
    `RecipeError` for what a recipe cannot hold; what a transform does not take is found by the step
    that is given the data.
    """

    sources: tuple[Source, ...]
    transforms: tuple[Transformation, ...] = ()
    """What is done with the rows of all sources, in order."""

    def __init__(
        self,
        source: Any,
        *,
        format: str | None = None,
        on_bad_row: str | None = None,
        **format_options: Any,
    ) -> None:
        one = Source(source, format, format_options, on_bad_row=on_bad_row)
        self.__attrs_init__((one,))

    @classmethod
    def of(cls, data: Any, format: str | None = None) -> Data:
        """Return what a short form stands for; a `Data` is returned as it is."""
        return data if isinstance(data, cls) and format is None else cls(data, format=format)

    @property
    def is_transformed(self) -> bool:
        """Whether its rows, or those of a source, go through transforms of its own."""
        nested = [each.data for each in self.sources if isinstance(each.data, Data)]
        return bool(self.transforms) or any(each.is_transformed for each in nested)

    @property
    def every_transform(self) -> tuple[Transformation, ...]:
        """All its transforms, those of its sources first."""
        nested = [each.data for each in self.sources if isinstance(each.data, Data)]
        return (*(t for data in nested for t in data.every_transform), *self.transforms)

    def with_sources(self, change: Callable[[Any], Any]) -> Data:
        """Return it with what each source is read from changed, which may be a `Data` itself."""
        sources = [attrs.evolve(each, data=change(each.data)) for each in self.sources]
        return self._made(sources, self.transforms)

    def transform(self, plugin: str, **options: Any) -> Data:
        """Have the rows go through any installed transform, by name."""
        return self._made(self.sources, (*self.transforms, Transformation(plugin, options)))

    def clean(self) -> Data:
        """Leave out rows that have nothing to learn from."""
        return self.transform("clean")

    def dedupe(self) -> Data:
        """Leave out rows that say exactly what an earlier one says."""
        return self.transform("deduplicate")

    def sample(self, share: float) -> Data:
        """Use this share of the rows, chosen by the seed; 2 is each row twice."""
        return self.transform("sample", share=share)

    def limit(self, rows: int) -> Data:
        """Use the first so many rows."""
        return self.transform("limit", rows=rows)

    def split(self, held_out: float) -> Data:
        """Hold out a share (below 1) or a number of rows, which a trainer evaluates on."""
        return self.transform("split", held_out=held_out)

    def mix(self, other: Any, *, weight: float = 1.0, format: str | None = None) -> Data:
        """Have the rows of another source, or `Data`, follow; `weight` says how much of it is used.

        0.3 is three rows in ten, chosen by the seed, and 2 is each row twice: shares as in the
        dataset mixer of the alignment handbook.
        """
        mine = (Source(self),) if self.transforms else self.sources
        theirs = Data.of(other, format)
        Source(theirs, weight=weight)  # refuses what is no weight
        if theirs.transforms or (len(theirs.sources) > 1 and weight != 1):
            return self._made((*mine, Source(theirs, weight=weight)))
        scaled = [
            attrs.evolve(each, weight=each.weight * weight) if weight != 1 else each
            for each in theirs.sources
        ]
        return self._made((*mine, *scaled))

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values; refuse data that a file cannot hold."""
        row: dict[str, Any] = {"sources": [each.to_dict() for each in self.sources]}
        if self.transforms:
            row["transforms"] = [each.to_dict() for each in self.transforms]
        return row

    @classmethod
    def from_dict(cls, row: Any) -> Data:
        """Read it from a mapping with the keys sources and transforms."""
        if not isinstance(row, Mapping):
            raise RecipeError(f"data: got {shown(row)}; expected a mapping with 'sources'")
        _check_known(row, cls, "data")
        sources, transforms = row.get("sources"), row.get("transforms") or ()
        if not _is_list(sources) or not sources:
            raise RecipeError(f"data: 'sources' is {shown(sources)}; expected a list of sources")
        if not _is_list(transforms):
            raise RecipeError(
                f"data: 'transforms' is {shown(transforms)}; expected a list of transforms"
            )
        return cls._made(
            _each(Source.from_dict, sources, "source"),
            _each(Transformation.from_dict, transforms, "transform"),
        )

    @classmethod
    def _made(cls, sources: Iterable[Source], transforms: Iterable[Transformation] = ()) -> Data:
        made = cls.__new__(cls)
        made.__attrs_init__(tuple(sources), tuple(transforms))
        return made


def _each(read: Any, rows: Sequence[Any], what: str) -> list[Any]:
    made = []
    for number, row in enumerate(rows, 1):
        try:
            made.append(read(row))
        except RecipeError as error:
            raise RecipeError(f"data: {what} {number}: {error}") from error
    return made


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _check_known(row: Mapping[Any, Any], cls: type[Any], what: str) -> None:
    check_keys(row, what)
    known = [field.name for field in attrs.fields(cls)]
    for key in row:
        if key not in known:
            raise RecipeError(
                f"{what}: unknown key '{key[:100]}'{close_matches(key[:100], known)}; its keys "
                f"are: {', '.join(known)}"
            )
