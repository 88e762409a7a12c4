"""Files and directories that are complete or not there, and removal that stays inside a directory.

What is written lies beside its place first, is synced with its directory, and then renamed; a
process or a machine may stop at any moment. No symbolic link is followed for writing or removing.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tunesmith.errors import RunError, TunesmithError
from tunesmith.units import byte_size

__all__ = [
    "DRAFT",
    "created",
    "draft_of",
    "error_number",
    "free_name",
    "inside",
    "publish",
    "remove",
    "require_room",
    "sync_directory",
    "sync_tree",
    "told",
    "write_text",
]

DRAFT = re.compile(r"\.(?P<name>.+)\.\d+\.draft")
"""Name of a file or directory that was being written when a process ended."""

MARGIN = 1 << 20
"""Bytes that must stay free beside what is written: directories, logs, JSON."""

ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within the quota",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`)",
    errno.EROFS: "make it writable, or move the run directory to where it can be written",
    errno.EACCES: "mend its permissions",
    errno.EPERM: "mend its permissions",
    errno.EIO: "look at the health of the disk",
    errno.ENOTDIR: "remove the file that stands where a directory is meant",
    errno.EISDIR: "remove the directory that stands where a file is meant",
    errno.ELOOP: "remove the link that stands there",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.ENAMETOOLONG: "choose a shorter path",
}
"""What to do about each kind of failed write."""

WRITES_ONLY = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


def draft_of(path: Path) -> Path:
    """Return where something is written before it takes its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.draft")


def write_text(path: Path, text: str) -> None:
    """Write a file that is there as it was, or whole."""
    draft = draft_of(path)
    with told(path):
        draft.unlink(missing_ok=True)
        try:
            with created(draft) as stream:
                stream.write(text.encode())
            draft.replace(path)
        except BaseException:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


class _Created:
    """A new file, open for writing bytes; synced when it is closed without an error."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        self._stream = open(os.open(path, flags, 0o666), "wb")  # noqa: SIM115

    def write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)

    def __enter__(self) -> _Created:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
        finally:
            self._stream.close()


def created(path: Path) -> _Created:
    """Open a file that must not be there yet."""
    return _Created(path)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory outlast a power cut, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_tree(directory: Path, leave_out: str = "") -> None:
    """Sync every file and directory below and including this one, but for a directory in it."""
    for folder, _, names in os.walk(directory, topdown=False):
        if leave_out and Path(folder).is_relative_to(directory / leave_out):
            continue
        for name in names:
            path = Path(folder, name)
            if path.is_symlink():
                continue
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))


def publish(draft: Path, final: Path) -> None:
    """Give a directory whose files are synced its name; nothing may stand there."""
    sync_directory(draft)
    draft.rename(final)
    sync_directory(final.parent)


def remove(path: Path, root: Path) -> None:
    """Remove a file, a link or a tree that lies inside `root`, following no link."""
    if not inside(path, root):
        raise RunError(f"{path}: does not lie inside {root}; it is not removed")
    with told(path):
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)


def inside(path: Path, root: Path) -> bool:
    """Return whether an entry lies in a directory or below it, links on the way resolved."""
    parent, base = os.path.realpath(path.parent), os.path.realpath(root)
    return parent == base or parent.startswith(base + os.sep)


def free_name(directory: Path, name: str) -> Path:
    """Return a path in a directory that nothing stands at: the name, or with a number behind."""
    path = directory / name
    number = 1
    while os.path.lexists(path):
        number += 1
        path = directory / f"{name}-{number}"
    return path


def require_room(directory: Path, need: int, what: str, kept: str = "") -> None:
    """Refuse to write so many bytes where they do not fit; says what is free and what is kept."""
    free = shutil.disk_usage(directory).free
    if free < need + MARGIN:
        raise RunError(
            f"{directory}: {what} needs {byte_size(need)} and {byte_size(free)} are free"
            f"{_and(kept)}; make room, and run the same again"
        )


@contextmanager
def told(
    path: Path,
    *,
    need: int | None = None,
    kept: Callable[[], str] | None = None,
    within: Path | None = None,
) -> Iterator[None]:
    """Say a failed write in tunesmith's words: which path, why, what is kept, what to do.

    With `within`, work that also reads is inside: then what only a write can meet is told, and what
    a reader can meet, too, where the error names a path in that directory.
    """
    try:
        yield
    except TunesmithError:
        raise
    except Exception as error:
        number = error_number(error)
        where = _place(error) or path
        if any(map(DRAFT.fullmatch, where.parts)):
            where = path  # the name that it would have got
        if number not in ADVICE or (
            within is not None and number not in WRITES_ONLY and not inside(where, within)
        ):
            raise
        asked = f"; it needs {byte_size(need)}" if need else ""
        raise RunError(
            f"{where}: cannot be written: {os.strerror(number).lower()}{asked}"
            f"{_and(kept() if kept else '')}; {ADVICE[number]}, and run the same again"
        ) from error


def error_number(error: BaseException) -> int | None:
    """Return the errno of a failed write, also of a library that has it in its text only."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        # as Rust writes it, and with it safetensors and tokenizers
        found = re.search(r"\(os error (\d+)\)", str(seen))
        if found:
            return int(found[1])
        seen = seen.__cause__
    return None


def _place(error: BaseException) -> Path | None:
    """Return the path that an error names, also of a library that has it in its text only."""
    named = getattr(error, "filename", None)
    if isinstance(named, (str, bytes)):
        return Path(os.fsdecode(named))
    found = re.search(r'at path "([^"]+)"', str(error))
    return Path(found[1]) if found else None


def _and(text: str) -> str:
    return f"; {text}" if text else ""
