"""Interface of a transform: from examples to examples, before a trainer or a metric sees them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import ClassVar, Generic, TypeVar

import attrs

from tunesmith.data.clean import Drop, Dropped
from tunesmith.data.examples import EXAMPLE_TYPES, Sourced
from tunesmith.errors import PluginError

__all__ = ["Transform", "Transformed", "check_rows"]

C = TypeVar("C")


def _tuple(rows: Iterable[Sourced]) -> tuple[Sourced, ...]:
    return tuple(rows)


@attrs.frozen
class Transformed:
    """What a transform has made of its rows."""

    rows: tuple[Sourced, ...] = attrs.field(converter=_tuple)
    """Those that go on, to the next transform or to what they are for."""
    held_out: tuple[Sourced, ...] = attrs.field(default=(), converter=_tuple)
    """Those that a trainer evaluates on; no later transform sees them."""


class Transform(ABC, Generic[C]):
    """Takes out, changes, orders or adds rows of one step's data.

    Rows in are rows out and rows dropped: each row that is given is in what is returned, under its
    `where`, or was told to `drop` with a reason. The host holds it to that.
    """

    examples: ClassVar[tuple[str, ...]] = ()
    """Example shapes it takes, keys of `EXAMPLE_TYPES`; empty for any."""
    adds_rows: ClassVar[bool] = False
    """Whether it may return more rows than it was given; each bears the `where` of one that was."""

    def __init__(self, config: C) -> None:
        self.config = config

    @abstractmethod
    def apply(self, rows: Sequence[Sourced], *, seed: int, drop: Drop) -> Transformed:
        """Return the rows that go on, and those that are held out.

        The same rows and seed give the same result. `drop(where, reason)` records a row that is
        left out; the reason is the same words for the same cause, so that reasons can be counted.
        A row that was changed keeps its `where`. `rows` is not changed. Errors: `DataError` for
        rows or options that leave nothing.
        """


def check_rows(
    name: str,
    given: Sequence[Sourced],
    made: Transformed,
    dropped: Sequence[Dropped],
    *,
    adds_rows: bool,
) -> None:
    """Raise `PluginError` unless the rows given are those returned and those dropped."""
    if not isinstance(made, Transformed):
        raise PluginError(
            f"the transform '{name}' returned a {type(made).__name__}; it has to return "
            "tunesmith.plugin.transforms.Transformed"
        )
    for row in (*made.rows, *made.held_out):
        if not isinstance(row, Sourced) or type(row.example) not in EXAMPLE_TYPES.values():
            raise PluginError(
                f"the transform '{name}' returned a {type(row).__name__} among its rows; it has "
                f"to return Sourced examples: {', '.join(EXAMPLE_TYPES)}"
            )
    # several rows may bear one name: those of data in memory, or one that is used twice
    before = Counter(row.where for row in given)
    after = Counter(row.where for row in (*made.rows, *made.held_out))
    out = Counter(entry.where for entry in dropped)
    if lost := before - after - out:
        raise PluginError(
            f"the transform '{name}' lost {lost.total()} of {len(given)} rows, such as "
            f"{next(iter(lost))}: neither returned nor dropped; it has to tell `drop` of a row "
            "that it leaves out, and keep the `where` of one that it changes"
        )
    foreign = (after + out).keys() - before.keys()
    more = (after + out) - before
    if foreign or (more and not adds_rows) or out - before:
        shown = min(foreign) if foreign else next(iter(more))
        raise PluginError(
            f"the transform '{name}' was given {len(given)} rows, and returned "
            f"{after.total()} and dropped {out.total()}, such as {shown}; a row is returned or "
            "dropped, once, and one that is made of another bears its `where` (and needs "
            "adds_rows = True)"
        )
