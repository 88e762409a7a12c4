"""The product with a frozen weight and an adapter beside it, forward and backward.

    y = x Wᵀ + bias + scaling s Bᵀ,  s = (keep_scale keep x) Aᵀ

LoRA (arXiv:2106.09685) over a W that is in 4 bits or plain. Two ops, each with schema, check,
derivative, PyTorch, and what the CPU and CUDA do. What they take besides x is one value,
`FrozenLinear`, which is flat only where torch.library has to see it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.ops import frozen, native
from tunesmith.ops.dispatch import below_autograd, call, differentiate, implement
from tunesmith.ops.dtypes import DTYPES, sum_dtype
from tunesmith.ops.four_bit import (
    Packed,
    dequantize_by_kernel,
    dequantize_by_torch,
)
from tunesmith.ops.frozen import (
    FrozenLinear,
    GradientsOf,
    check_linear,
    check_linear_backward,
    s_dtype,
)
from tunesmith.ops.machine import cpu_flags, cpu_multiplies_bf16
from tunesmith.ops.native import CODES, empty_like, pointer, stream_of
from tunesmith.ops.weights import Weight4Bit

__all__ = [
    "dense_weight",
    "frozen_linear",
    "in_one_call",
    "linear_nf4",
    "lora_linear",
    "native_linear",
    "reference_linear",
    "reference_linear_backward",
]


_LAYER = (
    "Tensor weight, Tensor? absmax, Tensor? nested_absmax, Tensor? nested_offset, "
    "int out_features, int in_features, int blocksize, str quant_type, Tensor? bias, "
    "Tensor? lora_a, Tensor? lora_b, float scaling, Tensor? keep, float keep_scale"
)
_SCHEMAS = {
    "linear": f"(Tensor x, {_LAYER}) -> (Tensor y, Tensor s)",
    # x and s only for what needs them, so that autograd need not keep them for the rest
    "linear_backward": f"(Tensor grad_y, Tensor? x, Tensor? s, {_LAYER}, bool need_x, "
    "bool need_a, bool need_b) -> (Tensor grad_x, Tensor grad_a, Tensor grad_b)",
}
for _op, _schema in _SCHEMAS.items():
    torch.library.define(f"tunesmith::{_op}", _schema, tags=torch.Tag.pt2_compliant_tag)


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
    layer = FrozenLinear.packed(w, bias)
    return frozen_linear(x, layer if lora is None else layer.with_lora(lora), dropout)


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
    layer = FrozenLinear.plain(weight, bias)
    return frozen_linear(x, layer if lora is None else layer.with_lora(lora), dropout)


def frozen_linear(x: Tensor, layer: FrozenLinear, dropout: float = 0.0) -> Tensor:
    """Do what `linear_nf4` and `lora_linear` do, for layers that hold the parts themselves.

    The bias may be in any dtype; `keep` and `keep_scale` are made here.
    """
    if x.dim() == 0 or x.shape[-1] != layer.in_features:
        raise OpError(
            f"x: got shape {list(x.shape)}; allowed is [..., {layer.in_features}], as the weight "
            f"has {layer.in_features} columns; pass what this layer is for"
        )
    if not 0.0 <= dropout <= 1.0:
        raise OpError(f"got dropout {dropout}; allowed is a probability from 0 to 1; mend it")
    *weight, bias, lora_a, lora_b, scaling, keep, keep_scale = layer
    if dropout and lora_a is None:
        raise OpError(
            f"got dropout {dropout} without an adapter, on whose input alone it acts; pass lora, "
            f"or leave dropout at 0"
        )
    if lora_a is not None and lora_b is not None and x.device.type == "cuda":
        lora_a, lora_b = _for_cuda(x, lora_a, lora_b)
    if dropout:
        # laid out as x is: the numbers are drawn in the order of the memory
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1.0 - dropout)
        keep_scale = 0.0 if dropout == 1.0 else 1.0 / (1.0 - dropout)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    y, _ = call("linear", x, *weight, bias, lora_a, lora_b, scaling, keep, keep_scale)
    out: Tensor = y
    return out


def _for_cuda(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the adapter in x's dtype if there is more than a few tokens for it.

    Tensor cores take x in 16 bits; cast here, it is cast once for both ways.
    """
    if x.shape.numel() <= frozen.SMALL_TOKENS * x.shape[-1]:
        return lora_a, lora_b
    return lora_a.to(x.dtype), lora_b.to(x.dtype)


