"""Attention over segments: queries side by side that see one stretch of keys, with its derivative.

Its own op, for torch's backward pass on the CPU is slow, and computes what a mask then throws away.
`attention_decode` is the same of one query a row, over what a cache holds.
Layouts are [rows, tokens, heads, head size], as projections leave them. `check_segments` says what
segments are; the last axis of `segments` is (row, start, stop, first key, last key, causal).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.ops import native
from tunesmith.ops.dispatch import below_autograd, call, differentiate, implement
from tunesmith.ops.dtypes import DTYPES, sum_dtype, word
from tunesmith.ops.native import CODES, MAX_HEAD_SIZE

__all__ = ["attention", "attention_decode", "check_segments"]

_VECTOR = 16  # fp32 of AVX-512

torch.library.define(
    "tunesmith::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor segments, float scale) -> (Tensor out, Tensor lse)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "tunesmith::attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor segments, "
    "float scale) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "tunesmith::attention_decode",
    "(Tensor q, Tensor keys, Tensor values, Tensor first, SymInt length, float scale) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def attention(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float) -> Tensor:
    """Return softmax(scale q kᵀ) v, each query over the keys that its segment sees.

    `q` is [rows, tokens, heads, head size], `k` and `v` the same with key heads, of which heads is
    a multiple; bf16, fp16 or fp32. `segments` is int64 [segments, 6] on the CPU, see
    `check_segments`. Returns q's shape and dtype; a query of no segment gets zeros. Raises OpError
    for tensors or segments that do not fit together.
    """
    out: Tensor = call("attention", q, k, v, segments, scale)[0]
    return out


def attention_decode(
    q: Tensor, keys: Tensor, values: Tensor, first: Tensor, length: int, scale: float
) -> Tensor:
    """Return softmax(scale q kᵀ) v for one query a row, as decoding with a cache has it.

    `q` is [rows, heads, head size], `keys` and `values` [rows, key heads, capacity, head size], of
    which row r sees [first[r], length); bf16, fp16 or fp32. `first` is int64 [rows]; a row that
    sees no key gets zeros. Has no derivative. Raises OpError for what does not fit together.
    """
    out: Tensor = call("attention_decode", q, keys, values, first, length, scale)
    return out


def check_decode(q: Tensor, keys: Tensor, values: Tensor, first: Tensor, length: int) -> None:
    """Refuse arguments of `attention_decode` that do not fit together."""
    fits = (
        q.dim() == 3
        and keys.dim() == 4
        and keys.shape == values.shape
        and keys.shape[::3] == q.shape[::2]
        and q.shape[1] % max(1, keys.shape[1]) == 0
        and first.dtype == torch.int64
        and first.shape == q.shape[:1]
        and 0 <= length <= keys.shape[2]
        and q.dtype in (*DTYPES, torch.float64)
        and q.dtype == keys.dtype == values.dtype
        and q.device == keys.device == values.device == first.device
    )
    if not fits:
        raise OpError(
            f"attention_decode: got q {word(q.dtype)} {list(q.shape)}, keys {word(keys.dtype)} "
            f"{list(keys.shape)}, values {word(values.dtype)} {list(values.shape)}, first "
            f"{word(first.dtype)} {list(first.shape)} and length {length}; allowed is [rows, "
            "heads, head size], [rows, key heads, capacity, head size] twice in the same dtype, "
            "int64 [rows] and a length within the capacity, all on one device"
        )


def reference_decode(
    q: Tensor, keys: Tensor, values: Tensor, first: Tensor, length: int, scale: float
) -> Tensor:
    """Do the op in plain PyTorch."""
    check_decode(q, keys, values, first, length)
    rows, heads, size = q.shape
    sums = sum_dtype(q.dtype)
    grouped = q.to(sums).view(rows, keys.shape[1], -1, size)
    scores = grouped @ keys[:, :, :length].to(sums).mT * scale  # [rows, key heads, shared, keys]
    unseen = torch.arange(length, device=q.device) < first[:, None]
    scores = scores.masked_fill(unseen[:, None, None], -torch.inf)
    probabilities = scores.softmax(-1).masked_fill(unseen[:, None, None], 0.0)
    return (probabilities @ values[:, :, :length].to(sums)).view(rows, heads, size).to(q.dtype)


def check_segments(segments: Tensor, rows: int, tokens: int) -> list[tuple[int, ...]]:
    """Return the segments as tuples: row, start, stop, first key, last key, causal.

    Queries [start, stop) see the keys from the first on: up to themselves if causal, else all up to
    the last. The last query of a causal segment is its last key. No query is in two segments, and
    what two segments see of a row is the same or disjoint, so that they can be worked on at once.
    Raises OpError otherwise. All layers of a model ask about the same segments: the last answer is
    kept.
    """
    global _last_checked
    if segments.is_inference():  # such a tensor does not say whether it was written into
        return _checked_segments(segments, rows, tokens)
    asked = (segments._version, rows, tokens)
    kept = _last_checked
    if kept is None or kept[0]() is not segments or kept[1] != asked:
        kept = (weakref.ref(segments), asked, _checked_segments(segments, rows, tokens))
        _last_checked = kept
    return kept[2]


_last_checked: tuple[weakref.ref[Tensor], tuple[int, int, int], list[tuple[int, ...]]] | None = None


def _checked_segments(segments: Tensor, rows: int, tokens: int) -> list[tuple[int, ...]]:
    if (
        segments.dtype != torch.int64
        or segments.dim() != 2
        or segments.shape[1] != 6
        or segments.is_cuda
    ):
        raise OpError(
            f"segments: got {word(segments.dtype)} {list(segments.shape)} on {segments.device}; "
            "allowed is int64 [segments, 6] on the CPU: row, start, stop, first key, last key and "
            "causal"
        )
    found = [tuple(segment) for segment in segments.tolist()]
    ends: dict[int, int] = {}
    stretches: dict[int, set[tuple[int, int]]] = {}
    for row, start, stop, first, last, causal in sorted(found):
        fits = 0 <= row < rows and 0 <= start < stop <= tokens and 0 <= first <= last < tokens
        if not fits or (causal and (last != stop - 1 or first > start)):
            raise OpError(
                f"segments: got queries [{start}, {stop}) of row {row} on keys {first} to {last}, "
                f"causal={causal}, among {rows} rows of {tokens} tokens; a segment lies within its "
                "row, and a causal one ends with its last key"
            )
        if start < ends.get(row, 0):
            raise OpError(
                f"segments: got query {start} of row {row} twice; allowed is one segment each"
            )
        ends[row] = stop
        stretches.setdefault(row, set()).add((first, last))
    for row, seen in stretches.items():
        ordered = sorted(seen)
        for (_, last), (first, _) in itertools.pairwise(ordered):
            if first <= last:
                raise OpError(
                    f"segments: got key {first} of row {row} in two stretches; what two segments "
                    "see is the same or disjoint"
                )
    return found


def check(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, *like_q: Tensor
) -> list[tuple[int, ...]]:
    """Refuse tensors that do not fit together; return the segments."""
    if q.dim() != 4 or k.dim() != 4 or q.dtype not in (*DTYPES, torch.float64):
        raise OpError(
            f"attention: got a {word(q.dtype)} {list(q.shape)} and k {list(k.shape)}; allowed is "
            "bfloat16, float16 or float32 [rows, tokens, heads, head size]"
        )
    rows, tokens, heads, size = q.shape
    key_heads = k.shape[2]
    if k.shape != (rows, tokens, key_heads, size) or v.shape != k.shape or heads % key_heads:
        raise OpError(
            f"attention: got q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}; k and v "
            "have q's rows, tokens and head size, and a number of heads that divides q's"
        )
    for tensor in (k, v, *like_q):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise OpError(
                f"attention: got {word(tensor.dtype)} on {tensor.device} beside "
                f"{word(q.dtype)} on {q.device}; all tensors are of one dtype on one device"
            )
    return check_segments(segments, rows, tokens)


def _fake(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    rows, tokens, heads, _ = q.shape
    sums = sum_dtype(q.dtype)
    return torch.empty_like(q), q.new_empty((rows, heads, tokens), dtype=sums)


def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


torch.library.register_fake("tunesmith::attention", _fake)
torch.library.register_fake("tunesmith::attention_backward", _fake_backward)
torch.library.register_fake(
    "tunesmith::attention_decode",
    lambda q, keys, values, first, length, scale: q.new_empty(q.shape),
)


def reference(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Do the op in plain PyTorch; also returns the log-sum-exp, [rows, heads, tokens]."""
    out, lse = _fake(q, k, v, segments, scale)
    out.zero_()
    lse.fill_(-torch.inf)
    for segment in check(q, k, v, segments):
        _write_segment(q, k, v, segment, scale, out, lse)
    return out, lse


