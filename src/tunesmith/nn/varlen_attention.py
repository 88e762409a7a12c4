"""Attention over the samples of a batch one by one, as long as each is, instead of under a mask.

Packed samples do not see each other, and padding is seen by no one; under a mask that is computed
all the same and thrown away. Here each sample is a causal attention of its own: the same sums, of
which there are as many as the samples' squared lengths add up to. On the CPU that is an op of ours,
on CUDA torch's own for samples of different lengths, once it was seen to give the same.

What a row may see is read from the mask that the model has made, and only where that is exactly
one stretch of the sequence for every query; any other mask, like that of a sliding window, is used
as it is. So this is for every model that takes its attention from transformers' AttentionInterface.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.ops import native_status
from tunesmith.ops.attention import attention, check_segments
from tunesmith.ops.dtypes import DTYPES

__all__ = ["NAME", "attend", "described", "segments_of", "use", "why_not"]

NAME = "tunesmith_varlen"
"""What this is called in transformers' registry of attention functions."""


def use(model: Any) -> str | None:
    """Make a model attend sample by sample where it has used torch's attention under a mask.

    Returns why it was left as it is, or None. Whether a batch gains is found out anew each time.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = inner.device.type
    if (why := why_not(inner, device)) is not None:
        return why
    if device == "cuda" and not _agrees(inner.device, _varlen_attn()):
        return "torch's attention for samples of different lengths gives something else here"
    if inner.config._attn_implementation == NAME:
        return None
    if sdpa_attention_forward is not AttentionInterface()["sdpa"]:
        return "another package has replaced transformers' sdpa attention"
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    inner.set_attn_implementation(NAME)
    if inner.config._attn_implementation != NAME:
        return "it does not take its attention from transformers' AttentionInterface"
    return None


def why_not(model: Any, device: str) -> str | None:
    """Return why a model, or its skeleton, would be left as it is on such a device, or None.

    What can only be found out on the device is left to `use`.
    """
    current = getattr(model.config, "_attn_implementation", None)
    if current not in ("sdpa", NAME):
        return f"its attention is {current!r}, not torch's"
    if device != "cuda":
        return native_status().why_slow_on(device)
    return None if _varlen_attn() else "torch has no attention for samples of different lengths"


def described(why: str | None) -> str:
    """Return as a sentence what `use` and `why_not` return."""
    if why is not None:
        return f"attention: as the model has it ({why})"
    return "attention: sample by sample"


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Do what transformers' `sdpa_attention_forward` does, in fewer sums.

    `query` is [rows, heads, queries, head size], `key` and `value` [rows, key heads, keys, head
    size] and `attention_mask` bool [rows, 1, queries, keys], true where a query sees a key. Returns
    [rows, queries, heads, head size] and None.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    segments = offsets = None
    if _suits(query, key, value) and not dropout and not _ASKED_FOR & _given(kwargs):
        if query.device.type == "cpu":
            asked = {**kwargs, "attention_mask": attention_mask}
            segments = segments_for(module, query.shape[0], query.shape[2], asked)
            if attention_mask is None and not torch.is_grad_enabled():
                segments = None  # without a backward pass torch's own is as good
        elif attention_mask is not None:  # without a mask torch's own is as good
            offsets = _remembered(_find_offsets, attention_mask, query.shape[0])
    if segments is None and offsets is None:
        whole: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, **kwargs
        )
        return whole
    scale = kwargs.get("scaling")
    scale = query.shape[3] ** -0.5 if scale is None else scale
    # [rows, tokens, heads, head size] is how they lie in memory
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if offsets is not None:
        return _attend_by_offsets(q, k, v, *offsets, scale, _varlen_attn()), None
    assert segments is not None
    return attention(q, k, v, segments, scale), None


_ASKED_FOR = {"position_bias", "cache", "softcap"}


def _given(kwargs: dict[str, Any]) -> set[str]:
    return {name for name, value in kwargs.items() if value is not None}


def _suits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        query.device.type in _DTYPES
        and query.dtype in _DTYPES[query.device.type]
        and query.dtype == key.dtype == value.dtype  # autocast turns some of them only
        and query.shape[2] == key.shape[2]
        and query.shape[3] == key.shape[3] == value.shape[3]
    )


_DTYPES = {"cpu": DTYPES, "cuda": (torch.bfloat16, torch.float16)}


def segments_for(
    module: torch.nn.Module, rows: int, tokens: int, kwargs: dict[str, Any]
) -> Tensor | None:
    """Return the segments that an attention module works on when it is called so, or None."""
    mask = kwargs.get("attention_mask")
    if mask is not None:
        return segments_of(mask, rows)
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return _whole_rows(rows, tokens) if causal else None


@functools.lru_cache(maxsize=8)
def _whole_rows(rows: int, tokens: int) -> Tensor:
    return torch.tensor([[row, 0, tokens, 0, tokens - 1, 1] for row in range(rows)])


def _attend_by_offsets(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    longest: int,
    scale: float,
    varlen_attn: Callable[..., Tensor],
) -> Tensor:
    """Return causal attention of samples that lie one after another through all rows.

    `q` is [rows, tokens, heads, head size], `k` and `v` the same with key heads; sample i is
    [offsets[i], offsets[i + 1]) of all rows' tokens, int32.
    """
    flat = (tensor.flatten(0, 1) for tensor in (q, k, v))
    out = varlen_attn(
        *flat, offsets, offsets, longest, longest,
        scale=scale, window_size=(-1, 0), enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return out.view(q.shape)


@functools.cache
def _varlen_attn() -> Any:
    """Return torch's attention for samples of different lengths, or None in a torch without."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@functools.cache
