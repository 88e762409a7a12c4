"""4-bit arithmetic: torch tensors in, torch tensors out.

`quantize_nf4`, `quantize_fp4` and `dequantize_4bit` are the two ends; `linear_nf4` and
`lora_linear` multiply with a frozen weight, and add a LoRA adapter in the same pass. Underneath,
`schema` says what each op takes, `reference` does it in plain PyTorch, and `native` puts compiled
kernels in its place where there are any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import attrs
import torch
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.ops import schema
from tunesmith.ops.dispatch import call
from tunesmith.ops.native import NativeStatus, native_status

__all__ = [
    "KINDS",
    "FP4Weight",
    "LoraWeights",
    "NF4Weight",
    "NativeStatus",
    "Weight4Bit",
    "dequantize_4bit",
    "dequantize_nf4",
    "frozen_linear",
    "linear_nf4",
    "lora_linear",
    "native_status",
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
        schema.check_packed(
            self.packed,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.shape,
            self.blocksize,
            self.quant_type,
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


class LoraWeights(NamedTuple):
    """An adapter: y gains scaling x Aᵀ Bᵀ (LoRA, arXiv:2106.09685). A plain tuple serves as well.

    Both matrices have one dtype of bf16, fp16 and fp32, which need not be x's.
    """

    a: Tensor
    """A [rank, in_features]."""
    b: Tensor
    """B [out_features, rank]."""
    scaling: float
    """alpha / rank, in LoRA's terms."""


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
    out: Tensor = call(
        "dequantize_4bit",
        w.packed,
        w.absmax,
        w.nested_absmax,
        w.nested_offset,
        w.shape,
        w.blocksize,
        w.quant_type,
        dtype or w.dtype,
    )
    return out


def dequantize_nf4(w: Weight4Bit, dtype: torch.dtype | None = None) -> Tensor:
    """Do what `dequantize_4bit` does, under the name that goes with `quantize_nf4`."""
    return dequantize_4bit(w, dtype)


def linear_nf4(
    x: Tensor,
    w: Weight4Bit,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Return y = x Wᵀ + bias + scaling dropout(x) Aᵀ Bᵀ for a 4-bit W [out_features, in_features].

    `x` is [..., in_features] in bf16, fp16, fp32 or fp64, and y [..., out_features] has its dtype.
    `lora` is (A [rank, in_features], B [out_features, rank], scaling), `LoraWeights` or a tuple.
    `dropout` is the probability with which an element of the adapter's input is zeroed; the random
    numbers are those that torch.nn.functional.dropout would draw on the CPU. Gradients flow to x,
    bias, A and B; the dense weight is kept for none of them. `w` may be FP4, too.

    Raises OpError for shapes, dtypes and devices that do not fit together.
    """
    if len(w.shape) != 2:
        raise OpError(
            f"got a weight of shape {list(w.shape)}; allowed is [out_features, in_features]; "
            f"reshape it before it is quantized"
        )
    parts = (w.packed, w.absmax, w.nested_absmax, w.nested_offset)
    return frozen_linear(x, parts, w.shape, w.blocksize, w.quant_type, bias, lora, dropout)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """Return the same as `linear_nf4` for a plain frozen weight [out_features, in_features].

    `weight` is bf16, fp16 or fp32; where that is not x's dtype it is cast for the product and the
    cast one dropped again. Raises OpError for a weight that requires a gradient, besides what
    `linear_nf4` refuses.
    """
    if weight.dim() != 2:
        raise OpError(
            f"got a weight of shape {list(weight.shape)}; allowed is [out_features, in_features]; "
            f"reshape it"
        )
    return frozen_linear(x, (weight, None, None, None), weight.shape, 0, "", bias, lora, dropout)


def frozen_linear(
    x: Tensor,
    parts: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    shape: Sequence[int],
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Do what `linear_nf4` and `lora_linear` do, for layers that hold the parts themselves.

    `parts` are packed, absmax, nested_absmax and nested_offset, or a plain weight and None thrice,
    with quant_type ""; `shape` is [out_features, in_features].
    """
    out_features, in_features = shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise OpError(
            f"x: got shape {list(x.shape)}; allowed is [..., {in_features}], as the weight has "
            f"{in_features} columns; pass what this layer is for"
        )
    if not 0.0 <= dropout <= 1.0:
        raise OpError(f"got dropout {dropout}; allowed is a probability from 0 to 1; mend it")
    if dropout and lora is None:
        raise OpError(
            f"got dropout {dropout} without an adapter, on whose input alone it acts; pass lora, "
            f"or leave dropout at 0"
        )
    lora_a, lora_b, scaling = (None, None, 1.0) if lora is None else lora
    if lora_a is not None and lora_b is not None and x.device.type == "cuda":
        lora_a, lora_b = _for_cuda(x, lora_a, lora_b)
    keep, keep_scale = None, 1.0
    if dropout:
        # laid out as x is: the numbers are drawn in the order of the memory
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout)
        keep_scale = 0.0 if dropout == 1.0 else 1.0 / (1.0 - dropout)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    y, _ = call(
        "linear", x, *parts, out_features, blocksize, quant_type, bias, lora_a, lora_b, scaling,
        keep, keep_scale,
    )  # fmt: skip
    out: Tensor = y
    return out


def _for_cuda(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the adapter in x's dtype if there is more than a few tokens for it.

    Tensor cores take x in 16 bits; cast here, it is cast once for both ways.
    """
    if x.shape.numel() <= schema.SMALL_TOKENS * x.shape[-1]:
        return lora_a, lora_b
    return lora_a.to(x.dtype), lora_b.to(x.dtype)
