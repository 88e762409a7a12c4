"""Memory that shows when a kernel goes beside what is its own."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


class Guarded:
    """`size` bytes between two guards, which a write changes.

    They lie `misaligned` bytes beside a multiple of 64.
    """

    MARGIN = 64
    PATTERN = 0xA5

    def __init__(self, size: int, misaligned: int = 0) -> None:
        self.bytes = torch.full((size + 3 * self.MARGIN,), self.PATTERN, dtype=torch.uint8)
        self.start = self.MARGIN + (misaligned - self.bytes.data_ptr()) % self.MARGIN
        self.end = self.start + size

    @property
    def pointer(self) -> int:
        return self.bytes.data_ptr() + self.start

    def as_dtype(self, dtype: torch.dtype) -> Tensor:
        return self.bytes[self.start : self.end].clone().view(dtype)

    def intact(self) -> bool:
        guards = torch.cat([self.bytes[: self.start], self.bytes[self.end :]])
        return bool((guards == self.PATTERN).all())


class PageEnds:
    """Memory that ends at a page nobody may touch: one byte too far, read or written, is a crash.

    For a process of its own, which may crash.
    """

    def __init__(self) -> None:
        self._mapped: list[mmap.mmap] = []

    def space(self, nbytes: int) -> int:
        """Return the address of that many bytes, with nothing behind the last."""
        pages = -(-nbytes // PAGE) * PAGE
        mapped = mmap.mmap(-1, pages + PAGE)
        self._mapped.append(mapped)
        end = ctypes.addressof(ctypes.c_char.from_buffer(mapped)) + pages
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        no_access = 0
        if protect(end, PAGE, no_access) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        return end - nbytes

    def copy(self, tensor: Tensor) -> int:
        """Return where a copy of a tensor lies."""
        tensor = tensor.contiguous()
        nbytes = tensor.numel() * tensor.element_size()
        at = self.space(nbytes)
        ctypes.memmove(at, tensor.data_ptr(), nbytes)
        return at

    def clear(self) -> None:
        """Give everything back."""
        self._mapped.clear()