# --- what the ops are to torch: flat arguments, shapes, derivative

Forward = Callable[[Tensor, FrozenLinear], tuple[Tensor, Tensor]]
Backward = Callable[[GradientsOf], tuple[Tensor, Tensor, Tensor]]


def _flat(forward: Forward) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a function of the arguments that the schema of `linear` lists."""
    return lambda x, *args: forward(x, FrozenLinear._make(args))


def _flat_backward(backward: Backward) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return a function of the arguments that the schema of `linear_backward` lists."""
    return lambda grad_y, x, s, *args: backward(
        GradientsOf(grad_y, x, s, FrozenLinear._make(args[:-3]), *args[-3:])
    )


def _fake_linear(x: Tensor, layer: FrozenLinear) -> tuple[Tensor, Tensor]:
    # a mixture of devices can come here by way of a single tensor on the meta device
    check_linear(x, layer)
    y = x.new_empty((*x.shape[:-1], layer.out_features))
    return y, x.new_empty((math.prod(x.shape[:-1]), layer.rank), dtype=s_dtype(x))


def _fake_linear_backward(given: GradientsOf) -> tuple[Tensor, Tensor, Tensor]:
    check_linear_backward(given)
    grad_y, layer = given.grad_y, given.layer
    grad_x, grad_a, grad_b = (grad_y.new_empty(0) for _ in range(3))
    if given.need_x:
        grad_x = grad_y.new_empty((*grad_y.shape[:-1], layer.in_features))
    if layer.lora_a is not None and given.need_a:
        grad_a = layer.lora_a.new_empty(layer.lora_a.shape)
    if layer.lora_b is not None and given.need_b:
        grad_b = layer.lora_b.new_empty(layer.lora_b.shape)
    return grad_x, grad_a, grad_b


torch.library.register_fake("tunesmith::linear", _flat(_fake_linear))
torch.library.register_fake("tunesmith::linear_backward", _flat_backward(_fake_linear_backward))

# where the arguments of `linear` have a gradient
_WEIGHT, _BIAS, _A, _B = (
    1 + FrozenLinear._fields.index(name) for name in ("weight", "bias", "lora_a", "lora_b")
)


class _Linear(torch.autograd.Function):
    """`linear` with its derivative; bias's is worked out here, the others by `linear_backward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        layer = FrozenLinear._make(args)
        need_x, need_a, need_b = (ctx.needs_input_grad[i] for i in (0, _A, _B))
        if ctx.needs_input_grad[_WEIGHT]:
            raise OpError(
                "got a weight that requires a gradient; this product has none for its weight, "
                "which is frozen; call weight.requires_grad_(False), or use "
                "torch.nn.functional.linear"
            )
        y, s = below_autograd("linear", x, *args)
        if y._is_view():  # of what nobody sees; autograd would not let it be written to in place
            y = torch.ops.aten._unsafe_view(y, y.shape)
        ctx.mark_non_differentiable(s)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x if need_a else None,
            s if need_b else None,
            *layer[:4],
            layer.lora_a,
            layer.lora_b,
            layer.keep if need_x or need_a else None,
        )
        ctx.numbers = (*layer[4:8], layer.scaling, layer.keep_scale)
        return y, s

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * (1 + len(FrozenLinear._fields))
        if grad_y is None:
            return tuple(grads)
        needs = [ctx.needs_input_grad[i] for i in (0, _A, _B)]
        if any(needs):
            x, s, *weight, lora_a, lora_b, keep = ctx.saved_tensors
            *shape, scaling, keep_scale = ctx.numbers
            layer = (*weight, *shape, None, lora_a, lora_b, scaling, keep, keep_scale)
            found = call("linear_backward", grad_y, x, s, *layer, *needs)
            for i, need, grad in zip((0, _A, _B), needs, found, strict=True):
                grads[i] = grad if need else None
        if ctx.needs_input_grad[_BIAS]:
            grads[_BIAS] = grad_y.sum(tuple(range(grad_y.dim() - 1)))  # [out_features]
        return tuple(grads)


class _LinearBackward(torch.autograd.Function):
    """`linear_backward`, which has no derivative and says so when it is asked for one."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = below_autograd("linear_backward", *args)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise OpError(
            "got a second backward pass through a frozen linear layer; it has first derivatives "
            "only; leave create_graph=False, or use a dense torch.nn.Linear"
        )


