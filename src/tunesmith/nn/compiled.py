"""torch.compile for a model's repeated layers, one by one.

A layer is compiled once for all its repeats, so this takes a fraction of what the model as a whole
would, and the loop over the layers, masks and caches stay plain Python.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["compile_layers", "described", "repeated"]


def repeated(model: Any) -> list[str]:
    """Return the classes of a model's repeated layers as transformers names them; [] if unknown."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return sorted(getattr(base, "_no_split_modules", None) or [])


def compile_layers(model: nn.Module, **options: Any) -> int:
    """Compile each repeated layer in place; return how many there are.

    Parameters keep their names, and a copy or a pickle of the model is not compiled. `options` go
    to torch.compile, which works when a layer is first called.
    """
    names = repeated(model)
    # embeddings are named along with the layers, and there is nothing in them to compile
    layers = [
        module
        for module in model.modules()
        if type(module).__name__ in names and any(module.children())
    ]
    # layers differ in little but their number, which is no reason to compile each
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    for layer in layers:
        layer.compile(**options)
    return len(layers)


def described(layers: list[str]) -> str:
    """Return as a sentence which of `repeated` are compiled, or that there are none."""
    if not layers:
        return "torch.compile: the model does not say which of its layers repeat; none is compiled"
    return f"torch.compile: each {' and '.join(layers)}, when it is first called"
