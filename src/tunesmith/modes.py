"""in_mode: ask a model in training or eval mode, and leave every module in the mode it was in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["in_mode"]


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a model into training or eval mode, and each of its modules back into its own after.

    A module that is made within (BigBird makes layers when first asked) gets the model's own mode.
    """
    own = model.training
    modes = {module: module.training for module in model.modules()}
    if any(mode is not training for mode in modes.values()):
        model.train(training)
    try:
        yield
    finally:
        for module in model.modules():
            module.training = modes.get(module, own)
