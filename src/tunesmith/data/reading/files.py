"""Paths to files, and files to bytes: found, opened, unpacked within bounds, and hashed."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs

from tunesmith.data.reading.bounds import MemoryWatch
from tunesmith.errors import DataError, listed
from tunesmith.strict_json import JsonError, parse
from tunesmith.units import byte_size

__all__ = [
    "SUFFIXES",
    "File",
    "Stream",
    "files_of",
    "is_hub_id",
    "is_path",
    "is_paths",
    "not_utf8",
    "opened",
    "seekable",
    "suffix_of",
]

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
"""Suffixes of the files that can be read; each may be followed by ".gz"."""

_CHUNK = 1 << 18
_BOMB_BYTES = 8_000_000
_BOMB_RATIO = 200
"""Text that was written by people packs to a third or a tenth; gzip can reach 1,000."""


@attrs.frozen
class File:
    """A file of rows, and what errors call it."""

    path: Path
    name: str

    @property
    def packed(self) -> bool:
        """Whether the file is a gzip file."""
        return self.path.name.lower().endswith(".gz")


def is_path(data: Any) -> bool:
    """Return whether data is given as one path."""
    return isinstance(data, (str, os.PathLike))


def is_paths(data: Any) -> bool:
    """Return whether data is given as several paths."""
    return isinstance(data, (list, tuple)) and len(data) > 0 and all(map(is_path, data))


def files_of(data: Any) -> list[File] | None:
    """Return the files that a path or several stand for, or None if it is a hub id.

    Errors: `DataError` for what is missing, of another kind, or no regular file.
    """
    items = [data] if is_path(data) else data
    if isinstance(data, str) and _status(Path(data)) is None and is_hub_id(data):
        home, _, _ = data.rpartition(":")
        if not (home and _is_saved_dict(Path(home))):
            return None
    paths = [found for item in items for found in _paths_of(item)]
    names = [path.name for path in paths]
    return [File(path, path.name if names.count(path.name) == 1 else str(path)) for path in paths]


def suffix_of(name: str) -> str:
    """Return the known suffix of a file name without ".gz", or nothing."""
    suffix = Path(name.lower().removesuffix(".gz")).suffix
    return suffix if suffix in SUFFIXES else ""


# --- finding --------------------------------------------------------------------------------------


def _paths_of(item: Any) -> list[Path]:
    path = Path(os.fsdecode(item))
    status = _status(path)
    if status is None and str(path).startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError as error:
            raise DataError(f"{path}: there is no such home directory; check the path") from error
        status = _status(path)
    if status is None:
        home, _, split = str(path).rpartition(":")
        if home and _is_saved_dict(Path(home)):
            return _saved_split(Path(home), split)
        raise DataError(_missing(path))
    if stat.S_ISDIR(status.st_mode):
        return _directory(path)
    if not suffix_of(path.name):
        raise DataError(
            f"{path}: got a file that ends in '{path.suffix}'; expected {_allowed()}; "
            "rename or convert it"
        )
    return [_regular(path)]


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise DataError(f"{_shown(path)}: cannot be read: {problem}; check the path") from error


def _shown(path: Path) -> str:
    text = str(path).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 200 else text[:197] + "..."


def _regular(path: Path) -> Path:
    status = _status(path)
    if status is None:
        raise DataError(_missing(path))
    if not stat.S_ISREG(status.st_mode):
        # a pipe is read once, and reading waits for whoever writes: there is nothing to hash
        raise DataError(
            f"{path}: is {_mode(status.st_mode)} and no regular file; write the rows to a file"
        )
    return path


def _mode(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a directory" if stat.S_ISDIR(mode) else "a device"


def _directory(path: Path) -> list[Path]:
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    names = {entry.name for entry in entries}
    if "dataset_dict.json" in names:
        return _saved_split(path, None)
    if {"state.json", "dataset_info.json"} <= names:
        return _saved_files(path)
    inside = [entry for entry in entries if suffix_of(entry.name) and not entry.is_dir()]
    if not inside:
        below = [entry.name for entry in entries if entry.is_dir()]
        hint = f"; it holds the directories {listed(below[:5])}: name one" if below else ""
        raise DataError(
            f"{path}: a directory without any data file; expected files that end in "
            f"{_allowed()}{hint}"
        )
    return [_regular(entry) for entry in inside]


def _missing(path: Path) -> str:
    shown = _shown(path)
    try:
        beside = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return f"{shown}: no such file or directory; there is no directory '{path.parent}' either"
    near = difflib.get_close_matches(path.name, beside, n=2, cutoff=0.5)
    if near:
        hint = "did you mean " + " or ".join(f"'{path.parent / name}'" for name in near) + "?"
    else:
        hint = "check the path, or give a hub id as 'owner/name'"
    return f"{shown}: no such file or directory; {hint}"


def _allowed() -> str:
    return ", ".join(SUFFIXES) + ", each also with .gz"


def is_hub_id(name: str) -> bool:
    """Return whether data that is no file can be a hub's: "owner/name", or "owner/name:split"."""
    repository = name.partition(":")[0]
    owner, slash, rest = repository.partition("/")
    if not (slash and owner and rest) or "/" in rest or owner[0] in ".~" or suffix_of(repository):
        return False
    return all(
        part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in (owner, rest)
    )


