"""NF4Linear: a frozen 4-bit base layer, an nn.Linear to everyone else.

The base of QLoRA (arXiv:2305.14314): the weight is kept in NF4, dequantized for each product and
dropped again. Gradients flow through to the input and the bias, never into the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from tunesmith.errors import OpError
from tunesmith.nn import interchange
from tunesmith.ops import (
    KINDS,
    FrozenLinear,
    Weight4Bit,
    dequantize_4bit,
    frozen_linear,
    quantize_4bit,
)
from tunesmith.ops.dtypes import DTYPES, word

__all__ = ["NF4Linear", "as_frozen", "autocast"]

_PARTS = ("packed", "absmax", "nested_absmax", "nested_offset")


class NF4Linear(nn.Linear):
    """A linear layer y = x Wᵀ + b whose frozen weight W is kept in NF4, or in FP4.

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

    stored_dense: bool = False
    """Whether a state dict holds the dequantized weight, for layers that stock transformers has no
    4-bit layer for."""

    def __init__(
        self, nf4: Weight4Bit, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
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
        self.quant_type = nf4.quant_type
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
        quant_type: str = "nf4",
    ) -> Self:
        """Quantize a linear layer; the bias is copied and frozen, the original left as it is.

        `dtype` is the compute dtype, by default that of the layer's weight; `quant_type` is "nf4"
        or "fp4". Raises OpError for a weight that cannot be quantized.
        """
        layer = cls.from_weight(
            linear.weight,
            linear.bias,
            blocksize=blocksize,
            nested=nested,
            dtype=dtype,
            quant_type=quant_type,
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
        quant_type: str = "nf4",
    ) -> Self:
        """Quantize a weight [out_features, in_features] in bf16, fp16 or fp32 into a layer.

        `dtype` is the compute dtype, by default that of `weight`; `name` is what errors call the
        weight. Raises OpError for a weight or settings that `ops.quantize_4bit` refuses.
        """
        w = quantize_4bit(weight, blocksize, nested, quant_type=quant_type, name=name or "weight")
        return cls(w, bias, dtype=dtype)

    @property
    def nf4(self) -> Weight4Bit:
        """The weight as it is kept, NF4 or FP4; its dtype is the compute dtype."""
        return KINDS[self.quant_type](
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
        return dequantize_4bit(self.nf4)

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
        weight = dequantize_4bit(self.nf4, dtype)
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
        return frozen_linear(autocast(input), as_frozen(self))

    def reset_parameters(self) -> None:
        """Refuse: there is no weight to initialize."""
        raise OpError(
            "got reset_parameters() on an NF4Linear, whose weight is frozen; build a new layer "
            "with NF4Linear.from_weight"
        )

    def extra_repr(self) -> str:
        """Return what print(model) shows of this layer."""
        scales = "nested" if self.nested_absmax is not None else "not nested"
        dtype = word(self.compute_dtype)
        kind = self.quant_type.upper()
        return (
            f"{super().extra_repr()}, 4-bit {kind}, blocksize={self.blocksize}, {scales}, {dtype}"
        )

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

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        # in bitsandbytes' layout, which stock transformers opens: see nn/interchange.py
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _PARTS:
            destination.pop(prefix + name, None)
        if self.stored_dense:
            destination[f"{prefix}weight"] = self.weight
            return
        destination.update(interchange.as_tensors(self.nf4, f"{prefix}weight"))

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
        key = f"{prefix}weight"
        incoming = dict(state_dict)
        if key in state_dict:
            try:
                w = interchange.from_tensors(state_dict, key)
                self._check_same_kind(w, key)
            except OpError as error:
                error_msgs.append(str(error))
                return
            for each in (key, *(key + suffix for suffix in interchange.SUFFIXES)):
                incoming.pop(each, None)
            for name in _PARTS:
                if (part := getattr(w, name)) is not None:
                    incoming[prefix + name] = part
        missing: list[str] = []
        super()._load_from_state_dict(
            incoming, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        own = {prefix + name for name in _PARTS}
        if not own.isdisjoint(missing):  # all of them are, or none is
            missing_keys.append(key)
        missing_keys.extend(each for each in missing if each not in own)

    def _check_same_kind(self, w: Weight4Bit, name: str) -> None:
        """Refuse another weight than this layer can take over by copying."""
        theirs, ours = interchange.Format.of(w), interchange.Format.of(self.nf4)
        if (w.shape, theirs) != (self.nf4.shape, ours):
            raise OpError(
                f"{name}: got {list(w.shape)} {theirs}; this layer holds {list(self.nf4.shape)} "
                f"{ours}; build one with NF4Linear(interchange.from_tensors(state_dict))"
            )


def as_frozen(linear: nn.Linear) -> FrozenLinear:
    """Return a frozen layer, in 4 bits or plain, as the ops take it."""
    rows, columns = linear.out_features, linear.in_features
    if not isinstance(linear, NF4Linear):
        return FrozenLinear(linear.weight, None, None, None, rows, columns, 0, "", linear.bias)
    # past nn.Module's look-up, which takes its time
    held: dict[str, Any] = linear._buffers
    return FrozenLinear(
        held["packed"],
        held["absmax"],
        held["nested_absmax"],
        held["nested_offset"],
        rows,
        columns,
        linear.blocksize,
        linear.quant_type,
        linear._parameters["bias"] if type(linear) is NF4Linear else linear.bias,
    )


def autocast(x: Tensor) -> Tensor:
    """Return x in the dtype that an nn.Linear would compute in."""
    device_type = x.device.type
    if (
        torch.amp.is_autocast_available(device_type)
        and torch.is_autocast_enabled(device_type)
        and x.dtype != torch.float64  # which autocast leaves alone
    ):
        return x.to(torch.get_autocast_dtype(device_type))
    return x


def _checked(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        allowed = ", ".join(str(each) for each in DTYPES)
        raise OpError(
            f"got compute dtype {dtype}; an NF4Linear computes in {allowed}; cast to one of these"
        )
    return dtype
