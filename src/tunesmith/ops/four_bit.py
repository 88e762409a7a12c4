"""Quantizing to 4 bits and back: three ops, each with schema, check, PyTorch and kernel.

NF4 and double quantization are those of QLoRA (arXiv:2305.14314), FP4 is that of bitsandbytes; the
bytes are the ones that bitsandbytes writes. Blocks run over the flattened tensor. In PyTorch it is
fp32 arithmetic, one rounding per operation, and goes chunk by chunk, so that temporaries stay at a
few MB; the kernels give the same bits.

Every implementation checks its arguments first: a kernel is handed bare pointers and has no second
chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.ops import native
from tunesmith.ops.dtypes import DTYPES, word, words
from tunesmith.ops.native import (
    CODES,
    compact,
    implement_on_all,
    pointer,
    pooled_empty,
    stream_of,
)
from tunesmith.ops.tables import DYNAMIC_MAP, TABLES

__all__ = [
    "BLOCKSIZES",
    "NESTED_BLOCKSIZE",
    "QUANT_TYPES",
    "Packed",
    "count_blocks",
    "dequantize_by_kernel",
    "dequantize_by_torch",
    "reference_dequantize_4bit",
    "reference_quantize_4bit",
    "reference_quantize_absmax",
]

BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""How many weights may share one absmax."""

NESTED_BLOCKSIZE = 256
"""How many absmax share one scale in double quantization."""

QUANT_TYPES = ("nf4", "fp4")
"""The 4-bit types; where a plain weight is possible, too, its type is ""."""

# elements; a multiple of every block size, and even, so that a chunk begins on a whole byte
_CHUNK = 1 << 18

# below this an absmax would have an infinite inverse; bitsandbytes draws the line at the same place
_SMALLEST_ABSMAX = 1e-38

_SCHEMAS = {
    "quantize_4bit": "(Tensor weight, int blocksize, str quant_type, str name='weight') "
    "-> (Tensor packed, Tensor absmax)",
    "quantize_absmax": "(Tensor absmax) "
    "-> (Tensor codes, Tensor nested_absmax, Tensor nested_offset)",
    "dequantize_4bit": "(Tensor packed, Tensor absmax, Tensor? nested_absmax, "
    "Tensor? nested_offset, SymInt[] shape, int blocksize, str quant_type, ScalarType dtype) "
    "-> Tensor",
}
for _op, _schema in _SCHEMAS.items():
    torch.library.define(f"tunesmith::{_op}", _schema, tags=torch.Tag.pt2_compliant_tag)


