"""What each op is: its schema, what its arguments must be, and what shape comes out.

The ops take flat tensors and plain numbers, so that any device can implement them. Every
implementation calls the `check_*` function of its op first: native code is handed bare pointers and
has no second chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.errors import OpError

__all__ = [
    "BLOCKSIZES",
    "DTYPES",
    "NESTED_BLOCKSIZE",
    "check_absmax",
    "check_finite",
    "check_packed",
    "check_weight",
    "count_blocks",
]

BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)
"""How many weights may share one absmax."""

NESTED_BLOCKSIZE = 256
"""How many absmax share one scale in double quantization."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What can be quantized, and what can be dequantized into."""


def count_blocks(numel: int, blocksize: int) -> int:
    """Return how many blocks hold `numel` elements; the last may be short."""
    return -(-numel // blocksize)


torch.library.define(
    "tunesmith::quantize_nf4",
    '(Tensor weight, int blocksize, str name="weight") -> (Tensor packed, Tensor absmax)',
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "tunesmith::quantize_absmax",
    "(Tensor absmax) -> (Tensor codes, Tensor nested_absmax, Tensor nested_offset)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "tunesmith::dequantize_nf4",
    "(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset, "
    "SymInt[] shape, int blocksize, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _fake_quantize_nf4(
    weight: Tensor, blocksize: int, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    numel = weight.numel()
    packed = weight.new_empty((numel + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty(count_blocks(numel, blocksize), dtype=torch.float32)
    return packed, absmax


def _fake_quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = absmax.numel()
    codes = absmax.new_empty(blocks, dtype=torch.uint8)
    nested_absmax = absmax.new_empty(count_blocks(blocks, NESTED_BLOCKSIZE))
    return codes, nested_absmax, absmax.new_empty(())


def _fake_dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(tuple(shape), dtype=dtype)


torch.library.register_fake("tunesmith::quantize_nf4", _fake_quantize_nf4)
torch.library.register_fake("tunesmith::quantize_absmax", _fake_quantize_absmax)
torch.library.register_fake("tunesmith::dequantize_nf4", _fake_dequantize_nf4)


def check_weight(weight: Tensor, blocksize: int, name: str) -> None:
    """Refuse what cannot be quantized to NF4; `name` is what the message calls the tensor."""
    _check_blocksize(blocksize)
    if weight.layout != torch.strided:
        raise OpError(
            f"{name}: got a {_word(weight.layout)} tensor; only dense (strided) tensors can be "
            f"quantized to nf4; call .to_dense() first"
        )
    _check_dtype(weight.dtype, f"{name}: got dtype", "quantized to nf4", "cast the tensor first")


def check_absmax(absmax: Tensor) -> None:
    """Refuse what is no fp32 [blocks] vector of absmax."""
    _check_part("absmax", absmax, torch.float32, (absmax.numel(),), absmax.device)


def check_packed(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    dtype: torch.dtype,
) -> None:
    """Refuse parts that do not make up one NF4 weight of that shape and block size."""
    _check_blocksize(blocksize)
    _check_dtype(dtype, "got dtype", "dequantized into", "cast the result instead")
    if any(size < 0 for size in shape):
        raise OpError(f"got shape {list(shape)}; sizes cannot be negative; pass the weight's shape")
    numel = math.prod(shape)
    blocks = count_blocks(numel, blocksize)
    device = packed.device
    _check_part("packed", packed, torch.uint8, ((numel + 1) // 2,), device)
    if nested_absmax is None and nested_offset is None:
        _check_part("absmax", absmax, torch.float32, (blocks,), device)
        return
    if nested_absmax is None or nested_offset is None:
        raise OpError(
            "got only one of nested_absmax and nested_offset; a double-quantized weight has both, "
            "any other has neither; pass both or none"
        )
    groups = count_blocks(blocks, NESTED_BLOCKSIZE)
    _check_part("absmax codes", absmax, torch.uint8, (blocks,), device)
    _check_part("nested_absmax", nested_absmax, torch.float32, (groups,), device)
    _check_part("nested_offset", nested_offset, torch.float32, (), device)


def check_finite(absmax: Tensor, numel: int, blocksize: int, name: str) -> None:
    """Refuse a weight of which a block holds NaN or Inf: the absmax of that block is one, too."""
    finite = absmax.isfinite()
    if bool(finite.all()):
        return
    block = int(finite.logical_not().nonzero()[0])
    first = block * blocksize
    last = min(first + blocksize, numel) - 1
    raise OpError(
        f"{name}: block {block} (elements {first} to {last} of the flattened tensor) holds NaN or "
        f"Inf; nf4 needs finite values; check the checkpoint, or the cast that made this tensor"
    )


def _check_blocksize(blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        allowed = ", ".join(map(str, BLOCKSIZES))
        raise OpError(
            f"got blocksize {blocksize}; allowed are {allowed}; 64 is what the QLoRA paper uses"
        )


def _check_dtype(dtype: torch.dtype, got: str, verb: str, next_step: str) -> None:
    if dtype not in DTYPES:
        allowed = ", ".join(map(_word, DTYPES))
        raise OpError(f"{got} {_word(dtype)}; {allowed} can be {verb}; {next_step}")


def _check_part(
    name: str, part: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    if part.dtype != dtype or tuple(part.shape) != shape:
        raise OpError(
            f"{name}: got {_word(part.dtype)} {list(part.shape)}; this weight needs "
            f"{_word(dtype)} {list(shape)}; pass the parts as quantize_nf4 returned them"
        )
    if part.device != device:
        raise OpError(
            f"{name}: got a tensor on {part.device}, but the packed data is on {device}; all parts "
            f"of a weight must be on one device; move them together"
        )


def _word(value: torch.dtype | torch.layout) -> str:
    return str(value).removeprefix("torch.")
