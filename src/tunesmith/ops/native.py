"""Binds the compiled kernels to the ops, per device; the only importer of `tunesmith._native`.

Where there are no kernels (not built, switched off by TUNESMITH_NATIVE=0, another device) the ops
stay with their PyTorch implementation, and one log line says so.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from tunesmith.errors import OpError
from tunesmith.ops import attention, elementwise, reference, schema
from tunesmith.ops.dispatch import implement
from tunesmith.ops.machine import cpu_flags, cpu_multiplies_bf16
from tunesmith.ops.reference import mean_absmax, no_autocast
from tunesmith.ops.schema import NESTED_BLOCKSIZE, count_blocks

__all__ = [
    "DecoderLayer",
    "FrozenLayer",
    "NativeStatus",
    "NormArguments",
    "PreparedLayers",
    "PreparedLinear",
    "PreparedNorm",
    "multiplies_all",
    "native_status",
    "pooled_empty",
]

_Parts = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
_Adapter = tuple[Tensor | None, Tensor | None, float, Tensor | None, float]

# empty when the kernels are in use
_why_not = ""
if os.environ.get("TUNESMITH_NATIVE") == "0":
    _why_not = "switched off by TUNESMITH_NATIVE=0"
else:
    try:
        from tunesmith import _native
    except ImportError as error:
        _why_not = f"not built: {error}"


# the numbers by which the kernels know dtypes, 4-bit types and activations
_CODES: dict[torch.dtype | str, int] = {}
if not _why_not:
    _CODES = {
        torch.float32: _native.FLOAT32,
        torch.float16: _native.FLOAT16,
        torch.bfloat16: _native.BFLOAT16,
        "nf4": _native.NF4,
        "fp4": _native.FP4,
        "silu": _native.SILU,
        "gelu_tanh": _native.GELU_TANH,
    }


@attrs.frozen
class NativeStatus:
    """Whether the compiled kernels are in use, and which."""

    loaded: bool
    """Whether the ops run compiled kernels."""
    reason: str
    """Why they do not; empty if they do."""
    isa: str
    """The instruction set of the CPU kernels, "avx2" or "scalar"; empty if not loaded."""
    openmp: bool
    """Whether torch's OpenMP runtime was found; without it the CPU kernels use one thread."""
    cuda: bool
    """Whether the CUDA kernels are compiled in."""

    def why_slow_on(self, device: str) -> str | None:
        """Return why the kernels gain nothing on a device of that type, or None if they do."""
        if device == "cpu":
            return "there are no vector kernels" if self.isa in ("", "scalar") else None
        if device == "cuda":
            return None if self.cuda else "there are no CUDA kernels"
        return f"there are no kernels for {device}"

    def __str__(self) -> str:
        """Return it as one line."""
        if not self.loaded:
            return f"native kernels: not in use ({self.reason}); the ops run in PyTorch"
        threads = "torch's OpenMP threads" if self.openmp else "one thread"
        cuda = "compiled in" if self.cuda else "not compiled in"
        return f"native kernels: in use; CPU: {self.isa}, {threads}; CUDA: {cuda}"


def native_status() -> NativeStatus:
    """Return whether the compiled kernels are in use, and which, or why not."""
    if _why_not:
        return NativeStatus(loaded=False, reason=_why_not, isa="", openmp=False, cuda=False)
    return NativeStatus(
        loaded=True,
        reason="",
        isa=_native.isa(),
        openmp=_native.has_openmp(),
        cuda=_native.has_cuda(),
    )


# up to this many rows of x, our own product beats dequantizing for the library's: it reads 4 bits a
# weight where that writes and reads 16 or 32
_OWN_TOKENS = 128
# in fp32 ours is as fast as the library's, so that what is saved counts for longer
_OWN_TOKENS_FP32 = 512
# and AMX multiplies so fast that it counts for longest
_OWN_TOKENS_AMX = 1024

# CPU outputs of this many bytes and more come from the pool: smaller ones malloc recycles itself
_POOLED_NBYTES = 1 << 20

_FP16_FLAGS = frozenset({"avx512_fp16", "amx_fp16", "asimdhp"})


def _own_product(tokens: int, dtype: torch.dtype) -> bool:
    """Return whether the CPU does x Wᵀ in one call of ours, or dequantizes W for the library."""
    if not _multiplies(dtype):
        return True
    if dtype == torch.float32:
        return tokens <= _OWN_TOKENS_FP32
    amx = dtype == torch.bfloat16 and _native.isa() == "amx_bf16"
    return tokens <= (_OWN_TOKENS_AMX if amx else _OWN_TOKENS)