class Packed(NamedTuple):
    """A weight in 4 bits: what `dequantize_4bit` takes before a dtype, in the order of its schema.

    `ops.Weight4Bit` describes the fields, and is checked; this is not.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    shape: Sequence[int]
    blocksize: int
    quant_type: str

    def check(self, dtype: torch.dtype = torch.float32) -> None:
        """Refuse parts that do not make up one weight, or cannot be dequantized into `dtype`."""
        _check_blocksize(self.blocksize)
        _check_quant_type(self.quant_type)
        _check_dtype(dtype, "got dtype", "dequantized into", "cast the result instead")
        if min(self.shape, default=0) < 0:
            raise OpError(
                f"got shape {list(self.shape)}; sizes cannot be negative; pass the weight's shape"
            )
        numel = math.prod(self.shape)
        blocks = count_blocks(numel, self.blocksize)
        device = self.packed.device
        _check_part("packed", self.packed, torch.uint8, ((numel + 1) // 2,), device)
        if self.nested_absmax is None and self.nested_offset is None:
            _check_part("absmax", self.absmax, torch.float32, (blocks,), device)
            return
        if self.nested_absmax is None or self.nested_offset is None:
            raise OpError(
                "got only one of nested_absmax and nested_offset; a double-quantized weight has "
                "both, any other has neither; pass both or none"
            )
        groups = count_blocks(blocks, NESTED_BLOCKSIZE)
        _check_part("absmax codes", self.absmax, torch.uint8, (blocks,), device)
        _check_part("nested_absmax", self.nested_absmax, torch.float32, (groups,), device)
        _check_part("nested_offset", self.nested_offset, torch.float32, (), device)

    def scales(self, first: int, last: int) -> Tensor:
        """Return the fp32 scales of blocks `first` to `last`, dequantized if they are nested."""
        codes = self.absmax[first:last]
        if self.nested_absmax is None or self.nested_offset is None:
            return codes
        values = DYNAMIC_MAP.to(codes.device).index_select(0, codes.int())
        # a chunk may begin inside a group of 256
        groups = torch.arange(first, last, device=codes.device) // NESTED_BLOCKSIZE
        return values * self.nested_absmax[groups] + self.nested_offset


def count_blocks(numel: int, blocksize: int) -> int:
    """Return how many blocks hold `numel` elements; the last may be short."""
    return -(-numel // blocksize)


def _new_parts(weight: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return room for the codes and the absmax of a weight."""
    numel = weight.numel()
    packed = weight.new_empty((numel + 1) // 2, dtype=torch.uint8)
    return packed, weight.new_empty(count_blocks(numel, blocksize), dtype=torch.float32)


def _new_nested(absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Return room for the codes of absmax, and for their scales."""
    blocks = absmax.numel()
    codes = absmax.new_empty(blocks, dtype=torch.uint8)
    return codes, absmax.new_empty(count_blocks(blocks, NESTED_BLOCKSIZE))


torch.library.register_fake(
    "tunesmith::quantize_4bit",
    lambda weight, blocksize, quant_type, name="weight": _new_parts(weight, blocksize),
)
torch.library.register_fake(
    "tunesmith::quantize_absmax", lambda absmax: (*_new_nested(absmax), absmax.new_empty(()))
)


def _fake_dequantize_4bit(*args: Any) -> Tensor:
    weight, dtype = Packed._make(args[:-1]), args[-1]
    return weight.packed.new_empty(tuple(weight.shape), dtype=dtype)


torch.library.register_fake("tunesmith::dequantize_4bit", _fake_dequantize_4bit)


# --- what is refused


def check_weight(weight: Tensor, blocksize: int, quant_type: str, name: str) -> None:
    """Refuse what cannot be quantized to 4 bits; `name` is what the message calls the tensor."""
    _check_blocksize(blocksize)
    _check_quant_type(quant_type)
    if weight.layout != torch.strided:
        raise OpError(
            f"{name}: got a {word(weight.layout)} tensor; only dense (strided) tensors can be "
            f"quantized to {quant_type}; call .to_dense() first"
        )
    verb = f"quantized to {quant_type}"
    _check_dtype(weight.dtype, f"{name}: got dtype", verb, "cast the tensor first")


def check_absmax(absmax: Tensor) -> None:
    """Refuse what is no fp32 [blocks] vector of absmax."""
    _check_part("absmax", absmax, torch.float32, (absmax.numel(),), absmax.device)


def check_finite(absmax: Tensor, numel: int, blocksize: int, quant_type: str, name: str) -> None:
    """Refuse a weight of which a block holds NaN or Inf: the absmax of that block is one, too."""
    finite = absmax.isfinite()
    if bool(finite.all()):
        return
    block = int(finite.logical_not().nonzero()[0])
    first = block * blocksize
    last = min(first + blocksize, numel) - 1
    raise OpError(
        f"{name}: block {block} (elements {first} to {last} of the flattened tensor) holds NaN or "
        f"Inf; {quant_type} needs finite values; check the checkpoint, or the cast that made this "
        f"tensor"
    )


def _check_blocksize(blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        allowed = ", ".join(map(str, BLOCKSIZES))
        raise OpError(
            f"got blocksize {blocksize}; allowed are {allowed}; 64 is what the QLoRA paper uses"
        )


def _check_quant_type(quant_type: str) -> None:
    if quant_type not in QUANT_TYPES:
        raise OpError(
            f"got quant_type '{quant_type}'; allowed are {', '.join(QUANT_TYPES)}; nf4 is what "
            f"the QLoRA paper uses"
        )


def _check_dtype(dtype: torch.dtype, got: str, verb: str, next_step: str) -> None:
    if dtype not in DTYPES:
        raise OpError(f"{got} {word(dtype)}; {words(DTYPES)} can be {verb}; {next_step}")


def _check_part(
    name: str, part: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    if part.dtype != dtype or part.shape != shape:
        raise OpError(
            f"{name}: got {word(part.dtype)} {list(part.shape)}; this weight needs "
            f"{word(dtype)} {list(shape)}; pass the parts as they came from quantizing"
        )
    if part.device != device:
        raise OpError(
            f"{name}: got a tensor on {part.device}, but the packed data is on {device}; all parts "
            f"of a weight must be on one device; move them together"
        )


# --- in PyTorch


def reference_quantize_4bit(
    weight: Tensor, blocksize: int, quant_type: str, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    """Quantize to packed uint8 [ceil(numel / 2)] and absmax fp32 [blocks].

    Element 2i is the high nibble of byte i. Raises OpError for NaN and Inf.
    """
    check_weight(weight, blocksize, quant_type, name)
    flat = weight.detach().reshape(-1)
    numel = flat.numel()
    packed, absmax = _new_parts(flat, blocksize)
    code, order = (part.to(flat.device) for part in TABLES[quant_type])
    midpoints = _midpoints(code[order.int()])
    for start in range(0, numel, _CHUNK):
        values = flat[start : start + _CHUNK].float()
        blocks = _in_blocks(values, blocksize, fill=0.0)  # [blocks, blocksize]
        scales = blocks.abs().amax(dim=1)
        absmax[start // blocksize : start // blocksize + len(scales)] = scales
        codes = order[_ranks(blocks, scales, midpoints)]
        pairs = (codes[0::2] << 4) | codes[1::2]
        count = (len(values) + 1) // 2
        packed[start // 2 : start // 2 + count] = pairs[:count]
    check_finite(absmax, numel, blocksize, quant_type, name)
    return packed, absmax


def reference_quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double-quantize absmax to uint8 codes [blocks], fp32 [ceil(blocks / 256)] and the offset.

    The offset is the mean of absmax, an fp32 scalar; what is left goes to the nearest value of
    `DYNAMIC_MAP`, scaled by the largest magnitude of each 256.
    """
    check_absmax(absmax)
    offset = _mean_absmax(absmax)
    codes, nested_absmax = _new_nested(absmax)
    midpoints = _midpoints(DYNAMIC_MAP).to(absmax.device)
    for start in range(0, absmax.numel(), _CHUNK):
        values = absmax[start : start + _CHUNK] - offset
        groups = _in_blocks(values, NESTED_BLOCKSIZE, fill=0.0)  # [groups, 256]
        scales = groups.abs().amax(dim=1)
        first = start // NESTED_BLOCKSIZE
        nested_absmax[first : first + len(scales)] = scales
        ranks = _ranks(groups, scales, midpoints)
        codes[start : start + len(values)] = ranks[: len(values)].to(torch.uint8)
    return codes, nested_absmax, offset


def reference_dequantize_4bit(*args: Any) -> Tensor:
    """Dequantize what `Packed` is made of into a dtype, the last argument."""
    weight, dtype = Packed._make(args[:-1]), args[-1]
    weight.check(dtype)
    return dequantize_by_torch(weight, dtype)


def dequantize_by_torch(weight: Packed, dtype: torch.dtype) -> Tensor:
    """Dequantize to a tensor of the weight's shape: code times absmax in fp32, rounded once."""
    numel, blocksize = math.prod(weight.shape), weight.blocksize
    flat = weight.packed.new_empty(numel, dtype=dtype)
    code = TABLES[weight.quant_type][0].to(flat.device)
    for start in range(0, numel, _CHUNK):
        end = min(start + _CHUNK, numel)
        pairs = weight.packed[start // 2 : (end + 1) // 2]
        codes = torch.stack((pairs >> 4, pairs & 0xF), dim=1).view(-1)[: end - start]
        codes = _in_blocks(codes, blocksize, fill=0)  # [blocks, blocksize]
        values = code.index_select(0, codes.view(-1).int()).view(codes.shape)
        first = start // blocksize
        scales = weight.scales(first, first + len(codes))
        # a nested scale can come out a little below zero, and 0 times that is -0: adding 0 mends it
        values.mul_(scales.unsqueeze(1)).add_(0.0)
        flat[start:end] = values.view(-1)[: end - start]
    return flat.view(tuple(weight.shape))


def _mean_absmax(absmax: Tensor) -> Tensor:
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


def _in_blocks(flat: Tensor, blocksize: int, fill: float) -> Tensor:
    """Return a vector as [blocks, blocksize], the last block filled up."""
    missing = -len(flat) % blocksize
    return (F.pad(flat, (0, missing), value=fill) if missing else flat).view(-1, blocksize)


def _midpoints(values: Tensor) -> Tensor:
    return (values[:-1] + values[1:]) / 2


def _ranks(blocks: Tensor, scales: Tensor, midpoints: Tensor) -> Tensor:
    """Return, flat and int32, how high the nearest value ranks; a tie takes the lower one."""
    inverse = 1.0 / scales.clamp(min=_SMALLEST_ABSMAX)
    scaled = blocks * inverse.unsqueeze(1)
    # counts the midpoints that are strictly below
    return torch.bucketize(scaled, midpoints, out_int32=True).view(-1)


torch.library.impl("tunesmith::quantize_4bit", "default", reference_quantize_4bit)
torch.library.impl("tunesmith::quantize_absmax", "default", reference_quantize_absmax)
torch.library.impl("tunesmith::dequantize_4bit", "default", reference_dequantize_4bit)


# --- by the kernels


def _quantize_4bit(
    weight: Tensor, blocksize: int, quant_type: str, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    check_weight(weight, blocksize, quant_type, name)
    weight = weight.detach().contiguous()
    packed, absmax = _new_parts(weight, blocksize)
    with stream_of(weight) as stream:
        native.kernels.quantize_4bit(
            weight=weight.data_ptr(),
            dtype=CODES[weight.dtype],
            numel=weight.numel(),
            blocksize=blocksize,
            type=CODES[quant_type],
            packed=packed.data_ptr(),
            absmax=absmax.data_ptr(),
            stream=stream,
        )
    check_finite(absmax, weight.numel(), blocksize, quant_type, name)
    return packed, absmax


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_absmax(absmax)
    absmax = absmax.contiguous()
    offset = _mean_absmax(absmax)
    codes, nested_absmax = _new_nested(absmax)
    with stream_of(absmax) as stream:
        native.kernels.quantize_absmax(
            absmax=absmax.data_ptr(),
            blocks=absmax.numel(),
            nested_offset=offset.data_ptr(),
            codes=codes.data_ptr(),
            nested_absmax=nested_absmax.data_ptr(),
            stream=stream,
        )
    return codes, nested_absmax, offset


def _dequantize_4bit(*args: Any) -> Tensor:
    weight, dtype = Packed._make(args[:-1]), args[-1]
    weight.check(dtype)
    return dequantize_by_kernel(weight, dtype)


def dequantize_by_kernel(weight: Packed, dtype: torch.dtype) -> Tensor:
    """Do what `dequantize_by_torch` does."""
    packed, absmax = weight.packed.contiguous(), weight.absmax.contiguous()
    nested_absmax = compact(weight.nested_absmax)
    out = pooled_empty(tuple(weight.shape), dtype, packed.device)
    with stream_of(packed) as stream:
        native.kernels.dequantize_4bit(
            packed=packed.data_ptr(),
            absmax=absmax.data_ptr(),
            nested_absmax=pointer(nested_absmax),
            nested_offset=pointer(weight.nested_offset),
            numel=out.numel(),
            blocksize=weight.blocksize,
            type=CODES[weight.quant_type],
            dtype=CODES[dtype],
            out=out.data_ptr(),
            stream=stream,
        )
    return out


implement_on_all(
    {
        "quantize_4bit": _quantize_4bit,
        "quantize_absmax": _quantize_absmax,
        "dequantize_4bit": _dequantize_4bit,
    }
)
