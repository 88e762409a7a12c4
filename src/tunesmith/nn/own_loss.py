"""What a causal language model's own loss is made of, found out by asking it.

Most return the mean negative log-likelihood of the next tokens. A mixture of experts may add what
its routers cost, and a decoder that was made to be half of an encoder-decoder scores each token
against its own place, since its labels were once shifted by the one who called it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.data.render import IGNORE_INDEX
from tunesmith.modes import in_mode

__all__ = ["OwnLoss", "as_in_training", "mean_nll", "own_loss", "trial_batch"]


@attrs.frozen
class OwnLoss:
    """How a model's own loss stands to the likelihood of the next tokens."""

    usable: bool
    """Whether it is the loss to minimise; if not, the likelihood of the next tokens is."""
    further: bool
    """Whether it has terms that labels have no part in, which no logits tell of."""
    text: str
    """What it is, for a log; empty where it is the likelihood and nothing else."""

    @property
    def plain(self) -> bool:
        """Whether hidden states and head are all it takes to compute what is to be minimised."""
        return not self.usable or not self.text


PLAIN = OwnLoss(usable=True, further=False, text="")
NONE = OwnLoss(usable=False, further=False, text="")


def own_loss(model: Any) -> OwnLoss:
    """Compare a model's own loss with what its logits give on a few tokens, twice.

    The model, which may be wrapped by PEFT, is asked in training mode and left as it was.
    """
    inputs, labels = trial_batch(model)
    others = torch.where(labels == IGNORE_INDEX, labels, labels.flip(0).clamp_min(0))
    try:
        with as_in_training(model):
            answers = []
            for asked in (labels, others):
                torch.manual_seed(0)
                answers.append(model(**inputs, labels=asked, use_cache=False))
    except TypeError:  # its forward takes no labels
        return NONE
    if any(getattr(answer, "loss", None) is None for answer in answers):
        return NONE
    if any(getattr(answer, "logits", None) is None for answer in answers):
        return OwnLoss(True, False, "its loss comes without logits")
    off, moved = (
        float(answer.loss) - float(mean_nll(answer.logits, asked))
        for answer, asked in zip(answers, (labels, others), strict=True)
    )
    if not math.isfinite(off + moved):
        return PLAIN  # a broken model, which is told where it is trained
    # what is summed in 16 bits is known to two or three digits
    exact = answers[0].loss.dtype == torch.float32
    near = (2e-5 if exact else 1e-2) * max(1.0, abs(float(answers[0].loss)))
    if abs(off) <= near and abs(moved) <= near:
        return PLAIN
    if abs(float(answers[0].loss) - float(_in_place(answers[0].logits, labels))) <= near:
        text = "its own loss scores each token against its own place, and not against the next one"
        return OwnLoss(False, False, text)
    if abs(off - moved) <= 2 * near:
        return OwnLoss(True, True, f"its own loss has further terms, {off:.2g} on a trial")
    return OwnLoss(True, False, "its own loss is another than the likelihood of the next tokens")


def mean_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of labels, each told by the token before it.

    `logits` [rows, length or more, vocabulary]: what is more stands before the first label (tokens
    of an adapter). `labels` int64 [rows, length], -100 for tokens that count for nothing.
    """
    logits = logits[:, -labels.shape[1] :]
    return _in_place(logits[:, :-1], labels[:, 1:])


def _in_place(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits[:, -labels.shape[1] :]
    wanted = labels != IGNORE_INDEX
    return F.cross_entropy(logits[wanted].float(), labels[wanted])


def trial_batch(model: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Return inputs and labels of two short rows, one of them padded: int64 [2, 8] each."""
    embedding = model.get_input_embeddings()
    device = next(model.parameters()).device
    ids = torch.arange(1, 17, device=device).mul(7919).remainder(embedding.num_embeddings)
    ids = ids.reshape(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.clone()
    labels[0, :3] = labels[1, :2] = IGNORE_INDEX
    labels[mask == 0] = IGNORE_INDEX
    return {"input_ids": ids, "attention_mask": mask}, labels


@contextmanager
def as_in_training(model: Any) -> Iterator[None]:
    """Let a model be asked as it is in training, without gradients, and leave it as it was.

    Some layers change their weights when they are first used in eval mode. Random numbers drawn
    within are no others' loss.
    """
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with in_mode(model, training=True), torch.no_grad(), torch.random.fork_rng(devices):
        yield