# --- what datasets' save_to_disk wrote ------------------------------------------------------------


def _is_saved_dict(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file()


def _saved_split(path: Path, split: str | None) -> list[Path]:
    splits = _saved_list(path / "dataset_dict.json", "splits")
    if split is None:
        split = "train" if "train" in splits else splits[0] if len(splits) == 1 else None
    if split not in splits:
        wrong = f"no split '{split}', but" if split is not None else "no split 'train', but"
        raise DataError(
            f"{path}: a saved DatasetDict with {wrong} {listed(splits)}; give one as "
            f"'{path}:{next(iter(splits), 'train')}'"
        )
    return _saved_files(path / split)


def _saved_files(path: Path) -> list[Path]:
    names = _saved_list(path / "state.json", "_data_files", "filename")
    if not names:
        raise DataError(f"{path}: a saved data set without any data file; save it again")
    return [_regular(path / name) for name in names]


def _saved_list(path: Path, key: str, inner: str | None = None) -> list[str]:
    """Return the names that a saved data set lists; names only, as a path would lead elsewhere."""
    wrong = f"{path}: not what save_to_disk writes; expected a list of names under '{key}'"
    try:
        with path.open("rb") as stream:
            content = parse(stream.read(1 << 20).decode())
        listing = content[key]
        names = [item[inner] for item in listing] if inner else list(listing)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (JsonError, UnicodeDecodeError, KeyError, TypeError, IndexError) as error:
        raise DataError(wrong) from error
    if not all(isinstance(name, str) and name and Path(name).name == name for name in names):
        raise DataError(wrong)
    return names


# --- opening --------------------------------------------------------------------------------------


class Stream:
    """The bytes of a file, unpacked, and the hash of the file's own bytes as they go by.

    What is hashed is what was read: a file that changes afterwards cannot pass for it.
    """

    def __init__(self, file: File) -> None:
        self.file = file
        self.name = file.name
        self._raw = _HashedFile(file.path)
        # read ahead of a packed file counts as read, and hides how much the rest unpacks to
        packed = io.BufferedReader(self._raw, 1 << 14 if file.packed else _CHUNK)
        watch = MemoryWatch(file.name, self._raw.size)
        self._content = _Content(packed, self._raw, file, watch)
        self.reader = io.BufferedReader(self._content, _CHUNK)

    def digest(self) -> bytes:
        """Return the sha256 of the whole file; what was not asked for is read now."""
        while self._raw.read(_CHUNK):
            pass
        return self._raw.digest.digest()

    def close(self) -> None:
        """Close the file."""
        self.reader.close()
        self._raw.close()


class _HashedFile(io.RawIOBase):
    """A file that is hashed while it is read."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.size = os.fstat(self._file.fileno()).st_size
        self.digest = hashlib.sha256()
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self.digest.update(memoryview(buffer)[:count])
        self.count += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Content(io.RawIOBase):
    """What a file holds, unpacked where it is a gzip file, as far as that stays in proportion."""

    def __init__(
        self,
        packed: io.BufferedReader[_HashedFile],
        raw: _HashedFile,
        file: File,
        watch: MemoryWatch,
    ) -> None:
        self._source: Any = gzip.GzipFile(fileobj=packed) if file.packed else packed
        self._packed = file.packed
        self._raw = raw
        self._name = file.name
        self._watch = watch
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._source.readinto(buffer) or 0
        self._count += count
        if self._packed and self._count > max(_BOMB_BYTES, _BOMB_RATIO * self._raw.count):
            raise DataError(
                f"{self._name}: {byte_size(self._raw.count)} of it unpack to more than "
                f"{byte_size(self._count)}, more than {_BOMB_RATIO} times as much, as no data "
                "does; unpack the file and look at it"
            )
        self._watch.add(count, self._raw.count)
        return count


@contextmanager
def opened(file: File) -> Iterator[Stream]:
    """Open a file's content to be read from its beginning to its end."""
    stream = Stream(file)
    try:
        yield stream
    finally:
        stream.close()


@contextmanager
def seekable(file: File, digests: list[bytes]) -> Iterator[Any]:
    """Open a file's content to be read in any order, and append its hash to `digests`.

    Errors: `DataError` if the file changed between the beginning of reading and the end of hashing.
    """
    if file.packed:
        # seeking within a gzip file would unpack it from its beginning each time
        with opened(file) as stream:
            content = io.BytesIO(stream.reader.read())
            digests.append(stream.digest())
        yield content
        return
    with file.path.open("rb") as raw:
        before = os.fstat(raw.fileno())
        yield raw
        raw.seek(0)
        digests.append(hashlib.file_digest(raw, "sha256").digest())
        after = os.fstat(raw.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"{file.name}: changed while it was read; try again when it is whole")


def not_utf8(file: File) -> DataError:
    """Return the error for text that is not UTF-8, with the byte where it is not.

    Found by a second pass over the bytes: a decoder counts from the start of its chunk.
    """
    begin = 0
    rest = b""
    with opened(file) as stream:
        head = stream.reader.peek(8)[:8]
        while chunk := stream.reader.read(_CHUNK):
            chunk = rest + chunk
            try:
                chunk.decode()
                rest = b""
            except UnicodeDecodeError as error:
                if error.reason != "unexpected end of data":
                    return _not_utf8(file, head, begin + error.start, chunk[error.start])
                rest = chunk[error.start :]
            begin += len(chunk) - len(rest)
    return _not_utf8(file, head, begin, rest[0] if rest else 0)


def _not_utf8(file: File, head: bytes, at: int, byte: int) -> DataError:
    kind = next((kind for magic, kind in _MAGIC if head.startswith(magic)), "")
    looks = f"it looks like {kind}" if kind else "save the file in the encoding UTF-8"
    return DataError(f"{file.name}, byte {at} (0x{byte:02x}): not UTF-8 text; {looks}")


_MAGIC = (
    (b"\xff\xfe", "UTF-16: save it in the encoding UTF-8"),
    (b"\xfe\xff", "UTF-16: save it in the encoding UTF-8"),
    (b"\x1f\x8b", "gzip: end its name in .gz"),
    (b"PK\x03\x04", "a zip or Excel file: unpack or convert it"),
    (b"PAR1", "parquet: end its name in .parquet"),
    (b"ARROW1", "arrow: end its name in .arrow"),
    (b"\x28\xb5\x2f\xfd", "zstandard: unpack it"),
    (b"BZh", "bzip2: unpack it"),
)
