"""Log-probabilities from hidden states, without ever holding the logits.

The logits of a batch are its largest tensor by far: [tokens, vocabulary], once in the compute dtype
and several times in fp32. Here they exist for some tokens at a time, and the gradient of the hidden
states is worked out while they do, so that nothing of that size is kept for the backward pass.
Liger (arXiv:2410.10989) and Cut Cross-Entropy (arXiv:2411.09009) do this on a GPU.
"""

from __future__ import annotations

from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.data.render import IGNORE_INDEX
from tunesmith.errors import OpError
from tunesmith.nn.own_loss import OwnLoss, as_in_training, own_loss
from tunesmith.ops.elementwise import logps_
from tunesmith.ops.native import pooled_empty

__all__ = ["CHUNK_BYTES", "Headless", "head_logps", "shifted", "split_head"]

CHUNK_BYTES = 48 << 20
"""How much the logits of a chunk may take in fp32; a chunk has room for 16 tokens at least."""


def head_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return the log-probability of each label: fp32 [tokens].

    `hidden` [tokens, hidden size] is what the head would be given; `weight` [vocabulary, hidden
    size] and `bias` [vocabulary] are the head's own, frozen, in the dtype of `hidden`; `labels` is
    int64 [tokens] with values from 0 to vocabulary - 1. Logits are products in that dtype,
    everything after them is fp32. Gradients flow to `hidden` only. Raises OpError for a head that
    is trained.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise OpError(
            "got a head whose weight requires a gradient; this has one for the hidden states only; "
            "use torch.nn.functional.cross_entropy on the logits"
        )
    logps: Tensor = _HeadLogps.apply(hidden, weight, labels, bias)  # type: ignore[no-untyped-call]
    return logps


class _HeadLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None
    ) -> Tensor:
        tokens = len(hidden)
        logps = hidden.new_empty(tokens, dtype=torch.float32)
        most = max(1, CHUNK_BYTES // (4 * weight.shape[0]) // _TILE_ROWS) * _TILE_ROWS
        chunks = -(-tokens // most)
        size = _whole_tiles(-(-tokens // max(1, chunks)))  # all chunks are of one size
        padded = F.pad(hidden, (0, 0, 0, chunks * size - tokens))
        # what a logp of 1 would send back to each hidden state
        gradients = torch.empty_like(padded) if ctx.needs_input_grad[0] else None
        logits = pooled_empty((size, weight.shape[0]), hidden.dtype, hidden.device)
        for start in range(0, tokens, max(1, size)):
            part = slice(start, start + size)
            if bias is None:
                torch.mm(padded[part], weight.mT, out=logits)
            else:
                torch.addmm(bias, padded[part], weight.mT, out=logits)
            wanted = labels[part]
            logps[part] = logps_(logits[: len(wanted)], wanted, gradients is not None)
            if gradients is not None:
                torch.mm(logits, weight, out=gradients[part])
        if gradients is not None:
            ctx.save_for_backward(gradients[:tokens])
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return (grad[:, None] * gradients).to(gradients.dtype), None, None, None


# A library compiles its product for each number of rows that it has not had lately, which takes
# longer than some rows more: so there are whole tiles of rows, and few numbers.
_TILE_ROWS = 16


def _whole_tiles(rows: int) -> int:
    return -(-rows // _TILE_ROWS) * _TILE_ROWS


@attrs.frozen(eq=False)
class Headless:
    """A causal language model in two: a body of hidden states, a head that makes logits of them."""

    body: nn.Module
    head: nn.Linear

    def token_logps(self, inputs: dict[str, Any], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each labelled token, and where these tokens are.

        `inputs` go to the body as they are; `labels` is int64 [rows, length], -100 for tokens that
        count for nothing. A token is predicted by the one before it, so the first of a row has no
        say. Returns fp32 [labelled tokens] and bool [rows, length - 1], true where a label is.
        """
        hidden = self.body(**{"use_cache": False, **inputs})[0]  # [rows, length, hidden size]
        targets, wanted = shifted(labels)
        logps = head_logps(hidden[:, :-1][wanted], self.head.weight, targets, self.head.bias)
        return logps, wanted


def shifted(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels that are to be predicted, and where: each by the token before it.

    `labels` is int64 [rows, length], -100 for tokens that count for nothing. Returns int64
    [labelled tokens] and bool [rows, length - 1].
    """
    targets = labels[:, 1:]
    wanted = targets != IGNORE_INDEX
    return targets[wanted], wanted


def split_head(model: Any, own: OwnLoss | None = None) -> Headless | str:
    """Take a causal language model apart, or return why that cannot be done.

    It is found out by trying: a model of any architecture will do whose logits are a frozen linear
    layer's of what its body returns, and whose own loss, if that is one of next tokens, is made of
    these logits and nothing else. `model` may be wrapped by PEFT; `own` is what `own_loss` said
    of it, asked here if it is not given.
    """
    base = model
    if hasattr(model, "get_base_model"):
        if getattr(model.active_peft_config, "is_prompt_learning", False):
            return "its adapter adds tokens to the prompt, which the body knows nothing of"
        base = model.get_base_model()
    head, body = base.get_output_embeddings(), base.base_model
    if body is base or not isinstance(body, nn.Module):
        return f"a {type(base).__name__} has no body apart from its head"
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return f"its head is no plain linear layer, but a {type(head).__name__}"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "its head is trained"
    if base._forward_hooks or base._forward_pre_hooks or head._forward_hooks:
        return "something hooks into its forward pass"
    headless = Headless(body, head)
    try:
        off = _difference(base, headless)
    except Exception as error:  # whatever a stranger's model raises at made-up tokens
        first = (str(error).splitlines() or [""])[0]
        return f"it does not take a few made-up tokens: {type(error).__name__}: {first}"
    if off > 0.0:
        return f"its logits are not what its head makes of its hidden states (off by {off:.2g})"
    own = own_loss(model) if own is None else own
    return headless if own.plain else own.text


def _difference(model: Any, headless: Headless) -> float:
    """Return how far the logits of both ways are apart on a few tokens; 0 if they are the same.

    Both passes are as in training, with the same random numbers.
    """
    weight = headless.head.weight
    tokens = (
        torch.arange(1, 9, device=weight.device).mul(7919).remainder(len(weight))[None]
    )  # [1, 8]
    with as_in_training(model):
        torch.manual_seed(0)
        logits = model(input_ids=tokens, use_cache=False).logits
        torch.manual_seed(0)
        ours = headless.head(headless.body(input_ids=tokens, use_cache=False)[0])
    if logits.shape != ours.shape:
        return float("inf")
    off = (logits.float() - ours.float()).abs().max()
    # the same kernels on the same numbers: only a different formula makes a difference
    return float(off) if float(off) > 1e-6 * float(logits.abs().max()) else 0.0
