"""How large a row and all rows together may be, and how much memory is left for them."""

from __future__ import annotations

import sys
from pathlib import Path

from tunesmith.errors import DataError
from tunesmith.units import byte_size

__all__ = ["MAX_BLANK", "MAX_ROW", "MemoryWatch", "all_blank", "free_memory", "too_long"]

MAX_ROW = 4 * 1024 * 1024
"""Characters of the longest row as its source holds it: a million tokens, the longest context."""

MAX_BLANK = 100_000
"""Blank lines that may follow each other."""

RESERVE = 300_000_000
"""Bytes that reading leaves to everything else."""
_STRIDE = 8_000_000
"""Bytes read between two looks at the memory."""
_JUDGED = 32_000_000
"""Bytes read before the growth so far says how large all rows will be."""


def too_long(where: str, got: str = "") -> DataError:
    """Return the error for a row beyond `MAX_ROW`."""
    return DataError(
        f"{where}: {got or 'longer than'} {MAX_ROW:,} characters, the most a row may have; no "
        "model trains on as much at once: split the row or drop the fields that are not needed"
    )


def all_blank(where: str) -> DataError:
    """Return the error for more blank lines than a file of rows has."""
    return DataError(
        f"{where}: {MAX_BLANK:,} blank lines in a row; expected rows, so look at the file and "
        "write it again"
    )


class MemoryWatch:
    """Stops reading before the machine's memory is used up, with an error that says so.

    The system ends a process that asks for more memory than there is, without a word and with all
    that it held. So memory is looked at on the way, and what is still to come is judged by what
    has come.
    """

    def __init__(self, name: str, total: int | None) -> None:
        """Watch over reading `total` bytes; None if nobody knows how many there are."""
        self._name = name
        self._total = total
        self._seen = 0
        self._next = _STRIDE
        self._begun = _resident_memory()
        if total is not None and total > _JUDGED and total > (free := free_memory()) - RESERVE:
            raise DataError(self._message(f"is {byte_size(total)} large", free))

    def add(self, count: int, done: int = 0) -> None:
        """Count bytes that hold rows, at `done` of the total; raise where the rest will not fit."""
        self._seen += count
        if self._seen < self._next:
            return
        self._next = self._seen + _STRIDE
        free = free_memory()
        if free < RESERVE:
            raise DataError(self._message(f"has taken all memory after {self._read()}", free))
        if self._total and done and self._seen >= _JUDGED:
            grown = max(0, _resident_memory() - self._begun)
            coming = grown * (self._total - done) / done
            if coming > free - RESERVE:
                problem = f"will need {byte_size(grown + coming)} as rows, judged by {self._read()}"
                raise DataError(self._message(problem, free))

    def _read(self) -> str:
        return f"{byte_size(self._seen)} read"

    def _message(self, problem: str, free: int) -> str:
        return (
            f"{self._name}: {problem}, and {byte_size(max(0, free))} of memory are free; split "
            "the data, take a sample of it, or use a machine with more memory"
        )


def free_memory() -> int:
    """Return the bytes this process can still take: of the machine, its container, its limits."""
    import psutil

    free: int = psutil.virtual_memory().available
    for limit, used, cache in _CGROUPS:
        try:
            taken = int(Path(used).read_text()) - _cached(Path(cache))
            free = min(free, int(Path(limit).read_text()) - taken)
        except (OSError, ValueError):  # no such group, or "max"
            continue
    if sys.platform != "win32":
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        if most != resource.RLIM_INFINITY:
            free = min(free, most - psutil.Process().memory_info().vms)
    return free


_CGROUPS = (
    (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory.current",
        "/sys/fs/cgroup/memory.stat",
    ),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
"""Limit, use and statistics of a container's memory, in the second and the first version."""


def _cached(statistics: Path) -> int:
    """Return the bytes of a group that the system gives back when asked: cached files."""
    for line in statistics.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _resident_memory() -> int:
    import psutil

    resident: int = psutil.Process().memory_info().rss
    return resident
