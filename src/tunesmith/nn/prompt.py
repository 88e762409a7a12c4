"""What both decoders do with a prompt: let the model read it, and compare logits with its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["disagreement", "read_prompt"]

# of what two ways to round may differ by, with room for deep models; another model is far beyond
_LIMITS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}


def read_prompt(model: Any, input_ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """Let a model read input_ids [rows, tokens] into a cache; return the last logits of each row.

    `mask` [rows, tokens] is 1 for tokens and 0 for padding, which comes first.
    """
    logits: Tensor = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    return logits


def disagreement(
    ours: Tensor, theirs: Tensor, dtype: torch.dtype, what: str = "the model's own logits"
) -> str | None:
    """Return by how much two tensors [..., features] differ, if by more than rounding in dtype."""
    ours, theirs = ours.double(), theirs.double()
    difference = float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())
    limit = _LIMITS.get(dtype, 0.0)
    if difference <= limit:
        return None
    return f"{what} differ by {difference:.2g}, and {limit} is allowed"