def _agrees(device: torch.device, varlen_attn: Callable[..., Tensor]) -> bool:
    """Whether that gives what attention under a mask gives, and gradients, on made-up samples."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 24, 4, 64), (1, 24, 2, 64), (1, 24, 2, 64), (1, 24, 4, 64))
    q, k, v, grad = (
        torch.randn(*shape, generator=generator).to(device, torch.bfloat16) for shape in shapes
    )
    offsets = torch.tensor([0, 10, 24], dtype=torch.int32, device=device)
    sample = torch.repeat_interleave(torch.arange(2), torch.tensor([10, 14])).to(device)
    mask = (sample[:, None] == sample).tril()

    def by_offsets(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attend_by_offsets(q, k, v, offsets, 14, 0.2, varlen_attn)

    def under_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, attn_mask=mask, scale=0.2, enable_gqa=True).transpose(1, 2)

    results = []
    for way in (by_offsets, under_a_mask):
        inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
        try:
            out = way(*inputs)
            results.append([out, *torch.autograd.grad(out, inputs, grad)])
        except (RuntimeError, TypeError):  # another torch, or not a device for its kernels
            return False
    return all(
        torch.allclose(ours.float(), theirs.float(), rtol=3e-2, atol=3e-2)
        for ours, theirs in zip(*results, strict=True)
    )


_Found = TypeVar("_Found")
_last: dict[Callable[..., Any], tuple[weakref.ref[Tensor], Any]] = {}


def _remembered(find: Callable[[Tensor, int], _Found], mask: Tensor, rows: int) -> _Found:
    """Return find(mask, rows), which all layers of a model ask for: the last answer is kept."""
    kept = _last.get(find)
    if kept is not None and kept[0]() is mask:
        found: _Found = kept[1]
        return found
    found = find(mask, rows)
    _last[find] = (weakref.ref(mask), found)
    return found


def segments_of(mask: Tensor, rows: int) -> Tensor | None:
    """Return the segments that a mask amounts to (see `ops.attention`), or None if to none.

    `mask` is bool [rows, 1, queries, keys] or [1, 1, queries, keys], true where a query sees a key,
    with as many keys as queries.
    """
    return _remembered(_find_segments, mask, rows)


def _find_offsets(mask: Tensor, rows: int) -> tuple[Tensor, int] | None:
    """Return where samples begin, as `_attend_by_offsets` takes it, and the longest one's length.

    None where a mask is anything but causal samples that leave no token out.
    """
    segments = _find_segments(mask, rows)
    if segments is None:
        return None
    tokens = mask.shape[-1]
    ends = [0]
    for row, start, stop, first, _, causal in segments.tolist():
        if not causal or first != start or row * tokens + start != ends[-1]:
            return None
        ends.append(row * tokens + stop)
    if ends[-1] != rows * tokens:
        return None
    longest = max(stop - start for start, stop in itertools.pairwise(ends))
    return torch.tensor(ends, dtype=torch.int32, device=mask.device), longest


def _find_segments(mask: Tensor, rows: int) -> Tensor | None:
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return None
    seen = mask[:, 0].expand(rows, -1, -1)  # [rows, queries, keys]
    if seen.shape[1] != seen.shape[2] or seen.shape[1] == 0:
        return None
    first = seen.to(torch.uint8).argmax(dim=-1)  # [rows, queries]
    last = first + seen.sum(dim=-1) - 1
    at = torch.arange(seen.shape[2], device=mask.device)
    if not torch.equal((at >= first[..., None]) & (at <= last[..., None]), seen):
        return None
    segments: list[tuple[int, ...]] = []
    for row, (firsts, lasts) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):
        start = 0
        while start < len(firsts):
            causal = lasts[start] == start
            stop = start + 1
            while (
                stop < len(firsts)
                and firsts[stop] == firsts[start]
                and lasts[stop] == (stop if causal else lasts[start])
            ):
                stop += 1
            if (causal and firsts[start] != start) or lasts[start] < firsts[start]:
                return None  # such as a window's
            segments.append((row, start, stop, firsts[start], lasts[stop - 1], int(causal)))
            start = stop
    found = torch.tensor(segments)
    try:
        check_segments(found, rows, seen.shape[1])
    except OpError:
        return None
    return found
