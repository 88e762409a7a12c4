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

from tunesmith.errors import OpError, OptionError
from tunesmith.ops import attention, elementwise, reference, schema
from tunesmith.ops.dispatch import implement
from tunesmith.ops.machine import check_environment, cpu_flags, cpu_multiplies_bf16
from tunesmith.ops.reference import mean_absmax, no_autocast
from tunesmith.ops.schema import NESTED_BLOCKSIZE, count_blocks

__all__ = [
    "CODES",
    "MOST_HEAD_SIZE",
    "NativeStatus",
    "Parts",
    "compact",
    "dense_weight",
    "empty_like",
    "in_one_call",
    "kernels",
    "native_linear",
    "native_status",
    "pointer",
    "pooled_empty",
    "rms_norm",
]

Parts = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
_Adapter = tuple[Tensor | None, Tensor | None, float, Tensor | None, float]

# empty when the kernels are in use
_why_not = ""
check_environment()
if os.environ.get("TUNESMITH_NATIVE") == "0":
    _why_not = "switched off by TUNESMITH_NATIVE=0"
else:
    try:
        from tunesmith import _native as kernels
    except ImportError as error:
        _why_not = f"not built: {error}"
    else:
        _wanted = os.environ.get("TUNESMITH_ISA")
        if _wanted and _wanted not in kernels.isas():
            raise OptionError(
                [
                    f"TUNESMITH_ISA={_wanted}: this CPU has not got it; it has: "
                    f"{', '.join(kernels.isas())}"
                ]
            )


