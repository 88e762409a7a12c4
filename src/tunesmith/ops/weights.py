"""Weights in 4 bits, with all that it takes to turn them back: `quantize_4bit` and its inverse."""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from tunesmith.ops.dispatch import call
from tunesmith.ops.four_bit import Packed

__all__ = [
    "KINDS",
    "FP4Weight",
    "NF4Weight",
    "Weight4Bit",
    "dequantize_4bit",
    "dequantize_nf4",
    "quantize_4bit",
    "quantize_fp4",
    "quantize_nf4",
]


@attrs.frozen(eq=False)
class Weight4Bit:
    """A tensor in 4 bits per element, with all that it takes to turn it back.

    `NF4Weight` and `FP4Weight` are its two kinds. Raises OpError if the parts do not fit together.
    """

    quant_type: ClassVar[str] = ""
    """The 4-bit type, "nf4" or "fp4"."""

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
        self.parts.check(self.dtype)

    @property
    def parts(self) -> Packed:
        """The parts as the ops take them."""
        scales = (self.absmax, self.nested_absmax, self.nested_offset)
        return Packed(self.packed, *scales, self.shape, self.blocksize, self.quant_type)

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


@attrs.frozen(eq=False)
class NF4Weight(Weight4Bit):
    """A tensor in 4-bit NormalFloat.

    NF4 and double quantization are those of QLoRA (arXiv:2305.14314), byte for byte as
    bitsandbytes stores them.
    """

    quant_type: ClassVar[str] = "nf4"


@attrs.frozen(eq=False)
class FP4Weight(Weight4Bit):
    """A tensor in 4-bit floats of 1 sign, 2 exponent and 1 mantissa bit.

    FP4 and double quantization are those of bitsandbytes, byte for byte as it stores them on the
    CPU.
    """

    quant_type: ClassVar[str] = "fp4"


KINDS: dict[str, type[Weight4Bit]] = {"nf4": NF4Weight, "fp4": FP4Weight}
"""The two kinds of weight by the name of their type."""


def quantize_4bit(
    weight: Tensor,
    blocksize: int = 64,
    nested: bool = True,
    *,
    quant_type: str = "nf4",
    name: str = "weight",
) -> Weight4Bit:
    """Quantize a tensor to 4 bits per element and one scale per block.

    `weight` is bf16, fp16 or fp32, of any shape; blocks run over it flattened, in row-major order,
    and a tensor that is not contiguous is copied first. `blocksize` is 64, 128, 256, 512, 1024,
    2048 or 4096. `nested` quantizes the scales, too, from 0.5 to 0.127 bits per element at block
    size 64. `quant_type` is "nf4" or "fp4". `name` is what errors call the tensor.

    Raises OpError for another dtype, block size or type, and for NaN or Inf, with the block they
    are in.
    """
    # codes have no derivative; left attached, they would look like results that have one
    packed, absmax = call("quantize_4bit", weight.detach(), blocksize, quant_type, name)
    nested_absmax = nested_offset = None
    if nested:
        absmax, nested_absmax, nested_offset = call("quantize_absmax", absmax)
    return KINDS[quant_type](
        packed=packed,
        absmax=absmax,
        nested_absmax=nested_absmax,
        nested_offset=nested_offset,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=blocksize,
    )


def quantize_nf4(
    weight: Tensor, blocksize: int = 64, nested: bool = True, *, name: str = "weight"
) -> NF4Weight:
    """Quantize a tensor to NF4; arguments and errors are those of `quantize_4bit`."""
    w = quantize_4bit(weight, blocksize, nested, quant_type="nf4", name=name)
    assert isinstance(w, NF4Weight)
    return w


def quantize_fp4(
    weight: Tensor, blocksize: int = 64, nested: bool = True, *, name: str = "weight"
) -> FP4Weight:
    """Quantize a tensor to FP4; arguments and errors are those of `quantize_4bit`."""
    w = quantize_4bit(weight, blocksize, nested, quant_type="fp4", name=name)
    assert isinstance(w, FP4Weight)
    return w


def dequantize_4bit(w: Weight4Bit, dtype: torch.dtype | None = None) -> Tensor:
    """Turn a 4-bit weight of either kind back into a plain tensor of its shape.

    Each element is its code's value times its block's absmax, in fp32, rounded once to `dtype`:
    bf16, fp16 or fp32, by default that of the tensor that was quantized. Raises OpError for others.
    """
    out: Tensor = call("dequantize_4bit", *w.parts, dtype or w.dtype)
    return out


def dequantize_nf4(w: Weight4Bit, dtype: torch.dtype | None = None) -> Tensor:
    """Do what `dequantize_4bit` does, under the name that goes with `quantize_nf4`."""
    return dequantize_4bit(w, dtype)