differentiate("linear", _Linear)
differentiate("linear_backward", _LinearBackward)


# --- in PyTorch


def reference_linear(x: Tensor, layer: FrozenLinear) -> tuple[Tensor, Tensor]:
    """Return y in x's dtype, and s = (keep_scale keep x) Aᵀ.

    s [tokens, rank] is fp32, and so is all arithmetic of the adapter; fp64 for an x in fp64. A
    kernel may round the adapter's factors to bf16 for an x in bf16, as PyTorch's autocast does.
    """
    check_linear(x, layer)
    return _by_library(x, layer, dequantize_by_torch, sum_dtype(x.dtype))


def reference_linear_backward(given: GradientsOf) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `linear` by x, A and B, each empty unless it is needed.

    grad_x has x's dtype, grad_a and grad_b that of the adapter.
    """
    check_linear_backward(given)
    return _by_library_backward(given, dequantize_by_torch, sum_dtype(given.grad_y.dtype))


Dequantize = Callable[[Packed, torch.dtype], Tensor]


def dense_weight(layer: FrozenLinear, dtype: torch.dtype, dequantize: Dequantize) -> Tensor:
    """Return the weight, 4-bit or plain, as a plain one [out_features, in_features] in `dtype`."""
    if layer.absmax is None:
        return layer.weight.to(dtype)
    # fp64 has no code of its own, and no need of one: fp32 holds every value exactly
    held = dtype if dtype in DTYPES else torch.float32
    return dequantize(layer.in_4_bits, held).to(dtype)


def _by_library(
    x: Tensor, layer: FrozenLinear, dequantize: Dequantize, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Do what `linear` does with a dense W; `dtype` is that of the adapter's products."""
    dense = dense_weight(layer, x.dtype, dequantize)
    bias, scaling = layer.bias, layer.scaling
    *leading, in_features = x.shape
    x = x.reshape(math.prod(leading), in_features)
    with _no_autocast(x.device):
        if layer.lora_a is None or layer.lora_b is None:
            y = F.linear(x, dense, bias)  # [tokens, out_features]
            s = x.new_empty((len(x), 0), dtype=s_dtype(x))
        else:
            s = _dropped(x, layer, dtype) @ layer.lora_a.to(dtype).t()  # [tokens, rank]
            b = layer.lora_b.to(dtype).t()
            if dtype == x.dtype:
                # the small product first: the large one adds itself to it while it writes
                if bias is None:
                    y = _product(s, b, scaling)
                else:
                    y = torch.addmm(bias, s, b, alpha=scaling)
                y.addmm_(x, dense.t())
            else:
                y = F.linear(x, dense, bias).add_(_product(s, b, scaling))
            s = s.to(s_dtype(x))
    return y.view(*leading, dense.shape[0]), s


