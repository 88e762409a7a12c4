"""One run at a time in a directory: an advisory lock, and who holds it."""

from __future__ import annotations

import json
import os
import platform
import stat
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from tunesmith.engine.durable import told
from tunesmith.errors import RunError

__all__ = ["LOCK", "DirectoryLock", "holder_of"]

LOCK = "run.lock"
WIDTH = 256
"""Bytes of the holder's record: written at once, so that a reader meets a whole one."""
PATIENCE = 2.0
"""Seconds in which a holder that has just begun will have written who it is."""


class DirectoryLock:
    """Holds a directory's lock; a context manager.

    Errors: `RunError` names the process that holds it.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        with told(self.path):
            descriptor = self._opened()
        try:
            self._take(descriptor)
            with told(self.path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, _record(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._descriptor is not None
        os.close(self._descriptor)
        self._descriptor = None

    def _opened(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(self.path, flags, 0o666)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(descriptor)
            raise RunError(
                f"{self.path}: is not a file of its own; remove it, or choose another directory"
            )
        return descriptor

    def _take(self, descriptor: int) -> None:
        try:
            import fcntl
        except ImportError:  # not a POSIX system: no lock to be had
            return
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                holder = _holder(os.pread(descriptor, WIDTH, 0))
            if holder is None and time.monotonic() < until:
                time.sleep(0.01)  # it has the lock and has not yet said who it is
                continue
            raise RunError(
                f"run directory {self.path.parent}: in use by "
                f"{holder or 'another process that has just begun'}; wait for it, or choose "
                "another directory"
            )


def holder_of(directory: Path) -> str | None:
    """Return which process holds a directory's lock, or None; nothing is written."""
    try:
        import fcntl

        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(directory / LOCK, flags)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _holder(os.pread(descriptor, WIDTH, 0)) or "another process that has just begun"
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)


def _record() -> bytes:
    own = {"pid": os.getpid(), "began": _began(os.getpid()), "host": platform.node()}
    return json.dumps(own).encode().ljust(WIDTH)[:WIDTH]


def _holder(record: bytes) -> str | None:
    """Return who wrote a record, or None if it is none or of a process that is no more."""
    try:
        row = json.loads(record)
        pid, began, host = int(row["pid"]), row["began"], str(row["host"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if host != platform.node():
        return f"process {pid} on {host}"
    if pid == os.getpid():
        return f"process {pid}, which is this one"
    if pid <= 0 or began != _began(pid):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # it is another user's
    return f"process {pid}"


def _began(pid: int) -> str | None:
    """Return when a process began, by which its number is told from a later one's; or None."""
    try:
        # the name of the program, in brackets, may hold anything
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