def _in_one_call(tokens: int, dtype: torch.dtype, weight: Tensor, quant_type: str) -> bool:
    """Return `_own_product`'s answer for this weight, or False where ours would gain nothing."""
    if quant_type == "" and weight.dtype == dtype and _multiplies(dtype):
        return False  # there is nothing to dequantize
    return weight.is_contiguous() and _own_product(tokens, dtype)


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Return whether the CPU multiplies that dtype in hardware, as the library then does."""
    if dtype == torch.bfloat16:
        return cpu_multiplies_bf16()
    return dtype == torch.float32 or bool(cpu_flags() & _FP16_FLAGS)


def _quantize_4bit(
    weight: Tensor, blocksize: int, quant_type: str, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    schema.check_weight(weight, blocksize, quant_type, name)
    weight = weight.detach().contiguous()
    numel = weight.numel()
    packed = weight.new_empty((numel + 1) // 2, dtype=torch.uint8)
    absmax = weight.new_empty(count_blocks(numel, blocksize), dtype=torch.float32)
    with _stream_of(weight) as stream:
        _native.quantize_4bit(
            weight.data_ptr(),
            _CODES[weight.dtype],
            numel,
            blocksize,
            _CODES[quant_type],
            packed.data_ptr(),
            absmax.data_ptr(),
            stream,
        )
    schema.check_finite(absmax, numel, blocksize, quant_type, name)
    return packed, absmax


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    schema.check_absmax(absmax)
    absmax = absmax.contiguous()
    blocks = absmax.numel()
    offset = mean_absmax(absmax)
    codes = absmax.new_empty(blocks, dtype=torch.uint8)
    nested_absmax = absmax.new_empty(count_blocks(blocks, NESTED_BLOCKSIZE))
    with _stream_of(absmax) as stream:
        _native.quantize_absmax(
            absmax.data_ptr(),
            blocks,
            offset.data_ptr(),
            codes.data_ptr(),
            nested_absmax.data_ptr(),
            stream,
        )
    return codes, nested_absmax, offset


def _dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    quant_type: str,
    dtype: torch.dtype,
) -> Tensor:
    schema.check_packed(
        packed, absmax, nested_absmax, nested_offset, shape, blocksize, quant_type, dtype
    )
    packed, absmax = packed.contiguous(), absmax.contiguous()
    if nested_absmax is not None:
        nested_absmax = nested_absmax.contiguous()
    out = pooled_empty(tuple(shape), dtype, packed.device)
    with _stream_of(packed) as stream:
        _native.dequantize_4bit(
            packed.data_ptr(),
            absmax.data_ptr(),
            _pointer(nested_absmax),
            _pointer(nested_offset),
            math.prod(shape),
            blocksize,
            _CODES[quant_type],
            _CODES[dtype],
            out.data_ptr(),
            stream,
        )
    return out


_dense = functools.partial(reference.dense_weight, dequantize=_dequantize_4bit)


def _linear_cpu(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    keep_scale: float,
) -> tuple[Tensor, Tensor]:
    schema.check_linear(
        x, weight, absmax, nested_absmax, nested_offset, out_features, blocksize, quant_type,
        bias, lora_a, lora_b, keep,
    )  # fmt: skip
    *leading, in_features = x.shape
    tokens = math.prod(leading)
    if x.dtype == torch.float64 or tokens * in_features * out_features == 0:
        return reference.linear(
            x, weight, absmax, nested_absmax, nested_offset, out_features, blocksize, quant_type,
            bias, lora_a, lora_b, scaling, keep, keep_scale,
        )  # fmt: skip
    shape = (tokens, in_features, out_features)
    x = x.reshape(tokens, in_features).contiguous()
    adapter = (_compact(lora_a), _compact(lora_b), scaling, _compact(keep), keep_scale)
    rank = 0 if lora_a is None else lora_a.shape[0]
    s = x.new_empty((tokens, rank), dtype=torch.float32)
    if _in_one_call(tokens, x.dtype, weight, quant_type):
        parts = (weight, _compact(absmax), _compact(nested_absmax), nested_offset)
        bias = _compact(bias)
        y = x.new_empty((*leading, out_features))
        layer = _layer(shape, x.dtype, parts, blocksize, quant_type, bias, adapter)
        _native.linear(layer, x.data_ptr(), s.data_ptr(), y.data_ptr(), False)
    else:
        dense = _dense(
            weight, absmax, nested_absmax, nested_offset, (out_features, in_features), blocksize,
            quant_type, x.dtype,
        )  # fmt: skip
        with no_autocast(x.device):
            y = F.linear(x, dense, bias).view(*leading, out_features)
        if rank:
            layer = _layer(shape, x.dtype, None, 0, "", None, adapter)
            _native.linear(layer, x.data_ptr(), s.data_ptr(), y.data_ptr(), True)
    return y, s


def _linear_backward_cpu(
    grad_y: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    blocksize: int,
    quant_type: str,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    keep_scale: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    schema.check_linear_backward(
        grad_y, x, s, weight, absmax, nested_absmax, nested_offset, in_features, blocksize,
        quant_type, lora_a, lora_b, keep, need_a, need_b,
    )  # fmt: skip
    *leading, out_features = grad_y.shape
    tokens = math.prod(leading)
    if grad_y.dtype == torch.float64 or tokens * in_features * out_features == 0:
        return reference.linear_backward(
            grad_y, x, s, weight, absmax, nested_absmax, nested_offset, in_features, blocksize,
            quant_type, lora_a, lora_b, scaling, keep, keep_scale, need_x, need_a, need_b,
        )  # fmt: skip
    shape = (tokens, in_features, out_features)
    dtype = grad_y.dtype
    grad_y = grad_y.reshape(tokens, out_features).contiguous()
    adapter = (_compact(lora_a), _compact(lora_b), scaling, _compact(keep), keep_scale)
    grad_x = grad_a = grad_b = None
    if need_a and lora_a is not None and x is not None:
        x = x.reshape(tokens, in_features).contiguous()
        grad_a = torch.empty_like(lora_a, memory_format=torch.contiguous_format)
    if need_b and lora_b is not None and s is not None:
        s = s.contiguous()
        grad_b = torch.empty_like(lora_b, memory_format=torch.contiguous_format)
    own = need_x and _in_one_call(tokens, dtype, weight, quant_type)
    if own:
        parts = (weight, _compact(absmax), _compact(nested_absmax), nested_offset)
        grad_x = grad_y.new_empty((*leading, in_features))
        layer = _layer(shape, dtype, parts, blocksize, quant_type, None, adapter)
    else:
        if need_x:
            dense = _dense(
                weight, absmax, nested_absmax, nested_offset, (out_features, in_features),
                blocksize, quant_type, dtype,
            )  # fmt: skip
            with no_autocast(grad_y.device):
                grad_x = (grad_y @ dense).view(*leading, in_features)
        layer = _layer(shape, dtype, None, 0, "", None, adapter)
    if own or (lora_a is not None and (need_x or need_a or need_b)):
        _native.linear_backward(
            layer,
            _pointer(x) if need_a else 0,
            _pointer(s) if need_b else 0,
            grad_y.data_ptr(),
            _pointer(grad_x),
            _pointer(grad_a),
            _pointer(grad_b),
            not own,
        )
    return (
        grad_y.new_empty(0) if grad_x is None else grad_x,
        grad_y.new_empty(0) if grad_a is None else grad_a,
        grad_y.new_empty(0) if grad_b is None else grad_b,
    )


FrozenLayer = tuple[
    _Parts, Sequence[int], int, str, Tensor | None, tuple[Tensor, Tensor, float] | None
]
"""What `frozen_linear` takes after x: parts, shape, blocksize, quant_type, bias and adapter."""


def multiplies_all(x: Tensor, layers: Sequence[FrozenLayer]) -> bool:
    """Return whether each of some layers of as many tokens as x has is one call of ours.

    That is so on the CPU, for frozen biases, and where a library's product is no faster.
    """
    if _why_not or x.device.type != "cpu" or x.dtype not in schema.DTYPES or not x.numel():
        return False
    tokens = x.numel() // x.shape[-1]
    return all(
        out_features * in_features > 0
        and _in_one_call(tokens, x.dtype, parts[0], quant_type)
        and not (bias is not None and bias.requires_grad)
        for parts, (out_features, in_features), _, quant_type, bias, _ in layers
    )


NormArguments = tuple[Tensor, float, bool]
"""What the op rms_norm takes after x."""


@attrs.frozen(eq=False)
class DecoderLayer:
    """A decoder layer on the CPU with all that it works on but its input; held, and never written.

    h = norm(x), then attention, added to x; and h = norm(x), then a gated block, added to x. There
    is no derivative but `backward`. Raises OpError for parts that do not fit together.
    """

    norms: Sequence[NormArguments | None]
    """Those before attention and before the block, of queries and of keys; the last may be None."""
    linears: Sequence[FrozenLayer]
    """Of query, key, value, output, gate, up and down; `multiplies_all` takes them."""
    activation: str
    """A key of `elementwise.ACTIVATIONS`."""
    head_size: int
    scaling: float
    cos: Tensor
    """[rows or 1, tokens, head size]."""
    sin: Tensor
    runs: Tensor
    """See `ops.attention`."""

    @property
    def adapters(self) -> list[Tensor]:
        """A and B of each linear layer that has an adapter."""
        return [matrix for *_, lora in self.linears if lora is not None for matrix in lora[:2]]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output for x [rows, tokens, features], and what `backward` takes besides x."""
        out = _empty_like(x)
        return out, self._run(x, out)

    def kept_again(self, x: Tensor) -> Tensor:
        """Return what `forward` kept; its last product is left out."""
        return self._run(x, None)

    def _run(self, x: Tensor, out: Tensor | None) -> Tensor:
        x = x.contiguous()
        layer, held = self._native(x)
        kept = pooled_empty((layer.kept,), torch.uint8, x.device)
        _native.decoder_layer(layer, x.data_ptr(), kept.data_ptr(), _pointer(out))
        del held  # until here its pointers were in use
        return kept

    def backward(
        self, grad: Tensor, x: Tensor, kept: Tensor, need_x: bool, needs: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Return the gradient of x, or None if it needs none, and those of `adapters`."""
        x, grad, kept = x.contiguous(), grad.contiguous(), kept.contiguous()
        layer, held = self._native(x)
        elementwise.check_alike("decoder_layer", x, grad)
        if grad.shape != x.shape or kept.shape != (layer.kept,) or kept.dtype != torch.uint8:
            raise OpError(
                f"decoder_layer: got a gradient {list(grad.shape)} and {kept.numel()} bytes for x "
                f"{list(x.shape)}; pass what came of the forward pass of the same x"
            )
        grad_x = _empty_like(x) if need_x else None
        wanted = iter(needs)
        grads = [_empty_like(matrix) if next(wanted) else None for matrix in self.adapters]
        given = iter(grads)
        pointers = [
            0 if lora is None else _pointer(next(given)) for *_, lora in self.linears for _ in "ab"
        ]
        _native.decoder_layer_backward(
            layer, x.data_ptr(), kept.data_ptr(), grad.data_ptr(), _pointer(grad_x), pointers
        )
        del held
        return grad_x, grads

    def _native(self, x: Tensor) -> tuple[_native.DecoderLayer, object]:
        """Return the layer as the kernels take it, all of it checked, and what it points to."""
        elementwise.check_alike("decoder_layer", x, self.cos, self.sin)
        rows, tokens, hidden = x.shape
        width, key_width = (self.linears[i][1][0] for i in (0, 1))
        inner = self.linears[4][1][0]
        heads, key_heads = width // self.head_size, key_width // self.head_size
        outs = (width, key_width, key_width, hidden, inner, inner, hidden)
        if (
            width % self.head_size or key_width % self.head_size or not key_heads
            or heads % key_heads or tuple(each[1][0] for each in self.linears) != outs
        ):  # fmt: skip
            raise OpError(
                f"decoder_layer: got projections to {[each[1][0] for each in self.linears]} "
                f"features for x of {hidden} and heads of {self.head_size}; queries and keys are "
                "whole heads, values are as keys, up is as gate, and output and down are as x"
            )
        of = {features: x.new_empty((0, features)) for features in {hidden, width, inner}}
        ins = (hidden, hidden, hidden, width, hidden, hidden, inner)
        held: list[object] = []
        linears = []
        for features, (parts, shape, blocksize, quant_type, bias, lora) in zip(
            ins, self.linears, strict=True
        ):
            lora_a, lora_b, scaling = lora or (None, None, 1.0)
            if bias is not None:
                bias = bias.to(x.dtype).contiguous()
            schema.check_linear(
                of[features], *parts, shape[0], blocksize, quant_type, bias, lora_a, lora_b, None
            )
            compact = (parts[0], _compact(parts[1]), _compact(parts[2]), parts[3])
            adapter = (_compact(lora_a), _compact(lora_b), scaling, None, 1.0)
            size = (rows * tokens, features, shape[0])
            linears.append(_layer(size, x.dtype, compact, blocksize, quant_type, bias, adapter))
            held.append((compact, bias, adapter))
        norms = []
        for norm, features in zip(
            self.norms, (hidden, hidden, self.head_size, self.head_size), strict=True
        ):
            if norm is None:
                norms.append(_native.Norm(0, 0.0, False))
                continue
            weight, eps, from_one = norm
            elementwise.check_rms_norm(x.new_empty((0, features)), weight)
            weight = weight.contiguous()
            held.append(weight)
            norms.append(_native.Norm(weight.data_ptr(), eps, from_one))
        cos, sin, runs = self.cos.contiguous(), self.sin.contiguous(), self.runs.contiguous()
        held.append((cos, sin, runs))
        elementwise.check_rotary(x.new_empty((rows, tokens, 0, self.head_size)), cos, sin)
        attention.check_runs(runs, rows, tokens)
        return (
            _native.DecoderLayer(
                _CODES[x.dtype], rows, tokens, [norms[0], norms[2], norms[3], norms[1]], linears,
                self.head_size, self.scaling, _CODES[self.activation], cos.data_ptr(),
                sin.data_ptr(), len(cos) * tokens, runs.data_ptr(), len(runs),
            ),
            held,
        )  # fmt: skip


def _attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, runs: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    found = attention.check(q, k, v, runs)
    tiles = _native.isa() == "amx_bf16" and q.dtype == torch.bfloat16 and q.shape[3] % 32 == 0
    if not tiles:  # torch's is as good elsewhere
        return attention.by_torch(q, k, v, runs, scale)
    q, k, v, runs = (tensor.contiguous() for tensor in (q, k, v, runs))
    shape = [*q.shape[:3], k.shape[2], q.shape[3]]
    whole = _covers(found, q)
    out = torch.empty_like(q) if whole else torch.zeros_like(q)
    lse = q.new_empty((shape[0], shape[2], shape[1]), dtype=torch.float32)
    if not whole:
        lse.fill_(-torch.inf)
    _native.attention(
        shape, _CODES[q.dtype], q.data_ptr(), k.data_ptr(), v.data_ptr(), scale, runs.data_ptr(),
        len(runs), out.data_ptr(), lse.data_ptr(),
    )  # fmt: skip
    return out, lse


def _covers(runs: Sequence[tuple[int, ...]], q: Tensor) -> bool:
    """Return whether each query is in a run."""
    return sum(run[2] - run[1] for run in runs) == q.shape[0] * q.shape[1]


def _attention_backward_cpu(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    found = attention.check(q, k, v, runs, grad_out, out)
    if q.dtype == torch.float64:
        return attention.reference_backward(grad_out, q, k, v, out, lse, runs, scale)
    q, k, v, out, grad_out, lse, runs = (
        tensor.contiguous() for tensor in (q, k, v, out, grad_out, lse, runs)
    )
    # a query or key of no run is not written
    whole = _covers(found, q) and all(run[5] for run in found)
    new = torch.empty_like if whole else torch.zeros_like
    grad_q, grad_k, grad_v = (new(tensor) for tensor in (q, k, v))
    _native.attention_backward(
        [*q.shape[:3], k.shape[2], q.shape[3]],
        _CODES[q.dtype],
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        out.data_ptr(),
        grad_out.data_ptr(),
        lse.data_ptr(),
        scale,
        runs.data_ptr(),
        len(runs),
        grad_q.data_ptr(),
        grad_k.data_ptr(),
        grad_v.data_ptr(),
    )
    return grad_q, grad_k, grad_v


class PreparedLinear:
    """A frozen linear layer on the CPU for calls of one size, everything checked beforehand.

    For decoding, where checking takes longer than multiplying. Arguments are those of `linear`, and
    are held; what is written into them shows in the next call. Has no derivative.
    """

    def __init__(
        self,
        tokens: int,
        dtype: torch.dtype,
        parts: _Parts,
        shape: Sequence[int],
        blocksize: int,
        quant_type: str,
        bias: Tensor | None = None,
        lora: tuple[Tensor, Tensor, float] | None = None,
    ) -> None:
        out_features, in_features = shape
        lora_a, lora_b, scaling = lora or (None, None, 1.0)
        schema.check_linear(
            torch.empty((tokens, in_features), dtype=dtype), *parts, out_features, blocksize,
            quant_type, bias, lora_a, lora_b, None,
        )  # fmt: skip
        bias, lora_a, lora_b = (_compact(t) for t in (bias, lora_a, lora_b))
        self.out_features = out_features
        self._s = torch.empty((tokens, 0 if lora_a is None else lora_a.shape[0]))
        size = (tokens, in_features, out_features)
        adapter = (lora_a, lora_b, scaling, None, 1.0)
        # as `linear` decides it: a plain weight is the library's to multiply with
        own = _in_one_call(tokens, dtype, parts[0], quant_type)
        self._dense, self._layer = None, None
        if own:
            parts = (parts[0], _compact(parts[1]), _compact(parts[2]), parts[3])
            self._layer = _layer(size, dtype, parts, blocksize, quant_type, bias, adapter)
        else:
            self._dense = functools.partial(_dense, *parts, shape, blocksize, quant_type, dtype)
            if lora_a is not None:
                self._layer = _layer(size, dtype, None, 0, "", None, adapter)
        self._held = (parts, bias, lora_a, lora_b)
        self._bias = bias

    @property
    def in_one_call(self) -> _native.Linear | None:
        """The layer as the kernels take it, or None where a library has a part in it."""
        return self._layer if self._dense is None else None

    def __call__(self, x: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
        """Write x Wᵀ + b [tokens, out_features] to `out`, or add it; both without gaps."""
        if self._dense is not None:
            dense = self._dense()
            # few tokens are columns to the library: it reads the weight once, at twice the pace
            y = torch.mv(dense, x[0])[None] if len(x) == 1 else (dense @ x.mT).mT
            if self._bias is not None:
                y += self._bias
            if accumulate:
                out += y
            else:
                out.copy_(y)
            accumulate = True
        if self._layer is not None:
            _native.linear(
                self._layer, x.data_ptr(), self._s.data_ptr(), out.data_ptr(), accumulate
            )
        return out


_MOST_HEAD_SIZE = 512


@attrs.frozen(eq=False)
class PreparedNorm:
    """An RMSNorm on the CPU with a frozen weight; arguments are those of `elementwise.rms_norm`."""

    weight: Tensor
    eps: float
    from_one: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of x [..., features]; no gradient flows."""
        return _rms_norm(x, self.weight, self.eps, self.from_one)[0]


class PreparedLayers:
    """The layers of a model that is decoded, for one native call a token.

    Tensors are held, and written where a layer's cache is. No gradient flows.
    """

    def __init__(self) -> None:
        self._layers: list[_native.DecodeLayer] = []
        self._held: list[object] = []

    def add(
        self,
        norms: Sequence[PreparedNorm | None],
        linears: Sequence[PreparedLinear],
        keys: Tensor,
        values: Tensor,
        scale: float,
        activation: str,
    ) -> bool:
        """Add a layer: x += attention(norm(x)), then x += gated block(norm(x)).

        `norms` are that before attention, those of each head of the queries and keys, None for
        none, and that before the block; `linears` those of query, key, value, output, gate, up and
        down; `keys` and `values` the cache, [rows, key heads, capacity, head size]. Returns False,
        and adds nothing, where a part of it is not for one native call.
        """
        layers = [linear.in_one_call for linear in linears]
        rows, _, capacity, size = keys.shape
        if None in layers or size > _MOST_HEAD_SIZE or size % 2:
            return False
        self._layers.append(
            _native.DecodeLayer(
                _CODES[keys.dtype],
                rows,
                [
                    _native.Norm(0, 0.0, False)
                    if norm is None
                    else _native.Norm(norm.weight.data_ptr(), norm.eps, norm.from_one)
                    for norm in norms
                ],
                [layer for layer in layers if layer is not None],
                size,
                scale,
                _CODES[activation],
                keys.data_ptr(),
                values.data_ptr(),
                capacity,
            )
        )
        self._held.append((norms, linears, keys, values))
        return True

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, at: int) -> None:
        """Add to x [rows, hidden] what all layers add; the tokens are the `at`-th of their rows.

        `cos` and `sin` are [rows, head size], `first` int64 [rows], the first token of each row
        that is none of padding; all without gaps, and `at` below the caches' capacity.
        """
        _native.decode_layers(
            self._layers, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), first.data_ptr(), at
        )


