"""Trains a model without anything random in it: in eval mode, with gradients.

Setting dropout rates to 0 does not do: OPT and others drop by a function call, attention drops by a
rate it is handed, layers are dropped whole, routers are jittered. All of it asks for `training`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from tunesmith.nn.fused_layers import Fused

__all__ = ["CHECKPOINTS", "held_in_eval"]

CHECKPOINTS = "checkpoints_in_eval"
"""Attribute of a layer that computes its activations again in the backward pass all the same."""


@contextmanager
def held_in_eval(model: nn.Module) -> Iterator[None]:
    """Let `model.train()` do what `model.eval()` does, but for gradient checkpointing.

    transformers' layers checkpoint in training mode only; where they are asked to, they do here.
    """
    before = vars(model).get("train")
    stock: Callable[..., nn.Module] = model.train
    undo: list[Callable[[], Any]] = []

    def train(mode: bool = True) -> nn.Module:
        if mode and not undo:
            undo.extend(_checkpointing_in_eval(model))
        stock(False)
        return model

    vars(model)["train"] = train
    try:
        yield
    finally:
        if before is None:
            del vars(model)["train"]
        else:
            vars(model)["train"] = before
        for each in undo:
            each()


def _checkpointing_in_eval(model: nn.Module) -> list[Callable[[], Any]]:
    """Let the layers that are to be checkpointed be so in eval mode; return how to undo each."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    undo: list[Callable[[], Any]] = []
    for layer in model.modules():
        if not isinstance(layer, GradientCheckpointingLayer) or not layer.gradient_checkpointing:
            continue
        own = vars(layer).get("forward")
        if isinstance(own, Fused):  # asks for the attribute where the layer runs in one pass
            vars(layer)[CHECKPOINTS] = True
            undo.append(partial(vars(layer).pop, CHECKPOINTS))
        elif own is None:
            vars(layer)["forward"] = _checkpointed(layer)
            undo.append(partial(vars(layer).pop, "forward"))
    return undo


def _checkpointed(layer: Any) -> Callable[..., Any]:
    stock, recompute = layer.forward, layer._gradient_checkpointing_func

    def forward(*args: Any, **kwargs: Any) -> Any:
        return recompute(partial(stock, **kwargs), *args)

    return forward
