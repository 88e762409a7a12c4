"""JSON records that say when they were changed, and lists of files with size and hash."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

__all__ = [
    "Files",
    "check_listing",
    "first_difference",
    "listed_files",
    "marks",
    "read_object",
    "sealed",
    "sha256_of",
    "unsealed",
]

SEAL = "sha256"
HEX = re.compile(r"[0-9a-f]{64}")
CHUNK = 1 << 20

Files = Mapping[str, Mapping[str, Any]]
"""By path with "/" between its parts: "bytes" and "sha256"."""


def sealed(record: Mapping[str, Any]) -> str:
    """Return a record as JSON with a hash of all that it says."""
    # as it will be read: with lists for tuples and text for every key
    plain = json.loads(json.dumps(record))
    return json.dumps({**plain, SEAL: _digest(plain)}, indent=2)


def unsealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a sealed record says; `ValueError` if it is not what was sealed."""
    held = {key: value for key, value in record.items() if key != SEAL}
    if SEAL not in record:
        raise ValueError(f"the field '{SEAL}' is missing")
    if record[SEAL] != _digest(held):
        raise ValueError("it was changed after it was written")
    return held


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; `ValueError` says what is there in its place."""
    if file.is_symlink():
        raise ValueError("it is a link")
    if file.is_dir():
        raise ValueError("it is a directory")
    try:
        record = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError("it is missing") from None
    except OSError as error:
        raise ValueError(f"it cannot be read: {(error.strerror or str(error)).lower()}") from error
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("it is not text") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"it holds {_kind(record)} and not an object")
    return record


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def listed_files(directory: Path, leave_out: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Return the files below a directory with size and hash; `leave_out` names its own entries."""
    found: dict[str, dict[str, Any]] = {}
    for entry in sorted(directory.iterdir()):
        if entry.name in set(leave_out):
            continue
        for file in sorted(entry.rglob("*")) if entry.is_dir() else [entry]:
            if file.is_file():
                name = file.relative_to(directory).as_posix()
                found[name] = {"bytes": file.stat().st_size, SEAL: sha256_of(file)}
    return found


def marks(directory: Path, files: Files) -> dict[str, list[int]]:
    """Return what shows, without reading a file, that it is still the one that was hashed."""
    found: dict[str, list[int]] = {}
    for name in files:
        try:
            stat = (directory / name).lstat()
        except OSError:
            continue
        found[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    return found


def check_listing(files: Any) -> Files:
    """Return a list of files as it was read from JSON; `ValueError` if it is none."""
    if not isinstance(files, dict):
        raise ValueError(f"'files' is {_kind(files)} and not an object")
    for name, entry in files.items():
        path = PurePosixPath(name)
        if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
            raise ValueError(f"it lists the file {name!r}, which does not lie in its directory")
        if (
            not isinstance(entry, dict)
            or type(entry.get("bytes")) is not int
            or not isinstance(entry.get(SEAL), str)
            or not HEX.fullmatch(entry[SEAL])
        ):
            raise ValueError(f"what it says of the file {name!r} is no size and hash")
    return files


def first_difference(
    directory: Path, files: Files, known: Mapping[str, Any] | None = None
) -> str | None:
    """Return what is wrong with the first file that is not as listed, or None.

    `known` are marks of an earlier check: a file that still bears its mark is not read.
    """
    root = os.path.realpath(directory)
    present = marks(directory, files)
    for name, entry in files.items():
        file = directory / name
        if name not in present:
            return f"{name} is missing"
        if not os.path.realpath(file).startswith(root + os.sep):
            return f"{name} is a link that leads out of the directory"
        if not file.is_file():
            return f"{name} is not a file"
        if known is not None and known.get(name) == present[name]:
            continue
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"{name} has {size} bytes and not {entry['bytes']}"
        try:
            same = sha256_of(file) == entry[SEAL]
        except OSError as error:
            return f"{name} cannot be read: {(error.strerror or str(error)).lower()}"
        if not same:
            return f"{name} is not what was written: its hash is another"
    return None


def _digest(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
