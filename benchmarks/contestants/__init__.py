"""Everyone who runs. A contestant is one function in one of these modules; `of` finds them."""

from __future__ import annotations

from benchmarks.contestants import bnb, isa, memory, ours, peft, plain, torchao
from benchmarks.contestants.entry import Contestant, Entry, Unavailable

__all__ = ["Contestant", "Entry", "Unavailable", "of"]

_ALL: tuple[Contestant, ...] = (
    *ours.CONTESTANTS,
    *bnb.CONTESTANTS,
    *peft.CONTESTANTS,
    *torchao.CONTESTANTS,
    *plain.CONTESTANTS,
    *memory.CONTESTANTS,
    *isa.CONTESTANTS,
)


def of(suite: str) -> tuple[Contestant, ...]:
    """Return a suite's contestants in the order of the table, ours first."""
    return tuple(each for each in _ALL if suite in each.suites)
