"""The header of a .gguf file, checked against the file before a library trusts its counts.

Format: ggml's gguf.md. A header says how many keys, strings and tensors follow; one that lies makes
a reader loop or allocate for ever.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from tunesmith.errors import ModelError

__all__ = ["check_gguf"]

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type: integers, floats and bool."""
_STRING, _ARRAY = 8, 9
MOST_ITEMS = 10_000_000
"""More than any vocabulary has tokens or merges."""
MOST_TENSORS = 1_000_000
MOST_DIMENSIONS = 8
KEY_BYTES = 65_535


def check_gguf(path: Path) -> None:
    """Read a .gguf file's header; `ModelError` unless all that it counts lies within the file."""
    size = path.stat().st_size
    try:
        with path.open("rb") as stream:
            _Header(stream, size).check()
    except (_LieError, struct.error, OSError) as error:
        text = str(error) if isinstance(error, _LieError) else "it ends within its header"
        raise ModelError(
            f"model {path}: is no whole .gguf file: {text} (it has {size:,} bytes); it was cut off "
            "or damaged: take it from its source again"
        ) from error


class _LieError(Exception):
    """A header that says what cannot be."""


class _Header:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream = stream
        self.size = size

    def check(self) -> None:
        magic = self.stream.read(4)
        if magic != b"GGUF":
            raise _LieError(f"it begins with {magic!r}, not with GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise _LieError(f"it is of version {version}; 2 and 3 are read")
        tensors, keys = self._number("<Q"), self._number("<Q")
        if tensors > MOST_TENSORS or keys > MOST_TENSORS:
            raise _LieError(f"it counts {tensors:,} tensors and {keys:,} keys")
        alignment = 32
        for _ in range(keys):
            key = self._string(KEY_BYTES)
            kind = self._number("<I")
            if key == b"general.alignment" and kind == 4:
                alignment = self._number("<I")
                if alignment < 1 or alignment > 1 << 20:
                    raise _LieError(f"it is aligned to {alignment} bytes")
                continue
            self._value(kind)
        offsets = [self._tensor() for _ in range(tensors)]
        start = -(-self.stream.tell() // alignment) * alignment
        for name, offset, nbytes in offsets:
            if start + offset + nbytes > self.size:
                raise _LieError(f"{name} would end at byte {start + offset + nbytes:,}")

    def _tensor(self) -> tuple[str, int, int]:
        name = self._string(KEY_BYTES).decode("utf-8", "replace")
        dimensions = self._number("<I")
        if dimensions > MOST_DIMENSIONS:
            raise _LieError(f"{name} has {dimensions:,} dimensions")
        count = 1
        for _ in range(dimensions):
            count *= self._number("<Q")
        kind = self._number("<I")
        offset = self._number("<Q")
        # a 1-bit type is the smallest there is; the reader knows the exact sizes
        return f"{name} (type {kind})", offset, count // 8

    def _value(self, kind: int, depth: int = 0) -> None:
        if kind in _SCALARS:
            self._skip(_SCALARS[kind])
        elif kind == _STRING:
            self._skip(self._number("<Q"))
        elif kind == _ARRAY:
            item, count = self._number("<I"), self._number("<Q")
            if depth > 2:
                raise _LieError("its lists are nested without end")
            if count > MOST_ITEMS:
                raise _LieError(f"it has a list of {count:,} items")
            if item in _SCALARS:
                self._skip(_SCALARS[item] * count)
            else:
                self._room(count * 8)  # each has at least its own length
                for _ in range(count):
                    self._value(item, depth + 1)
        else:
            raise _LieError(f"it has a value of the unknown type {kind}")

    def _string(self, most: int) -> bytes:
        length = self._number("<Q")
        if length > most:
            raise _LieError(f"it has a name of {length:,} bytes")
        return self.stream.read(length)

    def _number(self, form: str) -> int:
        number: int = struct.unpack(form, self.stream.read(struct.calcsize(form)))[0]
        return number

    def _room(self, count: int) -> None:
        if self.stream.tell() + count > self.size:
            raise _LieError(f"it counts {count:,} bytes more than there are")

    def _skip(self, count: int) -> None:
        self._room(count)
        self.stream.seek(count, 1)
