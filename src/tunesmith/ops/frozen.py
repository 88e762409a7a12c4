"""A frozen linear layer with an adapter beside it, as one value, and what of it fits together."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.ops.dtypes import DTYPES, sum_dtype, word, words
from tunesmith.ops.four_bit import QUANT_TYPES, Packed
from tunesmith.ops.native import compact
from tunesmith.ops.weights import Weight4Bit

__all__ = [
    "SMALL_TOKENS",
    "FrozenLinear",
    "GradientsOf",
    "LoraWeights",
    "check_linear",
    "check_linear_backward",
    "s_dtype",
]

SMALL_TOKENS = 16
"""Up to this many rows of x, CUDA multiplies with a 4-bit weight without dequantizing it first."""


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


class FrozenLinear(NamedTuple):
    """A linear layer with a frozen weight, and the adapter beside it.

    The fields are what the ops `linear` and `linear_backward` take, in the order of their schemas.
    Nothing is checked before an op is called with them.
    """

    weight: Tensor
    """uint8 [ceil(out_features in_features / 2)] in 4 bits, else [out_features, in_features]."""
    absmax: Tensor | None
    """The scales of a weight in 4 bits, as `Weight4Bit` has them; None for a plain one."""
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    out_features: int
    in_features: int
    blocksize: int
    """0 for a plain weight."""
    quant_type: str
    """"nf4" or "fp4", and "" for a plain weight."""
    bias: Tensor | None = None
    """[out_features] in x's dtype."""
    lora_a: Tensor | None = None
    """A [rank, in_features], bf16, fp16 or fp32; None without an adapter, and so is B."""
    lora_b: Tensor | None = None
    """B [out_features, rank] in A's dtype."""
    scaling: float = 1.0
    """alpha / rank, in LoRA's terms."""
    keep: Tensor | None = None
    """Dropout's mask of the adapter's input, bool in x's shape; None keeps everything."""
    keep_scale: float = 1.0
    """What is kept is multiplied by."""

    @classmethod
    def packed(cls, w: Weight4Bit, bias: Tensor | None = None) -> FrozenLinear:
        """Return a layer with a weight in 4 bits."""
        if len(w.shape) != 2:
            raise OpError(
                f"got a weight of shape {list(w.shape)}; allowed is [out_features, in_features]; "
                f"reshape it before it is quantized"
            )
        parts = (w.packed, w.absmax, w.nested_absmax, w.nested_offset)
        return cls(*parts, w.shape[0], w.shape[1], w.blocksize, w.quant_type, bias)

    @classmethod
    def plain(cls, weight: Tensor, bias: Tensor | None = None) -> FrozenLinear:
        """Return a layer with a plain weight."""
        if weight.dim() != 2:
            raise OpError(
                f"got a weight of shape {list(weight.shape)}; allowed is "
                f"[out_features, in_features]; reshape it"
            )
        return cls(weight, None, None, None, weight.shape[0], weight.shape[1], 0, "", bias)

    def with_lora(self, lora: tuple[Tensor, Tensor, float]) -> FrozenLinear:
        """Return the layer with an adapter: A, B and scaling."""
        fields: list[Any] = [*self[:9], *lora, *self[12:]]
        return FrozenLinear._make(fields)

    @property
    def rank(self) -> int:
        """The adapter's rank, 0 without one."""
        return 0 if self.lora_a is None else self.lora_a.shape[0]

    @property
    def in_4_bits(self) -> Packed:
        """The weight, which is in 4 bits."""
        assert self.absmax is not None
        parts = (self.weight, self.absmax, self.nested_absmax, self.nested_offset)
        shape = (self.out_features, self.in_features)
        return Packed(*parts, shape, self.blocksize, self.quant_type)

    def compact(self, *, weight_too: bool = False) -> FrozenLinear:
        """Return the layer with its tensors in row-major order without gaps; the weight if asked.

        Most callers look at the weight first, and leave one with gaps to a library.
        """
        return FrozenLinear(
            self.weight.contiguous() if weight_too else self.weight,
            compact(self.absmax),
            compact(self.nested_absmax),
            self.nested_offset,
            self.out_features,
            self.in_features,
            self.blocksize,
            self.quant_type,
            compact(self.bias),
            compact(self.lora_a),
            compact(self.lora_b),
            self.scaling,
            compact(self.keep),
            self.keep_scale,
        )


class GradientsOf(NamedTuple):
    """What `linear_backward` is given, and which gradients it is to work out."""

    grad_y: Tensor
    """[..., out_features]"""
    x: Tensor | None
    """[..., in_features]; only for A's."""
    s: Tensor | None
    """What `linear` returned, [tokens, rank]; only for B's."""
    layer: FrozenLinear
    """The bias is not read."""
    need_x: bool
    need_a: bool
    need_b: bool


