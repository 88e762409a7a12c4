"""Attention over the samples of a batch one by one, as long as each is, instead of under a mask.

Packed samples do not see each other, and padding is seen by no one; under a mask that is computed
all the same and thrown away. Here each sample is a causal attention of its own: the same sums, of
which there are as many as the samples' squared lengths add up to. For the CPU; a GPU has attention
functions of its own for this.

What a row may see is read from the mask that the model has made, and only where that is exactly
one stretch of the sequence for every query; any other mask, like that of a sliding window, is used
as it is. So this is for every model that takes its attention from transformers' AttentionInterface.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.ops import native_status
from tunesmith.ops.attention import attention, check_runs
from tunesmith.ops.schema import DTYPES

__all__ = ["NAME", "attend", "described", "runs_of", "use"]

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
    if not native_status().vectors:
        return "there are no vector kernels for its backward pass"
    current = inner.config._attn_implementation
    if current == NAME:
        return None
    if current != "sdpa":
        return f"its attention is {current!r}, not torch's"
    if sdpa_attention_forward is not AttentionInterface()["sdpa"]:
        return "another package has replaced transformers' sdpa attention"
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    inner.set_attn_implementation(NAME)
    if inner.config._attn_implementation != NAME:
        return "it does not take its attention from transformers' AttentionInterface"
    return None


def described(why: str | None) -> str:
    """Return as a sentence what `use` returned."""
    if why is not None:
        return f"attention: as the model has it ({why})"
    return "attention: sample by sample, with its own backward pass"


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

    runs = None
    if (
        query.device.type == "cpu"
        and query.dtype in DTYPES
        and query.shape[2] == key.shape[2]
        and query.shape[3] == key.shape[3] == value.shape[3]
        and not dropout  # would draw other numbers
        and all(kwargs.get(name) is None for name in ("position_bias", "cache", "softcap"))
    ):
        if attention_mask is not None:
            runs = runs_of(attention_mask, query.shape[0])
        elif torch.is_grad_enabled() and _is_causal(module, kwargs):
            runs = _whole_rows(query.shape[0], query.shape[2])
    if runs is None:
        whole: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, **kwargs
        )
        return whole
    scale = kwargs.get("scaling")
    # [rows, tokens, heads, head size] is how they lie in memory
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return attention(q, k, v, runs, query.shape[3] ** -0.5 if scale is None else scale), None


def _is_causal(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


@functools.lru_cache(maxsize=8)
def _whole_rows(rows: int, tokens: int) -> Tensor:
    return torch.tensor([[row, 0, tokens, 0, tokens - 1, 1] for row in range(rows)])


_last: tuple[weakref.ref[Tensor], Tensor | None] | None = None


def runs_of(mask: Tensor, rows: int) -> Tensor | None:
    """Return the runs that a mask amounts to (see `tunesmith.ops.attention`), or None if to none.

    `mask` is bool [rows, 1, queries, keys] or [1, 1, queries, keys], true where a query sees a key,
    with as many keys as queries. All layers of a model ask about one mask; the last answer is kept.
    """
    global _last  # a cache of one
    kept = _last
    if kept is not None and kept[0]() is mask:
        return kept[1]
    runs = _find_runs(mask, rows)
    _last = (weakref.ref(mask), runs)
    return runs


def _find_runs(mask: Tensor, rows: int) -> Tensor | None:
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return None
    seen = mask[:, 0].expand(rows, -1, -1)  # [rows, queries, keys]
    if seen.shape[1] != seen.shape[2] or seen.shape[1] == 0:
        return None
    first = seen.to(torch.uint8).argmax(dim=-1)  # [rows, queries]
    last = first + seen.sum(dim=-1) - 1
    at = torch.arange(seen.shape[2])
    if not torch.equal((at >= first[..., None]) & (at <= last[..., None]), seen):
        return None
    runs: list[tuple[int, ...]] = []
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
            runs.append((row, start, stop, firsts[start], lasts[stop - 1], int(causal)))
            start = stop
    found = torch.tensor(runs)
    try:
        check_runs(found, rows, seen.shape[1])
    except OpError:
        return None
    return found
