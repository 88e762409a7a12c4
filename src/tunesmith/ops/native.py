"""Binds the compiled kernels to the ops, per device; the only importer of `tunesmith._native`.

Where there are no kernels (not built, switched off by TUNESMITH_NATIVE=0, another device) the ops
stay with their PyTorch implementation, and one log line says so.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import Tensor

from tunesmith.ops import schema
from tunesmith.ops.reference import mean_absmax
from tunesmith.ops.schema import NESTED_BLOCKSIZE, count_blocks

__all__ = ["NativeStatus", "native_status"]

# empty when the kernels are in use
_why_not = ""
if os.environ.get("TUNESMITH_NATIVE") == "0":
    _why_not = "switched off by TUNESMITH_NATIVE=0"
else:
    try:
        from tunesmith import _native
    except ImportError as error:
        _why_not = f"not built: {error}"


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
        isa=_native.isa(),
        openmp=_native.has_openmp(),
        cuda=_native.has_cuda(),
    )


def _quantize_nf4(weight: Tensor, blocksize: int, name: str = "weight") -> tuple[Tensor, Tensor]:
    schema.check_weight(weight, blocksize, name)
    weight = weight.detach().contiguous()
    numel = weight.numel()
    packed = weight.new_empty((numel + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty(count_blocks(numel, blocksize), dtype=torch.float32)
    with _stream_of(weight) as stream:
        _native.quantize_nf4(
            weight.data_ptr(),
            _dtype_code(weight.dtype),
            numel,
            blocksize,
            packed.data_ptr(),
            absmax.data_ptr(),
            stream,
        )
    schema.check_finite(absmax, numel, blocksize, name)
    return packed, absmax


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    schema.check_absmax(absmax)
    absmax = absmax.contiguous()
    blocks = absmax.numel()
    offset = mean_absmax(absmax)
    codes = absmax.new_empty(blocks, dtype=torch.uint8)
    nested_absmax = absmax.new_empty(count_blocks(blocks, NESTED_BLOCKSIZE))
    with _stream_of(absmax) as stream:
        _native.quantize_absmax(
            absmax.data_ptr(),
            blocks,
            offset.data_ptr(),
            codes.data_ptr(),
            nested_absmax.data_ptr(),
            stream,
        )
    return codes, nested_absmax, offset


def _dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    schema.check_packed(packed, absmax, nested_absmax, nested_offset, shape, blocksize, dtype)
    packed, absmax = packed.contiguous(), absmax.contiguous()
    if nested_absmax is not None:
        nested_absmax = nested_absmax.contiguous()
    out = packed.new_empty(tuple(shape), dtype=dtype)
    with _stream_of(packed) as stream:
        _native.dequantize_nf4(
            packed.data_ptr(),
            absmax.data_ptr(),
            0 if nested_absmax is None else nested_absmax.data_ptr(),
            0 if nested_offset is None else nested_offset.data_ptr(),
            math.prod(shape),
            blocksize,
            _dtype_code(dtype),
            out.data_ptr(),
            stream,
        )
    return out


def _dtype_code(dtype: torch.dtype) -> int:
    """Return the number by which the kernels know a dtype."""
    if dtype == torch.float32:
        return _native.FLOAT32
    return _native.FLOAT16 if dtype == torch.float16 else _native.BFLOAT16


@contextlib.contextmanager
def _stream_of(tensor: Tensor) -> Iterator[int | None]:
    """Yield the stream that work on this tensor belongs to; None on the CPU."""
    if tensor.device.type == "cpu":
        yield None
    else:
        with torch.cuda.device(tensor.device):
            yield torch.cuda.current_stream(tensor.device).cuda_stream


def _bind(device: str) -> None:
    torch.library.impl("tunesmith::quantize_nf4", device, _quantize_nf4)
    torch.library.impl("tunesmith::quantize_absmax", device, _quantize_absmax)
    torch.library.impl("tunesmith::dequantize_nf4", device, _dequantize_nf4)


if _why_not:
    logging.getLogger("tunesmith").warning("%s", native_status())
else:
    _bind("cpu")
    if _native.has_cuda():
        _bind("cuda")