def _attention_decode_cpu(
    q: Tensor, keys: Tensor, values: Tensor, first: Tensor, length: int, scale: float
) -> Tensor:
    attention.check_decode(q, keys, values, first, length)
    if q.dtype == torch.float64 or q.shape[2] > _MOST_HEAD_SIZE or bool((first < 0).any()):
        return attention.reference_decode(q, keys, values, first, length, scale)
    q, keys, values, first = (t.contiguous() for t in (q, keys, values, first))
    rows, heads, size = q.shape
    out = torch.empty_like(q)
    _native.attention_decode(
        q.data_ptr(), keys.data_ptr(), values.data_ptr(), first.data_ptr(), _CODES[q.dtype], rows,
        heads, keys.shape[1], size, keys.shape[2], length, scale, out.data_ptr(),
    )  # fmt: skip
    return out


def _logps(logits: Tensor, labels: Tensor, slopes: bool) -> Tensor:
    elementwise.check_logps(logits, labels)
    rows, classes = logits.shape
    if logits.dtype == torch.float64 or not logits.numel():
        return elementwise.reference_logps_(logits, labels, slopes)
    if logits.device.type == "cpu":  # elsewhere to look at them is to wait for them
        least, most = labels.aminmax()
        if least < 0 or most >= classes:
            raise OpError(
                f"logps_: got labels from {int(least)} to {int(most)} for {classes} classes; "
                f"allowed is 0 to {classes - 1}; leave tokens without a label out"
            )
    labels = labels.contiguous()
    logps = logits.new_empty(rows, dtype=torch.float32)
    with _stream_of(logits) as stream:
        _native.logps(
            logits.data_ptr(), labels.data_ptr(), _CODES[logits.dtype], rows, classes, slopes,
            logps.data_ptr(), stream,
        )  # fmt: skip
    return logps


