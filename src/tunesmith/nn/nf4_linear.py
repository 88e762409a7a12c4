"""NF4Linear: a frozen 4-bit base layer, an nn.Linear to everyone else.

The base of QLoRA (arXiv:2305.14314): the weight is kept in NF4, dequantized for each product and
dropped again. Gradients flow through to the input and the bias, never into the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.errors import OpError
from tunesmith.ops import NF4Weight, dequantize_nf4, quantize_nf4
from tunesmith.ops.schema import DTYPES

__all__ = ["NF4Linear"]

_PARTS = ("packed", "absmax", "nested_absmax", "nested_offset")


class NF4Linear(nn.Linear):
    """A linear layer y = x Wᵀ + b whose frozen weight W is kept in NF4.

    Built by `from_linear` or `from_weight`. `in_features`, `out_features` and `bias` are those of
    an nn.Linear. `weight` is dequantized at every access, a new tensor each time: reading it is
    right, writing into it in place changes only that copy, and assigning to it raises OpError. To
    edit the weight take `dense()`, edit that, and quantize it again.

    Casts (`.to(dtype)`, `.half()`, ...) change the compute dtype, which is what `weight` reports,
    and the bias; the packed data and the scales keep their dtypes. Moves (`.to(device)`) move all.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(
        self, nf4: NF4Weight, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        # not nn.Linear's own, which would allocate a dense weight
        nn.Module.__init__(self)
        if len(nf4.shape) != 2:
            raise OpError(
                f"got a weight of shape {list(nf4.shape)}; a linear layer's is "
                f"[out_features, in_features]; reshape it before it is quantized"
            )
        self.out_features, self.in_features = nf4.shape
        self.blocksize = nf4.blocksize
        self.compute_dtype = _checked(dtype or nf4.dtype)
        for name in _PARTS:
            self.register_buffer(name, getattr(nf4, name))
        if bias is not None:
            if bias.shape != (self.out_features,):
                raise OpError(
                    f"got a bias of shape {list(bias.shape)}; the weight has {self.out_features} "
                    f"rows; pass one value for each"
                )
            own = bias.detach().to(nf4.device, self.compute_dtype, copy=True)
            bias = nn.Parameter(own, requires_grad=False)
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        blocksize: int = 64,
        nested: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Quantize a linear layer; the bias is copied and frozen, the original left as it is.

        `dtype` is the compute dtype, by default that of the layer's weight. Raises OpError for a
        weight that cannot be quantized.
        """
        layer = cls.from_weight(
            linear.weight, linear.bias, blocksize=blocksize, nested=nested, dtype=dtype
        )
        return layer.train(linear.training)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        blocksize: int = 64,
        nested: bool = True,
        dtype: torch.dtype | None = None,
        name: str | None = None,
    ) -> Self:
        """Quantize a weight [out_features, in_features] in bf16, fp16 or fp32 into a layer.

        `dtype` is the compute dtype, by default that of `weight`; `name` is what errors call the
        weight. Raises OpError for a weight or settings that `ops.quantize_nf4` refuses.
        """
        nf4 = quantize_nf4(weight, blocksize, nested, name=name or "weight")
        return cls(nf4, bias, dtype=dtype)

    @property
    def nf4(self) -> NF4Weight:
        """The weight as it is kept; its dtype is the compute dtype."""
        return NF4Weight(
            packed=self.packed,
            absmax=self.absmax,
            nested_absmax=self.nested_absmax,
            nested_offset=self.nested_offset,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.compute_dtype,
            blocksize=self.blocksize,
        )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # nn.Linear's can be written
        """The weight [out_features, in_features], dequantized anew into the compute dtype."""
        return dequantize_nf4(self.nf4)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, but refuse `weight`, whose new value would be lost."""
        if name == "weight":
            raise OpError(
                "got an assignment to the weight of an NF4Linear, which is read-only; take "
                "dense(), edit that, and quantize it again with NF4Linear.from_linear"
            )
        super().__setattr__(name, value)

    def dense(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return a plain nn.Linear with the dequantized weight and a copy of the bias.

        `dtype` is bf16, fp16 or fp32, by default the compute dtype. Nothing in it requires a
        gradient; what is done to it does not reach this layer.
        """
        dtype = dtype or self.compute_dtype
        weight = dequantize_nf4(self.nf4, dtype)
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            bias = self.bias.detach().to(dtype, copy=True)
            linear.bias = nn.Parameter(bias, requires_grad=False)
        return linear.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """Return x Wᵀ + b for x [..., in_features], in x's dtype or autocast's."""
        x = _autocast(input)
        bias: Tensor | None = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        shape = (self.out_features, self.in_features)
        product = _Product.apply(  # type: ignore[no-untyped-call]  # torch's own
            x, bias, *parts, shape, self.blocksize
        )
        return cast(Tensor, product)

    def reset_parameters(self) -> None:
        """Refuse: there is no weight to initialize."""
        raise OpError(
            "got reset_parameters() on an NF4Linear, whose weight is frozen; build a new layer "
            "with NF4Linear.from_weight"
        )

    def extra_repr(self) -> str:
        """Return what print(model) shows of this layer."""
        scales = "nested" if self.nested_absmax is not None else "not nested"
        dtype = str(self.compute_dtype).removeprefix("torch.")
        return f"{super().extra_repr()}, 4-bit NF4, blocksize={self.blocksize}, {scales}, {dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # this is what .to(), .half(), .cuda() and their like go through
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.packed.device))
        dtype = _checked(probe.dtype)
        parts = {id(part) for part in self._buffers.values()}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in parts and moved.dtype != tensor.dtype:
                # a scale in 16 bits is another scale: take the move, leave the cast
                return tensor.to(moved.device)
            return moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]  # torch's own
        self.compute_dtype = dtype
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in _PARTS:
            ours, theirs = getattr(self, name), state_dict.get(prefix + name)
            if ours is not None and theirs is not None and theirs.dtype != ours.dtype:
                error_msgs.append(
                    f"{prefix}{name}: got {theirs.dtype}; this part of an NF4 weight is "
                    f"{ours.dtype}; load a state dict that was not cast"
                )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class _Product(torch.autograd.Function):
    """y = x Wᵀ + b, W dequantized for each direction and kept for neither."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        nested_offset: Tensor | None,
        shape: tuple[int, int],
        blocksize: int,
    ) -> Tensor:
        parts = (packed, absmax, nested_absmax, nested_offset)
        ctx.save_for_backward(*parts)
        ctx.shape, ctx.blocksize = shape, blocksize
        return F.linear(x, _dequantized(parts, shape, blocksize, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads  # [..., out_features]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            weight = _dequantized(ctx.saved_tensors, ctx.shape, ctx.blocksize, grad.dtype)
            grad_x = grad @ weight  # [..., in_features]
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)  # [out_features]
        return grad_x, grad_bias, None, None, None, None, None, None


def _autocast(x: Tensor) -> Tensor:
    """Return x in the dtype that an nn.Linear would compute in."""
    device_type = x.device.type
    if (
        torch.amp.is_autocast_available(device_type)
        and torch.is_autocast_enabled(device_type)
        and x.dtype != torch.float64  # which autocast leaves alone
    ):
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def _dequantized(
    parts: tuple[Tensor | None, ...], shape: tuple[int, int], blocksize: int, dtype: torch.dtype
) -> Tensor:
    # fp64 has no kernel, and no need of one: fp32 holds every value exactly
    kernel_dtype = dtype if dtype in DTYPES else torch.float32
    weight: Tensor = torch.ops.tunesmith.dequantize_nf4(*parts, shape, blocksize, kernel_dtype)
    return weight.to(dtype)


def _checked(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        allowed = ", ".join(str(each) for each in DTYPES)
        raise OpError(
            f"got compute dtype {dtype}; an NF4Linear computes in {allowed}; cast to one of these"
        )
    return dtype