def reference_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, from the formula of FlashAttention (arXiv:2205.14135)."""
    grads = [torch.zeros_like(t, dtype=lse.dtype) for t in (q, k, v)]
    shared = q.shape[2] // k.shape[2]
    for segment in check(q, k, v, segments, grad_out, out):
        row, start, stop, first, last, _ = segment
        queries, keys, values, mask = _of_segment(q, k, v, segment, lse.dtype)
        grad = grad_out[row, start:stop].to(lse.dtype).transpose(0, 1)  # [heads, queries, size]
        delta = (grad * out[row, start:stop].to(lse.dtype).transpose(0, 1)).sum(-1, keepdim=True)
        scores = (queries @ keys.mT * scale).masked_fill(~mask, -torch.inf)
        p = (scores - lse[row, :, start:stop, None]).exp()
        grad_scores = p * (grad @ values.mT - delta) * scale
        for at, of_segment in ((1, grad_scores.mT @ queries), (2, p.mT @ grad)):
            # [key heads, keys, head size]
            by_key_head = of_segment.view(-1, shared, *of_segment.shape[1:]).sum(1)
            grads[at][row, first : last + 1] += by_key_head.transpose(0, 1)
        grads[0][row, start:stop] = (grad_scores @ keys).transpose(0, 1)
    return grads[0].to(q.dtype), grads[1].to(k.dtype), grads[2].to(v.dtype)


def _write_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment: tuple[int, ...],
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    queries, keys, values, mask = _of_segment(q, k, v, segment, lse.dtype)
    scores = (queries @ keys.mT * scale).masked_fill(~mask, -torch.inf)
    row, start, stop = segment[:3]
    lse[row, :, start:stop] = scores.logsumexp(-1)
    out[row, start:stop] = (scores.softmax(-1) @ values).transpose(0, 1).to(out.dtype)


def _of_segment(
    q: Tensor, k: Tensor, v: Tensor, segment: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a segment's q, k and v, [heads, tokens, head size], and which key each query sees."""
    row, start, stop, first, last, causal = segment
    queries = q[row, start:stop].to(dtype).transpose(0, 1)
    shared = q.shape[2] // k.shape[2]
    keys, values = (
        t[row, first : last + 1].to(dtype).transpose(0, 1).repeat_interleave(shared, 0)
        for t in (k, v)
    )
    at = torch.arange(start, stop, device=q.device)[:, None]
    seen = torch.arange(first, last + 1, device=q.device)[None]
    return queries, keys, values, seen <= (at if causal else last)