def _by_library_backward(
    given: GradientsOf, dequantize: Dequantize, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `linear_backward` does likewise; W is dense only where grad_x is needed."""
    grad_y, x, s, layer, need_x, need_a, need_b = given
    dense = dense_weight(layer, grad_y.dtype, dequantize) if need_x else None
    lora_a, lora_b, scaling = layer.lora_a, layer.lora_b, layer.scaling
    *leading, out_features = grad_y.shape
    tokens = math.prod(leading)
    grad_y = grad_y.reshape(tokens, out_features)
    grad_x, grad_a, grad_b = (grad_y.new_empty(0) for _ in range(3))
    with _no_autocast(grad_y.device):
        if dense is not None and (lora_a is None or lora_b is None):
            grad_x = grad_y @ dense  # [tokens, in_features]
        if lora_a is not None and lora_b is not None and (dense is not None or need_a or need_b):
            wide = grad_y.to(dtype)
            if dense is not None or need_a:
                grad_s = _product(wide, lora_b.to(dtype), scaling)  # [tokens, rank]
                if dense is not None:
                    of_adapter = _dropped(grad_s @ lora_a.to(dtype), layer, dtype)
                    if dtype == grad_y.dtype:
                        grad_x = of_adapter.addmm_(grad_y, dense)
                    else:
                        grad_x = (grad_y @ dense).add_(of_adapter)
                if need_a and x is not None:
                    dropped = _dropped(x.reshape(tokens, x.shape[-1]), layer, dtype)
                    grad_a = (grad_s.t() @ dropped).to(lora_a.dtype)  # [rank, in_features]
            if need_b and s is not None:
                # [out_features, rank]
                grad_b = _product(wide.t(), s.to(dtype), scaling).to(lora_b.dtype)
    if dense is not None:
        grad_x = grad_x.view(*leading, dense.shape[1])
    return grad_x, grad_a, grad_b


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products are in the dtypes they are given in.

    Autocast has had its say before the op was called; left on, it would round what is fp32 here.
    """
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _dropped(x: Tensor, layer: FrozenLinear, dtype: torch.dtype) -> Tensor:
    """Return keep_scale keep x [tokens, in_features] in `dtype`."""
    x = x.to(dtype)
    return x if layer.keep is None else x * layer.keep.reshape(x.shape) * layer.keep_scale


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return scale left right, in one pass."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


torch.library.impl("tunesmith::linear", "default", _flat(reference_linear))
torch.library.impl(
    "tunesmith::linear_backward", "default", _flat_backward(reference_linear_backward)
)


# --- by the kernels

# up to this many rows of x, our own product beats dequantizing for the library's: it reads 4 bits a
# weight where that writes and reads 16 or 32
_OWN_TOKENS = 128
# in fp32 ours is as fast as the library's, so that what is saved counts for longer
_OWN_TOKENS_FP32 = 512
# and AMX multiplies so fast that it counts for longest
_OWN_TOKENS_AMX = 1024

_FP16_FLAGS = frozenset({"avx512_fp16", "amx_fp16", "asimdhp"})


def in_one_call(tokens: int, dtype: torch.dtype, weight: Tensor, quant_type: str) -> bool:
    """Return whether the CPU does x Wᵀ in one call of ours, or W is dense for the library's."""
    if quant_type == "" and weight.dtype == dtype and _multiplies(dtype):
        return False  # there is nothing to dequantize
    return weight.is_contiguous() and _own_product(tokens, dtype)


def _own_product(tokens: int, dtype: torch.dtype) -> bool:
    """Return whether our own product of that size beats dequantizing W for the library's."""
    if not _multiplies(dtype):
        return True
    if dtype == torch.float32:
        return tokens <= _OWN_TOKENS_FP32
    amx = dtype == torch.bfloat16 and native.kernels.isa() == "amx_bf16"
    return tokens <= (_OWN_TOKENS_AMX if amx else _OWN_TOKENS)


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Return whether the CPU multiplies that dtype in hardware, as the library then does."""
    if dtype == torch.bfloat16:
        return cpu_multiplies_bf16()
    return dtype == torch.float32 or bool(cpu_flags() & _FP16_FLAGS)


def native_linear(
    layer: FrozenLinear, tokens: int, dtype: torch.dtype, *, weight: bool = True
) -> native.kernels.Linear:
    """Return the layer as the kernels take it, for an x [tokens, in_features] of that dtype.

    The tensors are without gaps, and held by the caller until the call is over. Without `weight`,
    weight and bias are left out: the adapter is all there is.
    """
    code = CODES[dtype]
    lora_a = layer.lora_a
    # what is no weight is plain
    weight_type = (layer.quant_type or layer.weight.dtype) if weight else dtype
    # by position, in the order of the struct: to name them takes 2 µs of a call's 30
    return native.kernels.Linear(
        tokens,
        layer.in_features,
        layer.out_features,
        code,
        CODES[weight_type],
        layer.weight.data_ptr() if weight else 0,
        pointer(layer.absmax),
        pointer(layer.nested_absmax),
        pointer(layer.nested_offset),
        layer.blocksize if weight else 0,
        pointer(layer.bias) if weight else 0,
        layer.rank,
        code if lora_a is None else CODES[lora_a.dtype],
        pointer(lora_a),
        pointer(layer.lora_b),
        layer.scaling,
        pointer(layer.keep),
        layer.keep_scale,
    )


def _linear_cpu(x: Tensor, layer: FrozenLinear) -> tuple[Tensor, Tensor]:
    check_linear(x, layer)
    *leading, in_features = x.shape
    tokens, out_features = math.prod(leading), layer.out_features
    if x.dtype == torch.float64 or tokens * in_features * out_features == 0:
        return _by_library(x, layer, dequantize_by_kernel, sum_dtype(x.dtype))
    x = x.reshape(tokens, in_features).contiguous()
    layer = layer.compact()
    s = x.new_empty((tokens, layer.rank), dtype=torch.float32)
    own = in_one_call(tokens, x.dtype, layer.weight, layer.quant_type)
    if own:
        y = x.new_empty((*leading, out_features))
    else:
        dense = dense_weight(layer, x.dtype, dequantize_by_kernel)
        with _no_autocast(x.device):
            y = F.linear(x, dense, layer.bias).view(*leading, out_features)
    if own or layer.rank:
        prepared = native_linear(layer, tokens, x.dtype, weight=own)
        native.kernels.linear(
            layer=prepared,
            x=x.data_ptr(),
            s=s.data_ptr(),
            y=y.data_ptr(),
            accumulate=not own,
        )
    return y, s


def _linear_backward_cpu(given: GradientsOf) -> tuple[Tensor, Tensor, Tensor]:
    check_linear_backward(given)
    grad_y, x, s, layer, need_x, need_a, need_b = given
    *leading, out_features = grad_y.shape
    tokens, in_features, dtype = math.prod(leading), layer.in_features, grad_y.dtype
    if dtype == torch.float64 or tokens * in_features * out_features == 0:
        return _by_library_backward(given, dequantize_by_kernel, sum_dtype(dtype))
    grad_y = grad_y.reshape(tokens, out_features).contiguous()
    layer = layer.compact()
    grad_x = grad_a = grad_b = None
    if need_a and layer.lora_a is not None and x is not None:
        x = x.reshape(tokens, in_features).contiguous()
        grad_a = empty_like(layer.lora_a)
    if need_b and layer.lora_b is not None and s is not None:
        s = s.contiguous()
        grad_b = empty_like(layer.lora_b)
    own = need_x and in_one_call(tokens, dtype, layer.weight, layer.quant_type)
    if own:
        grad_x = grad_y.new_empty((*leading, in_features))
    elif need_x:
        dense = dense_weight(layer, dtype, dequantize_by_kernel)
        with _no_autocast(grad_y.device):
            grad_x = (grad_y @ dense).view(*leading, in_features)
    if own or (layer.lora_a is not None and (need_x or need_a or need_b)):
        native.kernels.linear_backward(
            layer=native_linear(layer, tokens, dtype, weight=own),
            x=pointer(x) if need_a else 0,
            s=pointer(s) if need_b else 0,
            grad_y=grad_y.data_ptr(),
            grad_x=pointer(grad_x),
            grad_a=pointer(grad_a),
            grad_b=pointer(grad_b),
            accumulate=not own,
        )
    return (
        grad_y.new_empty(0) if grad_x is None else grad_x,
        grad_y.new_empty(0) if grad_a is None else grad_a,
        grad_y.new_empty(0) if grad_b is None else grad_b,
    )


def _linear_cuda(x: Tensor, layer: FrozenLinear) -> tuple[Tensor, Tensor]:
    check_linear(x, layer)
    *leading, in_features = x.shape
    tokens, out_features = math.prod(leading), layer.out_features
    small = (
        layer.quant_type != ""
        and layer.keep is None
        and x.dtype != torch.float64
        and tokens <= frozen.SMALL_TOKENS
        and tokens * in_features * out_features > 0
    )
    if not small:
        # the adapter's products in x's dtype: a tensor core sums them in fp32
        return _by_library(x, layer, dequantize_by_kernel, x.dtype)
    x = x.reshape(tokens, in_features).contiguous()
    layer = layer.compact(weight_too=True)
    s = x.new_empty((tokens, layer.rank), dtype=torch.float32)
    y = x.new_empty((tokens, out_features))
    prepared = native_linear(layer, tokens, x.dtype)
    with stream_of(x) as stream:
        native.kernels.linear_small(
            layer=prepared, x=x.data_ptr(), s=s.data_ptr(), y=y.data_ptr(), stream=stream
        )
    return y.view(*leading, out_features), s


def _linear_backward_cuda(given: GradientsOf) -> tuple[Tensor, Tensor, Tensor]:
    check_linear_backward(given)
    return _by_library_backward(given, dequantize_by_kernel, given.grad_y.dtype)


if CODES:
    implement("linear", "cpu", _flat(_linear_cpu))
    implement("linear_backward", "cpu", _flat_backward(_linear_backward_cpu))
    if native.kernels.has_cuda():
        implement("linear", "cuda", _flat(_linear_cuda))
        implement("linear_backward", "cuda", _flat_backward(_linear_backward_cuda))
