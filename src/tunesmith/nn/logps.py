"""Log-probabilities of the trained tokens, as losses and metrics need them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.nn.head_logps import Headless, shifted

__all__ = ["by_row", "completion_logps", "logps_of_logits"]


def completion_logps(
    model: Any, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return each row's summed log-probability of its labelled tokens, and how many there are.

    `input_ids`, `attention_mask` and `labels` are int64 [rows, length]; labels of -100 count for
    nothing. Returns fp32 [rows] and int64 [rows]. Of a model as `Headless` the logits are never
    held; of any other only those that a label needs are brought to fp32.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if isinstance(model, Headless):
        token_logps, wanted = model.token_logps(inputs, labels)
    else:
        token_logps, wanted = logps_of_logits(model(**inputs, use_cache=False).logits, labels)
    return by_row(token_logps, wanted)


def logps_of_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each labelled token, and where these tokens are.

    `logits` [rows, length or more, vocabulary]: what is more stands before the first label (tokens
    of an adapter). Only those that a label needs are brought to fp32. Returns what
    `Headless.token_logps` does.
    """
    targets, wanted = shifted(labels)
    logits = logits[:, -labels.shape[1] :]
    picked = logits[:, :-1][wanted].float()  # [labelled tokens, vocabulary]
    return -F.cross_entropy(picked, targets, reduction="none"), wanted


def by_row(token_logps: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of each row's log-probabilities, fp32 [rows], and how many, int64 [rows]."""
    row_of_token = wanted.nonzero(as_tuple=True)[0]
    sums = torch.zeros(len(wanted), dtype=torch.float32, device=token_logps.device)
    return sums.index_add(0, row_of_token, token_logps), wanted.sum(dim=1)