def s_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of s = x Aᵀ [tokens, rank] as `linear` returns it for x [..., in_features].

    It is `sum_dtype`, but x's own where CUDA has more than a few tokens: there a tensor core sums
    in fp32, and takes and leaves 16 bits.
    """
    if x.device.type == "cuda" and math.prod(x.shape[:-1]) > SMALL_TOKENS:
        return x.dtype
    return sum_dtype(x.dtype)


def check_linear(x: Tensor, layer: FrozenLinear) -> None:
    """Refuse arguments of `linear` that do not fit together."""
    _check_input("x", x, layer.in_features)
    _check_weight(x, layer)
    if layer.bias is not None:
        _check_tensor("bias", layer.bias, (x.dtype,), (layer.out_features,), x.device)
    _check_adapter(x, layer)
    if layer.keep is None:
        return
    if layer.lora_a is None:
        raise OpError(
            "got a dropout mask without an adapter; dropout acts on the adapter's input only; "
            "pass lora, or leave dropout at 0"
        )
    _check_tensor("keep", layer.keep, (torch.bool,), x.shape, x.device)


def check_linear_backward(given: GradientsOf) -> None:
    """Refuse arguments of `linear_backward` that do not fit together."""
    grad_y, x, s, layer, _, need_a, need_b = given
    _check_input("grad_y", grad_y, layer.out_features)
    leading = grad_y.shape[:-1]
    shape = (*leading, layer.in_features)
    _check_weight(grad_y, layer)
    _check_adapter(grad_y, layer)
    if layer.keep is not None:
        _check_tensor("keep", layer.keep, (torch.bool,), shape, grad_y.device)
    if not (need_a or need_b):
        return
    if layer.lora_a is None:
        raise OpError("got need_a or need_b without an adapter; pass lora_a and lora_b")
    if need_a:
        if x is None:
            raise OpError("got need_a without x, from which grad_a is made; pass x")
        _check_tensor("x", x, (grad_y.dtype,), shape, grad_y.device)
    if need_b:
        if s is None:
            raise OpError("got need_b without s, from which grad_b is made; pass linear's s")
        s_shape = (math.prod(leading), layer.rank)
        _check_tensor("s", s, (s_dtype(grad_y),), s_shape, grad_y.device)


def _check_input(name: str, x: Tensor, features: int) -> None:
    if x.dim() == 0 or x.layout != torch.strided or x.shape[-1] != features:
        raise OpError(
            f"{name}: got a {word(x.layout)} tensor of shape {list(x.shape)}; allowed is a dense "
            f"tensor [..., {features}]; reshape it, or pass what this layer is for"
        )
    if x.dtype not in DTYPES and x.dtype != torch.float64:
        raise OpError(
            f"{name}: got dtype {word(x.dtype)}; allowed are {words(DTYPES)}, float64; cast it"
        )


def _check_weight(x: Tensor, layer: FrozenLinear) -> None:
    weight, quant_type = layer.weight, layer.quant_type
    if weight.device != x.device:
        raise OpError(
            f"weight: got a tensor on {weight.device}, but the input is on {x.device}; all "
            f"tensors of a product must be on one device; move one of them"
        )
    if quant_type != "":
        if layer.absmax is None:
            raise OpError(
                f"got no absmax for a weight in {quant_type}; only a plain weight has none; pass "
                f"the parts as quantize_{quant_type} returned them"
            )
        layer.in_4_bits.check()
        return
    if not (layer.absmax is layer.nested_absmax is layer.nested_offset is None):
        raise OpError(
            "got scales for a plain weight; only a 4-bit weight has them; name its quant_type: "
            + " or ".join(QUANT_TYPES)
        )
    shape = (layer.out_features, layer.in_features)
    _check_tensor("weight", weight, _plain_dtypes(x), shape, x.device)


def _check_adapter(x: Tensor, layer: FrozenLinear) -> None:
    lora_a, lora_b = layer.lora_a, layer.lora_b
    if lora_a is None and lora_b is None:
        return
    if lora_a is None or lora_b is None:
        raise OpError("got only one of lora_a and lora_b; an adapter has both; pass both or none")
    rank = lora_a.shape[0] if lora_a.dim() else 0
    if rank == 0:
        raise OpError(
            f"lora_a: got shape {list(lora_a.shape)}; allowed is [rank, {layer.in_features}] with "
            f"a rank of 1 or more; leave the adapter out if there is none"
        )
    _check_tensor("lora_a", lora_a, _plain_dtypes(x), (rank, layer.in_features), x.device)
    # one dtype for both, so that a kernel knows one
    _check_tensor("lora_b", lora_b, (lora_a.dtype,), (layer.out_features, rank), x.device)


def _plain_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    return (*DTYPES, torch.float64) if x.dtype == torch.float64 else DTYPES


def _check_tensor(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    device: torch.device,
) -> None:
    if tensor.dtype not in dtypes or tensor.shape != shape:
        raise OpError(
            f"{name}: got {word(tensor.dtype)} {list(tensor.shape)}; allowed here is "
            f"{' or '.join(map(word, dtypes))} {list(shape)}; cast or reshape it"
        )
    if tensor.device != device:
        raise OpError(
            f"{name}: got a tensor on {tensor.device}, but the input is on {device}; all tensors "
            f"of a product must be on one device; move one of them"
        )
