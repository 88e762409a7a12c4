"""The compiled kernels, and what every op needs to call them; imports `tunesmith._native`.

Where there are none (not built, switched off by TUNESMITH_NATIVE=0, another device) the ops stay
with their PyTorch implementation, and one log line says so.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from tunesmith.errors import OptionError
from tunesmith.ops.dispatch import implement
from tunesmith.ops.machine import check_environment

__all__ = [
    "CODES",
    "MAX_HEAD_SIZE",
    "NativeStatus",
    "compact",
    "empty_like",
    "implement_on_all",
    "kernels",
    "native_status",
    "pointer",
    "pooled_empty",
    "stream_of",
]

# empty when the kernels are in use
_why_not = ""
check_environment()
if os.environ.get("TUNESMITH_NATIVE") == "0":
    _why_not = "switched off by TUNESMITH_NATIVE=0"
else:
    try:
        from tunesmith import _native as kernels
    except ImportError as error:
        _why_not = f"not built: {error}"
    else:
        _wanted = os.environ.get("TUNESMITH_ISA")
        if _wanted and _wanted not in kernels.isas():
            raise OptionError(
                [
                    f"TUNESMITH_ISA={_wanted}: this CPU has not got it; it has: "
                    f"{', '.join(kernels.isas())}"
                ]
            )


# the numbers by which the kernels know dtypes, 4-bit types and activations; without kernels none
CODES: dict[torch.dtype | str, int] = {}
if not _why_not:
    CODES = {
        torch.float32: kernels.FLOAT32,
        torch.float16: kernels.FLOAT16,
        torch.bfloat16: kernels.BFLOAT16,
        "nf4": kernels.NF4,
        "fp4": kernels.FP4,
        "silu": kernels.SILU,
        "gelu_tanh": kernels.GELU_TANH,
    }


@attrs.frozen
class NativeStatus:
    """Whether the compiled kernels are in use, and which."""

    loaded: bool
    """Whether the ops run compiled kernels."""
    reason: str
    """Why they do not; empty if they do."""
    isa: str
    """The instruction set of the CPU kernels, "avx2" or "scalar"; empty if not loaded."""
    openmp: bool
    """Whether torch's OpenMP runtime was found; without it the CPU kernels use one thread."""
    cuda: bool
    """Whether the CUDA kernels are compiled in."""

    def why_slow_on(self, device: str) -> str | None:
        """Return why the kernels gain nothing on a device of that type, or None if they do."""
        if device == "cpu":
            return "there are no vector kernels" if self.isa in ("", "scalar") else None
        if device == "cuda":
            return None if self.cuda else "there are no CUDA kernels"
        return f"there are no kernels for {device}"

    def __str__(self) -> str:
        """Return it as one line."""
        if not self.loaded:
            return f"native kernels: not in use ({self.reason}); the ops run in PyTorch"
        threads = "torch's OpenMP threads" if self.openmp else "one thread"
        cuda = "compiled in" if self.cuda else "not compiled in"
        return f"native kernels: in use; CPU: {self.isa}, {threads}; CUDA: {cuda}"


def native_status() -> NativeStatus:
    """Return whether the compiled kernels are in use, and which, or why not."""
    if _why_not:
        return NativeStatus(loaded=False, reason=_why_not, isa="", openmp=False, cuda=False)
    return NativeStatus(
        loaded=True,
        reason="",
        isa=kernels.isa(),
        openmp=kernels.has_openmp(),
        cuda=kernels.has_cuda(),
    )


if _why_not:
    logging.getLogger("tunesmith").warning("%s", native_status())

# CPU outputs of this many bytes and more come from the pool: smaller ones malloc recycles itself
_POOLED_NBYTES = 1 << 20

# what the decoding kernels have room for
MAX_HEAD_SIZE = 512


def implement_on_all(implementations: dict[str, Callable[..., Any]]) -> None:
    """Make functions what ops do on every device that there are kernels for."""
    if _why_not:
        return
    for op, implementation in implementations.items():
        implement(op, "cpu", implementation)
        if kernels.has_cuda():
            implement(op, "cuda", implementation)


def pooled_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a new tensor; if it is large and on the CPU, in memory that was used before.

    Its pages are there then: to touch them for the first time takes longer than to write them.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if _why_not or device.type != "cpu" or nbytes < _POOLED_NBYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    return from_dlpack(kernels.empty(nbytes)).view(dtype).view(shape)


def empty_like(tensor: Tensor) -> Tensor:
    """Return a new tensor of the same shape, without gaps."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def compact(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor in row-major order without gaps."""
    return None if tensor is None else tensor.contiguous()


def pointer(tensor: Tensor | None) -> int:
    """Return where a tensor begins in memory, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


_ON_CPU = contextlib.nullcontext(None)


def stream_of(tensor: Tensor) -> AbstractContextManager[int | None]:
    """Return a context with the stream that work on this tensor belongs to; None on the CPU."""
    device = tensor.device
    if device.type == "cpu":
        return _ON_CPU
    stream = torch.cuda.current_stream(device).cuda_stream
    if device.index == torch.cuda.current_device():
        return contextlib.nullcontext(stream)
    return _on_device(device, stream)


@contextlib.contextmanager
def _on_device(device: torch.device, stream: int) -> Iterator[int]:
    with torch.cuda.device(device):
        yield stream