def _rms_norm(x: Tensor, weight: Tensor, eps: float, from_one: bool) -> tuple[Tensor, Tensor]:
    elementwise.check_rms_norm(x, weight)
    if x.dtype == torch.float64 or not x.numel():
        return elementwise.reference_rms_norm(x, weight, eps, from_one)
    x, weight = x.contiguous(), weight.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    y, scale = _empty_like(x), x.new_empty(rows, dtype=torch.float32)
    with _stream_of(x) as stream:
        _native.rms_norm(
            x.data_ptr(), weight.data_ptr(), _CODES[x.dtype], rows, columns, eps, from_one,
            y.data_ptr(), scale.data_ptr(), stream,
        )  # fmt: skip
    return y, scale


def _rms_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, from_one: bool
) -> Tensor:
    elementwise.check_rms_norm(x, weight, grad_y)
    if x.dtype == torch.float64 or not x.numel():
        return elementwise.reference_rms_norm_backward(grad_y, x, weight, scale, from_one)
    grad_y, x, weight = grad_y.contiguous(), x.contiguous(), weight.contiguous()
    columns = x.shape[-1]
    grad_x = _empty_like(x)
    with _stream_of(x) as stream:
        _native.rms_norm_backward(
            grad_y.data_ptr(), x.data_ptr(), weight.data_ptr(), scale.data_ptr(), _CODES[x.dtype],
            x.numel() // columns, columns, from_one, grad_x.data_ptr(), stream,
        )  # fmt: skip
    return grad_x


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    elementwise.check_gated(gate, up, activation)
    if gate.dtype == torch.float64:
        return elementwise.reference_gated(gate, up, activation)
    gate, up = gate.contiguous(), up.contiguous()
    y = _empty_like(gate)
    with _stream_of(gate) as stream:
        _native.gated(
            gate.data_ptr(), up.data_ptr(), _CODES[gate.dtype], gate.numel(), _CODES[activation],
            y.data_ptr(), stream,
        )  # fmt: skip
    return y