def by_torch(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Do the op on the CPU with torch's own kernel, segment by segment."""
    found = check(q, k, v, segments)
    kernel = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    if kernel is None or q.dtype == torch.float64:
        return reference(q, k, v, segments, scale)
    out, lse = _fake(q, k, v, segments, scale)
    if sum(segment[2] - segment[1] for segment in found) < q.shape[0] * q.shape[1]:
        out.zero_()
        lse.fill_(-torch.inf)
    shared = q.shape[2] // k.shape[2]
    for segment in found:
        row, start, stop, first, last, causal = segment
        # torch turns the NaN of less than a vector of keys into zeros (2.13), and its causal is
        # that of a square
        if last - first < _VECTOR or (causal and start > first):
            _write_segment(q, k, v, segment, scale, out, lse)
            continue
        keys, values = (
            t[row, first : last + 1].transpose(0, 1).repeat_interleave(shared, 0)[None]
            for t in (k, v)
        )
        queries = q[row : row + 1, start:stop].transpose(1, 2)
        part, sums = kernel(queries, keys, values, 0.0, bool(causal), scale=scale)
        out[row, start:stop] = part[0].transpose(0, 1)
        lse[row, :, start:stop] = sums[0]
    return out, lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = below_autograd("attention", *args)
        q, k, v, segments, ctx.scale = args
        ctx.save_for_backward(q, k, v, out, lse, segments)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            _no_second_derivative()
        *saved, segments = ctx.saved_tensors
        grads = call("attention_backward", grad_out, *saved, segments, ctx.scale)
        return (*grads, None, None)


def _no_second_derivative() -> NoReturn:
    raise OpError(
        "got a second backward pass through attention over segments; it has first derivatives "
        "only; leave create_graph=False, or attn_implementation='sdpa'"
    )


differentiate("attention", _Attention)
torch.library.impl("tunesmith::attention", "default", reference)
torch.library.impl("tunesmith::attention_backward", "default", reference_backward)
torch.library.impl("tunesmith::attention_decode", "default", reference_decode)


# --- by the kernels


def _attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    found = check(q, k, v, segments)
    tiles = (
        native.kernels.isa() == "amx_bf16" and q.dtype == torch.bfloat16 and q.shape[3] % 32 == 0
    )
    if not tiles:  # torch's is as good elsewhere
        return by_torch(q, k, v, segments, scale)
    q, k, v, segments = (tensor.contiguous() for tensor in (q, k, v, segments))
    shape = [*q.shape[:3], k.shape[2], q.shape[3]]
    whole = _covers(found, q)
    out = torch.empty_like(q) if whole else torch.zeros_like(q)
    lse = q.new_empty((shape[0], shape[2], shape[1]), dtype=torch.float32)
    if not whole:
        lse.fill_(-torch.inf)
    native.kernels.attention(
        shape=shape,
        dtype=CODES[q.dtype],
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        scale=scale,
        segments=segments.data_ptr(),
        segment_count=len(segments),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
    )
    return out, lse


def _covers(segments: Sequence[tuple[int, ...]], q: Tensor) -> bool:
    """Return whether each query is in a segment."""
    return sum(segment[2] - segment[1] for segment in segments) == q.shape[0] * q.shape[1]


def _attention_backward_cpu(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    found = check(q, k, v, segments, grad_out, out)
    if q.dtype == torch.float64:
        return reference_backward(grad_out, q, k, v, out, lse, segments, scale)
    q, k, v, out, grad_out, lse, segments = (
        tensor.contiguous() for tensor in (q, k, v, out, grad_out, lse, segments)
    )
    # a query or key of no segment is not written
    whole = _covers(found, q) and all(segment[5] for segment in found)
    new = torch.empty_like if whole else torch.zeros_like
    grad_q, grad_k, grad_v = (new(tensor) for tensor in (q, k, v))
    native.kernels.attention_backward(
        shape=[*q.shape[:3], k.shape[2], q.shape[3]],
        dtype=CODES[q.dtype],
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        grad_out=grad_out.data_ptr(),
        lse=lse.data_ptr(),
        scale=scale,
        segments=segments.data_ptr(),
        segment_count=len(segments),
        grad_q=grad_q.data_ptr(),
        grad_k=grad_k.data_ptr(),
        grad_v=grad_v.data_ptr(),
    )
    return grad_q, grad_k, grad_v


def _attention_decode_cpu(
    q: Tensor, keys: Tensor, values: Tensor, first: Tensor, length: int, scale: float
) -> Tensor:
    check_decode(q, keys, values, first, length)
    if q.dtype == torch.float64 or q.shape[2] > MAX_HEAD_SIZE or bool((first < 0).any()):
        return reference_decode(q, keys, values, first, length, scale)
    q, keys, values, first = (t.contiguous() for t in (q, keys, values, first))
    rows, heads, size = q.shape
    out = torch.empty_like(q)
    native.kernels.attention_decode(
        q=q.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        first=first.data_ptr(),
        dtype=CODES[q.dtype],
        rows=rows,
        heads=heads,
        key_heads=keys.shape[1],
        head_size=size,
        capacity=keys.shape[2],
        length=length,
        scale=scale,
        out=out.data_ptr(),
    )
    return out


if CODES:
    implement("attention", "cpu", _attention_cpu)
    implement("attention_backward", "cpu", _attention_backward_cpu)
    implement("attention_decode", "cpu", _attention_decode_cpu)
else:
    implement("attention", "cpu", by_torch)
