"""Log-probabilities of the trained tokens, as losses and metrics need them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.nn.head_logps import Headless, shifted

__all__ = ["completion_logps"]


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
        logits = model(**inputs, use_cache=False).logits
        targets, wanted = shifted(labels)
        picked = logits[:, :-1][wanted].float()  # [labelled tokens, vocabulary]
        token_logps = -F.cross_entropy(picked, targets, reduction="none")
    row_of_token = wanted.nonzero(as_tuple=True)[0]
    sums = torch.zeros(labels.shape[0], dtype=torch.float32, device=labels.device)
    return sums.index_add(0, row_of_token, token_logps), wanted.sum(dim=1)