def _gated_backward(
    grad_y: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    elementwise.check_gated(gate, up, activation, grad_y)
    if gate.dtype == torch.float64:
        return elementwise.reference_gated_backward(grad_y, gate, up, activation)
    grad_y, gate, up = grad_y.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = _empty_like(gate), _empty_like(up)
    with _stream_of(gate) as stream:
        _native.gated_backward(
            grad_y.data_ptr(), gate.data_ptr(), up.data_ptr(), _CODES[gate.dtype], gate.numel(),
            _CODES[activation], grad_gate.data_ptr(), grad_up.data_ptr(), stream,
        )  # fmt: skip
    return grad_gate, grad_up


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    elementwise.check_rotary(x, cos, sin)
    if x.dtype == torch.float64:
        return elementwise.reference_rotary(x, cos, sin, backward)
    rows, tokens, heads, size = x.shape
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = _empty_like(x)
    with _stream_of(x) as stream:
        _native.rotary(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), _CODES[x.dtype], rows * tokens,
            len(cos) * tokens, heads, size, backward, out.data_ptr(), stream,
        )  # fmt: skip
    return out


def _linear_cuda(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    keep_scale: float,
) -> tuple[Tensor, Tensor]:
    schema.check_linear(
        x, weight, absmax, nested_absmax, nested_offset, out_features, blocksize, quant_type,
        bias, lora_a, lora_b, keep,
    )  # fmt: skip
    *leading, in_features = x.shape
    tokens = math.prod(leading)
    small = (
        quant_type != ""
        and keep is None
        and x.dtype != torch.float64
        and tokens <= schema.SMALL_TOKENS
        and tokens * in_features * out_features > 0
    )
    if not small:
        dense = _dense(
            weight, absmax, nested_absmax, nested_offset, (out_features, in_features), blocksize,
            quant_type, x.dtype,
        )  # fmt: skip
        # the adapter's products in x's dtype: a tensor core sums them in fp32
        with no_autocast(x.device):
            return reference.dense_linear(
                x, dense, bias, lora_a, lora_b, scaling, keep, keep_scale, x.dtype
            )
    x = x.reshape(tokens, in_features).contiguous()
    parts = (weight.contiguous(), _compact(absmax), _compact(nested_absmax), nested_offset)
    bias = _compact(bias)
    adapter = (_compact(lora_a), _compact(lora_b), scaling, None, keep_scale)
    rank = 0 if lora_a is None else lora_a.shape[0]
    s = x.new_empty((tokens, rank), dtype=torch.float32)
    y = x.new_empty((tokens, out_features))
    layer = _layer(
        (tokens, in_features, out_features), x.dtype, parts, blocksize, quant_type, bias, adapter
    )
    with _stream_of(x) as stream:
        _native.linear_small(layer, x.data_ptr(), s.data_ptr(), y.data_ptr(), stream)
    return y.view(*leading, out_features), s


