"""The ops in plain PyTorch: what runs where no kernel does, and what kernels are tested against.

NF4 and double quantization are those of QLoRA (arXiv:2305.14314); the bytes are the ones that
bitsandbytes writes. Blocks run over the flattened tensor. All arithmetic is fp32, one rounding per
operation, and the work goes chunk by chunk, so that temporaries stay at a few MB.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.ops import schema
from tunesmith.ops.schema import NESTED_BLOCKSIZE, count_blocks

__all__ = ["DYNAMIC_MAP", "NF4_CODE", "dequantize_nf4", "quantize_absmax", "quantize_nf4"]

# elements; a multiple of every block size, and even, so that a chunk begins on a whole byte
_CHUNK = 1 << 18

# below this an absmax would have an infinite inverse; bitsandbytes draws the line at the same place
_SMALLEST_ABSMAX = 1e-38

NF4_CODE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
    device="cpu",
)
"""What each of the 16 codes stands for, fp32 [16]: appendix E of the QLoRA paper."""

_ZERO_CODE = 7


def _dynamic_map() -> Tensor:
    """Return the signed dynamic 8-bit data type, fp32 [256] ascending (arXiv:1511.04561).

    Seven decades 1e-6 to 1 hold 1, 2, 4, ... 64 values each: the middles of as many equal steps
    from 0.1 to 1, times the decade. Their negatives, 0 and 1 make up 256. Each value is worked out
    in double and rounded to fp32 where bitsandbytes rounds. So the map is the same on every
    machine, which torch.linspace's is not: its last bit depends on whether the CPU has FMA.
    """

    def fp32(value: float) -> float:
        return torch.tensor(value, dtype=torch.float32, device="cpu").item()

    magnitudes = []
    for exponent in range(7):
        steps = 2**exponent
        first, step = fp32(0.1), fp32(fp32(1 - fp32(0.1)) / steps)
        # counted from the nearer end
        edges = [
            fp32(first + step * k) if k < (steps + 1) // 2 else fp32(1 - step * (steps - k))
            for k in range(steps + 1)
        ]
        for low, high in itertools.pairwise(edges):
            middle = fp32(fp32(low + high) / 2)
            magnitudes.append(fp32(fp32(10.0 ** (exponent - 6)) * middle))
    values = [-m for m in reversed(magnitudes)] + [0.0] + magnitudes + [1.0]
    return torch.tensor(values, dtype=torch.float32, device="cpu")


DYNAMIC_MAP = _dynamic_map()
"""What each of the 256 codes of a double-quantized absmax stands for, fp32 [256]."""


def quantize_nf4(weight: Tensor, blocksize: int, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Quantize to packed uint8 [ceil(numel / 2)] and absmax fp32 [blocks].

    Element 2i is the high nibble of byte i. Raises OpError for NaN and Inf.
    """
    schema.check_weight(weight, blocksize, name)
    flat = weight.detach().reshape(-1)
    numel = flat.numel()
    packed = flat.new_empty((numel + 1) // 2, dtype=torch.uint8)
    absmax = flat.new_empty(count_blocks(numel, blocksize), dtype=torch.float32)
    midpoints = _midpoints(NF4_CODE).to(flat.device)
    for start in range(0, numel, _CHUNK):
        values = flat[start : start + _CHUNK].float()
        blocks = _in_blocks(values, blocksize, fill=0.0)  # [blocks, blocksize]
        scales = blocks.abs().amax(dim=1)
        absmax[start // blocksize : start // blocksize + len(scales)] = scales
        codes = _encode(blocks, scales, midpoints)
        pairs = (codes[0::2] << 4) | codes[1::2]
        count = (len(values) + 1) // 2
        packed[start // 2 : start // 2 + count] = pairs[:count]
    schema.check_finite(absmax, numel, blocksize, name)
    return packed, absmax


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double-quantize absmax to uint8 codes [blocks], fp32 [ceil(blocks / 256)] and the offset.

    The offset is the mean of absmax, an fp32 scalar; what is left goes to the nearest value of
    `DYNAMIC_MAP`, scaled by the largest magnitude of each 256.
    """
    schema.check_absmax(absmax)
    offset = mean_absmax(absmax)
    codes = absmax.new_empty(absmax.numel(), dtype=torch.uint8)
    nested_absmax = absmax.new_empty(count_blocks(absmax.numel(), NESTED_BLOCKSIZE))
    midpoints = _midpoints(DYNAMIC_MAP).to(absmax.device)
    for start in range(0, absmax.numel(), _CHUNK):
        values = absmax[start : start + _CHUNK] - offset
        groups = _in_blocks(values, NESTED_BLOCKSIZE, fill=0.0)  # [groups, 256]
        scales = groups.abs().amax(dim=1)
        first = start // NESTED_BLOCKSIZE
        nested_absmax[first : first + len(scales)] = scales
        codes[start : start + len(values)] = _encode(groups, scales, midpoints)[: len(values)]
    return codes, nested_absmax, offset


def dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dequantize to a tensor of that shape and dtype: code times absmax in fp32, rounded once."""
    schema.check_packed(packed, absmax, nested_absmax, nested_offset, shape, blocksize, dtype)
    numel = math.prod(shape)
    flat = packed.new_empty(numel, dtype=dtype)
    code = NF4_CODE.to(packed.device)
    for start in range(0, numel, _CHUNK):
        end = min(start + _CHUNK, numel)
        pairs = packed[start // 2 : (end + 1) // 2]
        codes = torch.stack((pairs >> 4, pairs & 0xF), dim=1).view(-1)[: end - start]
        codes = _in_blocks(codes, blocksize, fill=_ZERO_CODE)  # [blocks, blocksize]
        values = code.index_select(0, codes.view(-1).int()).view(codes.shape)
        first = start // blocksize
        scales = _scales(absmax, nested_absmax, nested_offset, first, first + len(codes))
        # a nested scale can come out a little below zero, and 0 times that is -0: adding 0 mends it
        values.mul_(scales.unsqueeze(1)).add_(0.0)
        flat[start:end] = values.view(-1)[: end - start]
    return flat.view(tuple(shape))


def mean_absmax(absmax: Tensor) -> Tensor:
    """Return the offset of double quantization, an fp32 scalar tensor: the mean, or 0 of nothing.

    It is torch's mean in every implementation, as in bitsandbytes, so that all codes agree.
    """
    if absmax.numel() == 0:
        return absmax.new_zeros(())
    offset = absmax.mean()
    if not offset.isfinite():
        raise OpError(
            "the mean of absmax is beyond fp32; double quantization needs it finite; "
            "quantize with nested=False"
        )
    return offset


def _scales(
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    first: int,
    last: int,
) -> Tensor:
    """Return the fp32 scales of blocks `first` to `last`, decoded if they are nested."""
    if nested_absmax is None or nested_offset is None:
        return absmax[first:last]
    values = DYNAMIC_MAP.to(absmax.device).index_select(0, absmax[first:last].int())
    # a chunk may begin inside a group of 256
    groups = torch.arange(first, last, device=absmax.device) // NESTED_BLOCKSIZE
    return values * nested_absmax[groups] + nested_offset


def _in_blocks(flat: Tensor, blocksize: int, fill: float) -> Tensor:
    """Return a vector as [blocks, blocksize], the last block filled up."""
    missing = -len(flat) % blocksize
    return (F.pad(flat, (0, missing), value=fill) if missing else flat).view(-1, blocksize)


def _midpoints(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2


def _encode(blocks: Tensor, scales: Tensor, midpoints: Tensor) -> Tensor:
    """Return the flat uint8 codes of the nearest values; a tie takes the lower one."""
    inverse = 1.0 / scales.clamp(min=_SMALLEST_ABSMAX)
    scaled = blocks * inverse.unsqueeze(1)
    # counts the midpoints that are strictly below
    return torch.bucketize(scaled, midpoints, out_int32=True).to(torch.uint8).view(-1)


torch.library.impl("tunesmith::quantize_nf4", "default", quantize_nf4)
torch.library.impl("tunesmith::quantize_absmax", "default", quantize_absmax)
torch.library.impl("tunesmith::dequantize_nf4", "default", dequantize_nf4)