# the numbers by which the kernels know dtypes, 4-bit types and activations; without kernels none
CODES: dict[torch.dtype | str, int] = {}
if not _why_not:
    CODES = {
        torch.float32: kernels.FLOAT32,
        torch.float16: kernels.FLOAT16,
        torch.bfloat16: kernels.BFLOAT16,
        "nf4": kernels.NF4,
        "fp4": kernels.FP4,
        "silu": kernels.SILU,
        "gelu_tanh": kernels.GELU_TANH,
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
        isa=kernels.isa(),
        openmp=kernels.has_openmp(),
        cuda=kernels.has_cuda(),
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

# what the decoding kernels have room for
MOST_HEAD_SIZE = 512

_FP16_FLAGS = frozenset({"avx512_fp16", "amx_fp16", "asimdhp"})


def _own_product(tokens: int, dtype: torch.dtype) -> bool:
    """Return whether the CPU does x Wᵀ in one call of ours, or dequantizes W for the library."""
    if not _multiplies(dtype):
        return True
    if dtype == torch.float32:
        return tokens <= _OWN_TOKENS_FP32
    amx = dtype == torch.bfloat16 and kernels.isa() == "amx_bf16"
    return tokens <= (_OWN_TOKENS_AMX if amx else _OWN_TOKENS)


def in_one_call(tokens: int, dtype: torch.dtype, weight: Tensor, quant_type: str) -> bool:
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
        kernels.quantize_4bit(
            weight.data_ptr(),
            CODES[weight.dtype],
            numel,
            blocksize,
            CODES[quant_type],
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
        kernels.quantize_absmax(
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
        kernels.dequantize_4bit(
            packed.data_ptr(),
            absmax.data_ptr(),
            pointer(nested_absmax),
            pointer(nested_offset),
            math.prod(shape),
            blocksize,
            CODES[quant_type],
            CODES[dtype],
            out.data_ptr(),
            stream,
        )
    return out


dense_weight = functools.partial(reference.dense_weight, dequantize=_dequantize_4bit)


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
    adapter = (compact(lora_a), compact(lora_b), scaling, compact(keep), keep_scale)
    rank = 0 if lora_a is None else lora_a.shape[0]
    s = x.new_empty((tokens, rank), dtype=torch.float32)
    if in_one_call(tokens, x.dtype, weight, quant_type):
        parts = (weight, compact(absmax), compact(nested_absmax), nested_offset)
        bias = compact(bias)
        y = x.new_empty((*leading, out_features))
        layer = native_linear(shape, x.dtype, parts, blocksize, quant_type, bias, adapter)
        kernels.linear(layer, x.data_ptr(), s.data_ptr(), y.data_ptr(), False)
    else:
        dense = dense_weight(
            weight, absmax, nested_absmax, nested_offset, (out_features, in_features), blocksize,
            quant_type, x.dtype,
        )  # fmt: skip
        with no_autocast(x.device):
            y = F.linear(x, dense, bias).view(*leading, out_features)
        if rank:
            layer = native_linear(shape, x.dtype, None, 0, "", None, adapter)
            kernels.linear(layer, x.data_ptr(), s.data_ptr(), y.data_ptr(), True)
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
    adapter = (compact(lora_a), compact(lora_b), scaling, compact(keep), keep_scale)
    grad_x = grad_a = grad_b = None
    if need_a and lora_a is not None and x is not None:
        x = x.reshape(tokens, in_features).contiguous()
        grad_a = empty_like(lora_a)
    if need_b and lora_b is not None and s is not None:
        s = s.contiguous()
        grad_b = empty_like(lora_b)
    own = need_x and in_one_call(tokens, dtype, weight, quant_type)
    if own:
        parts = (weight, compact(absmax), compact(nested_absmax), nested_offset)
        grad_x = grad_y.new_empty((*leading, in_features))
        layer = native_linear(shape, dtype, parts, blocksize, quant_type, None, adapter)
    else:
        if need_x:
            dense = dense_weight(
                weight, absmax, nested_absmax, nested_offset, (out_features, in_features),
                blocksize, quant_type, dtype,
            )  # fmt: skip
            with no_autocast(grad_y.device):
                grad_x = (grad_y @ dense).view(*leading, in_features)
        layer = native_linear(shape, dtype, None, 0, "", None, adapter)
    if own or (lora_a is not None and (need_x or need_a or need_b)):
        kernels.linear_backward(
            layer,
            pointer(x) if need_a else 0,
            pointer(s) if need_b else 0,
            grad_y.data_ptr(),
            pointer(grad_x),
            pointer(grad_a),
            pointer(grad_b),
            not own,
        )
    return (
        grad_y.new_empty(0) if grad_x is None else grad_x,
        grad_y.new_empty(0) if grad_a is None else grad_a,
        grad_y.new_empty(0) if grad_b is None else grad_b,
    )


def _attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, runs: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    found = attention.check(q, k, v, runs)
    tiles = kernels.isa() == "amx_bf16" and q.dtype == torch.bfloat16 and q.shape[3] % 32 == 0
    if not tiles:  # torch's is as good elsewhere
        return attention.by_torch(q, k, v, runs, scale)
    q, k, v, runs = (tensor.contiguous() for tensor in (q, k, v, runs))
    shape = [*q.shape[:3], k.shape[2], q.shape[3]]
    whole = _covers(found, q)
    out = torch.empty_like(q) if whole else torch.zeros_like(q)
    lse = q.new_empty((shape[0], shape[2], shape[1]), dtype=torch.float32)
    if not whole:
        lse.fill_(-torch.inf)
    kernels.attention(
        shape, CODES[q.dtype], q.data_ptr(), k.data_ptr(), v.data_ptr(), scale, runs.data_ptr(),
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
    kernels.attention_backward(
        [*q.shape[:3], k.shape[2], q.shape[3]],
        CODES[q.dtype],
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


def _attention_decode_cpu(
    q: Tensor, keys: Tensor, values: Tensor, first: Tensor, length: int, scale: float
) -> Tensor:
    attention.check_decode(q, keys, values, first, length)
    if q.dtype == torch.float64 or q.shape[2] > MOST_HEAD_SIZE or bool((first < 0).any()):
        return attention.reference_decode(q, keys, values, first, length, scale)
    q, keys, values, first = (t.contiguous() for t in (q, keys, values, first))
    rows, heads, size = q.shape
    out = torch.empty_like(q)
    kernels.attention_decode(
        q.data_ptr(), keys.data_ptr(), values.data_ptr(), first.data_ptr(), CODES[q.dtype], rows,
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
        kernels.logps(
            logits.data_ptr(), labels.data_ptr(), CODES[logits.dtype], rows, classes, slopes,
            logps.data_ptr(), stream,
        )  # fmt: skip
    return logps


def rms_norm(x: Tensor, weight: Tensor, eps: float, from_one: bool) -> tuple[Tensor, Tensor]:
    """Do what the op of that name does, without a derivative."""
    elementwise.check_rms_norm(x, weight)
    if x.dtype == torch.float64 or not x.numel():
        return elementwise.reference_rms_norm(x, weight, eps, from_one)
    x, weight = x.contiguous(), weight.contiguous()
    columns = x.shape[-1]
    rows = x.numel() // columns
    y, scale = empty_like(x), x.new_empty(rows, dtype=torch.float32)
    with _stream_of(x) as stream:
        kernels.rms_norm(
            x.data_ptr(), weight.data_ptr(), CODES[x.dtype], rows, columns, eps, from_one,
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
    grad_x = empty_like(x)
    with _stream_of(x) as stream:
        kernels.rms_norm_backward(
            grad_y.data_ptr(), x.data_ptr(), weight.data_ptr(), scale.data_ptr(), CODES[x.dtype],
            x.numel() // columns, columns, from_one, grad_x.data_ptr(), stream,
        )  # fmt: skip
    return grad_x


def _gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    elementwise.check_gated(gate, up, activation)
    if gate.dtype == torch.float64:
        return elementwise.reference_gated(gate, up, activation)
    gate, up = gate.contiguous(), up.contiguous()
    y = empty_like(gate)
    with _stream_of(gate) as stream:
        kernels.gated(
            gate.data_ptr(), up.data_ptr(), CODES[gate.dtype], gate.numel(), CODES[activation],
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
    grad_gate, grad_up = empty_like(gate), empty_like(up)
    with _stream_of(gate) as stream:
        kernels.gated_backward(
            grad_y.data_ptr(), gate.data_ptr(), up.data_ptr(), CODES[gate.dtype], gate.numel(),
            CODES[activation], grad_gate.data_ptr(), grad_up.data_ptr(), stream,
        )  # fmt: skip
    return grad_gate, grad_up


def _rotary(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    elementwise.check_rotary(x, cos, sin)
    if x.dtype == torch.float64:
        return elementwise.reference_rotary(x, cos, sin, backward)
    rows, tokens, heads, size = x.shape
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    out = empty_like(x)
    with _stream_of(x) as stream:
        kernels.rotary(
            x.data_ptr(), cos.data_ptr(), sin.data_ptr(), CODES[x.dtype], rows * tokens,
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
        dense = dense_weight(
            weight, absmax, nested_absmax, nested_offset, (out_features, in_features), blocksize,
            quant_type, x.dtype,
        )  # fmt: skip
        # the adapter's products in x's dtype: a tensor core sums them in fp32
        with no_autocast(x.device):
            return reference.dense_linear(
                x, dense, bias, lora_a, lora_b, scaling, keep, keep_scale, x.dtype
            )
    x = x.reshape(tokens, in_features).contiguous()
    parts = (weight.contiguous(), compact(absmax), compact(nested_absmax), nested_offset)
    bias = compact(bias)
    adapter = (compact(lora_a), compact(lora_b), scaling, None, keep_scale)
    rank = 0 if lora_a is None else lora_a.shape[0]
    s = x.new_empty((tokens, rank), dtype=torch.float32)
    y = x.new_empty((tokens, out_features))
    layer = native_linear(
        (tokens, in_features, out_features), x.dtype, parts, blocksize, quant_type, bias, adapter
    )
    with _stream_of(x) as stream:
        kernels.linear_small(layer, x.data_ptr(), s.data_ptr(), y.data_ptr(), stream)
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
        dense = dense_weight(
            weight, absmax, nested_absmax, nested_offset, (grad_y.shape[-1], in_features),
            blocksize, quant_type, grad_y.dtype,
        )  # fmt: skip
    with no_autocast(grad_y.device):
        return reference.dense_linear_backward(
            grad_y, x, s, dense, lora_a, lora_b, scaling, keep, keep_scale, need_a, need_b,
            grad_y.dtype,
        )  # fmt: skip


def native_linear(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    parts: Parts | None,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None,
    adapter: _Adapter,
) -> kernels.Linear:
    """Return the layer as the kernels take it.

    The tensors are without gaps, and held by the caller until the call is over. Without `parts` the
    weight is left out of the product.
    """
    weight, absmax, nested_absmax, nested_offset = parts or (None, None, None, None)
    lora_a, lora_b, scaling, keep, keep_scale = adapter
    code = CODES[dtype]
    if quant_type:
        weight_code = CODES[quant_type]
    else:
        weight_code = code if weight is None else CODES[weight.dtype]
    return kernels.Linear(
        *shape,
        code,
        weight_code,
        pointer(weight),
        pointer(absmax),
        pointer(nested_absmax),
        pointer(nested_offset),
        blocksize,
        pointer(bias),
        0 if lora_a is None else lora_a.shape[0],
        code if lora_a is None else CODES[lora_a.dtype],
        pointer(lora_a),
        pointer(lora_b),
        scaling,
        pointer(keep),
        keep_scale,
    )


def pooled_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a new tensor; if it is large and on the CPU, in memory that was used before.

    Its pages are there then: to touch them for the first time takes longer than to write them.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if _why_not or device.type != "cpu" or nbytes < _POOLED_NBYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    return from_dlpack(kernels.empty(nbytes)).view(dtype).view(shape)


def empty_like(tensor: Tensor) -> Tensor:
    """Return a new tensor of the same shape, without gaps."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def compact(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor in row-major order without gaps."""
    return None if tensor is None else tensor.contiguous()


def pointer(tensor: Tensor | None) -> int:
    """Return where a tensor begins in memory, 0 for none."""
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
    "rms_norm": rms_norm,
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
    if kernels.has_cuda():
        _bind("cuda")
        implement("linear", "cuda", _linear_cuda)
        implement("linear_backward", "cuda", _linear_backward_cuda)
