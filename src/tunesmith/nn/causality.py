"""Whether each token of a model sees those before it alone, found out by changing later ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.nn.own_loss import as_in_training, trial_batch

__all__ = ["check_causal"]

KEPT = 5
"""Tokens of a trial row that stay as they are; those after them are changed."""


def check_causal(model: Any) -> None:
    """Raise `ModelError` for a model whose logits at a token move with the tokens after it.

    To predict the next token by such a model is to copy it, which teaches nothing, and a row means
    something else in a batch that is padded. `model` may be wrapped by PEFT; it is asked as in
    training, with the same random numbers both times, and left as it was. A model whose forward
    does not take a few made-up tokens is not asked.
    """
    inputs, _ = trial_batch(model)
    ids = inputs["input_ids"][:1]  # [1, 8], nothing padded
    # no more or less of them, for dropout draws by their number
    other = torch.cat([ids[:, :KEPT], ids[:, : ids.shape[1] - KEPT]], dim=1)
    for _ in range(2):  # BigBird makes layers of its own when it is first asked
        moved = _moved(model, ids, other)
        if moved is None:
            return
        least, size, exact = moved
        # not the other way round: of a broken model, which gives no numbers, others say more
        if not least > (1e-3 if exact else 2e-2) * size:
            return
    name = getattr(model.config, "model_type", type(model).__name__)
    raise ModelError(
        f"this {name} is no causal language model as it is computed here: what it makes of a "
        f"token moves with the tokens after it (its logits by {least:.2g} or more, of "
        f"{size:.2g}), so predicting them teaches nothing; take a causal language model"
    )


def _moved(model: Any, ids: Tensor, other: Tensor) -> tuple[float, float, bool] | None:
    """Return by how much logits of kept tokens move, how large they are, and if they are in fp32.

    None where that cannot be asked.
    """
    found = []
    with as_in_training(model):
        for asked in (ids, other):
            torch.manual_seed(0)
            try:
                output = model(
                    input_ids=asked, attention_mask=torch.ones_like(asked), use_cache=False
                )
            except Exception:  # whatever a stranger's model raises; training will say it
                return None
            logits = getattr(output, "logits", None)
            if logits is None:
                return None
            found.append(logits[0, -asked.shape[1] :][:KEPT])
    moved = (found[0] - found[1]).abs().amax(-1).float()  # [KEPT]
    # the least of them: where products are of other shapes, rounding may send a token to another
    # expert, but not each of them
    return float(moved.min()), float(found[0].abs().max()), found[0].dtype == torch.float32