def _linear_backward_cuda(
    grad_y: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    blocksize: int,
    quant_type: str,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    keep: Tensor | None,
    keep_scale: float,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    schema.check_linear_backward(
        grad_y, x, s, weight, absmax, nested_absmax, nested_offset, in_features, blocksize,
        quant_type, lora_a, lora_b, keep, need_a, need_b,
    )  # fmt: skip
    dense = None
    if need_x:
        dense = _dense(
            weight, absmax, nested_absmax, nested_offset, (grad_y.shape[-1], in_features),
            blocksize, quant_type, grad_y.dtype,
        )  # fmt: skip
    with no_autocast(grad_y.device):
        return reference.dense_linear_backward(
            grad_y, x, s, dense, lora_a, lora_b, scaling, keep, keep_scale, need_a, need_b,
            grad_y.dtype,
        )  # fmt: skip


def _layer(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    parts: _Parts | None,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    adapter: _Adapter,
) -> _native.Linear:
    """Return the layer as the kernels take it.

    The tensors are without gaps, and held by the caller until the call is over. Without `parts` the
    weight is left out of the product.
    """
    weight, absmax, nested_absmax, nested_offset = parts or (None, None, None, None)
    lora_a, lora_b, scaling, keep, keep_scale = adapter
    code = _CODES[dtype]
    if quant_type:
        weight_code = _CODES[quant_type]
    else:
        weight_code = code if weight is None else _CODES[weight.dtype]
    return _native.Linear(
        *shape,
        code,
        weight_code,
        _pointer(weight),
        _pointer(absmax),
        _pointer(nested_absmax),
        _pointer(nested_offset),
        blocksize,
        _pointer(bias),
        0 if lora_a is None else lora_a.shape[0],
        code if lora_a is None else _CODES[lora_a.dtype],
        _pointer(lora_a),
        _pointer(lora_b),
        scaling,
        _pointer(keep),
        keep_scale,
    )


def pooled_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a new tensor; if it is large and on the CPU, in memory that was used before.

    Its pages are there then: to touch them for the first time takes longer than to write them.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if _why_not or device.type != "cpu" or nbytes < _POOLED_NBYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    return from_dlpack(_native.empty(nbytes)).view(dtype).view(shape)


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _compact(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor in row-major order without gaps."""
    return None if tensor is None else tensor.contiguous()


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


_ON_CPU = contextlib.nullcontext(None)


def _stream_of(tensor: Tensor) -> AbstractContextManager[int | None]:
    """Return a context with the stream that work on this tensor belongs to; None on the CPU."""
    device = tensor.device
    if device.type == "cpu":
        return _ON_CPU
    stream = torch.cuda.current_stream(device).cuda_stream
    if device.index == torch.cuda.current_device():
        return contextlib.nullcontext(stream)
    return _on_device(device, stream)


@contextlib.contextmanager
def _on_device(device: torch.device, stream: int) -> Iterator[int]:
    with torch.cuda.device(device):
        yield stream


# one implementation for the CPU and CUDA
_ON_ANY: dict[str, Callable[..., Any]] = {
    "quantize_4bit": _quantize_4bit,
    "quantize_absmax": _quantize_absmax,
    "dequantize_4bit": _dequantize_4bit,
    "gated": _gated,
    "gated_backward": _gated_backward,
    "logps_": _logps,
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "rotary": _rotary,
}


def _bind(device: str) -> None:
    for op, implementation in _ON_ANY.items():
        implement(op, device, implementation)


if _why_not:
    logging.getLogger("tunesmith").warning("%s", native_status())
    implement("attention", "cpu", attention.by_torch)
else:
    _bind("cpu")
    implement("linear", "cpu", _linear_cpu)
    implement("linear_backward", "cpu", _linear_backward_cpu)
    implement("attention", "cpu", _attention_cpu)
    implement("attention_backward", "cpu", _attention_backward_cpu)
    implement("attention_decode", "cpu", _attention_decode_cpu)
    if _native.has_cuda():
        _bind("cuda")
        implement("linear", "cuda", _linear_cuda)
        implement("linear_backward", "cuda", _linear_backward_cuda)
