"""4-bit arithmetic: torch tensors in, torch tensors out.

`quantize_nf4` and `dequantize_nf4` are the two ends. Underneath, `schema` says what each op takes,
`reference` does it in plain PyTorch, and `native` puts compiled kernels in its place where there
are any.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from tunesmith.ops import schema
from tunesmith.ops.native import NativeStatus, native_status

__all__ = ["NF4Weight", "NativeStatus", "dequantize_nf4", "native_status", "quantize_nf4"]


@attrs.frozen(eq=False)
class NF4Weight:
    """A tensor in 4 bits per element, with all that it takes to turn it back.

    NF4 and double quantization are those of QLoRA (arXiv:2305.14314), byte for byte as
    bitsandbytes stores them. Raises OpError if the parts do not fit together.
    """

    packed: Tensor
    """uint8 [ceil(numel / 2)]: two codes a byte, element 2i in the high nibble."""
    absmax: Tensor
    """The scale of each block: fp32 [blocks], or uint8 codes [blocks] when nested."""
    nested_absmax: Tensor | None
    """fp32 [ceil(blocks / 256)]: the scale of each 256 codes; None unless nested."""
    nested_offset: Tensor | None
    """fp32 scalar: the mean that was taken off absmax; None unless nested."""
    shape: torch.Size = attrs.field(converter=torch.Size)
    """The shape of the tensor that was quantized."""
    dtype: torch.dtype
    """The dtype of the tensor that was quantized."""
    blocksize: int
    """How many elements of the flattened tensor share one absmax."""

    def __attrs_post_init__(self) -> None:
        """Refuse parts that do not fit together."""
        schema.check_packed(
            self.packed,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.shape,
            self.blocksize,
            self.dtype,
        )

    @property
    def nested(self) -> bool:
        """Whether absmax itself is quantized (double quantization)."""
        return self.nested_absmax is not None

    @property
    def device(self) -> torch.device:
        """The device that holds the parts."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """How many bytes the parts take."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def quantize_nf4(
    weight: Tensor, blocksize: int = 64, nested: bool = True, *, name: str = "weight"
) -> NF4Weight:
    """Quantize a tensor to NF4: 4 bits per element and one scale per block.

    `weight` is bf16, fp16 or fp32, of any shape; blocks run over it flattened, in row-major order,
    and a tensor that is not contiguous is copied first. `blocksize` is 64, 128, 256, 512, 1024,
    2048 or 4096. `nested` quantizes the scales, too, from 0.5 to 0.127 bits per element at block
    size 64. `name` is what errors call the tensor.

    Raises OpError for another dtype or block size, and for NaN or Inf, with the block they are in.
    """
    # codes have no derivative; left attached, they would look like results that have one
    packed, absmax = torch.ops.tunesmith.quantize_nf4(weight.detach(), blocksize, name)
    nested_absmax = nested_offset = None
    if nested:
        absmax, nested_absmax, nested_offset = torch.ops.tunesmith.quantize_absmax(absmax)
    return NF4Weight(
        packed=packed,
        absmax=absmax,
        nested_absmax=nested_absmax,
        nested_offset=nested_offset,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=blocksize,
    )


def dequantize_nf4(w: NF4Weight, dtype: torch.dtype | None = None) -> Tensor:
    """Turn an NF4 weight back into a plain tensor of its shape.

    Each element is its code's value times its block's absmax, in fp32, rounded once to `dtype`:
    bf16, fp16 or fp32, by default that of the tensor that was quantized. Raises OpError for others.
    """
    out: Tensor = torch.ops.tunesmith.dequantize_nf4(
        w.packed,
        w.absmax,
        w.nested_absmax,
        w.nested_offset,
        w.shape,
        w.blocksize,
        dtype or w.dtype,
    )
    return out
