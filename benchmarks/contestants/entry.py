"""What a contestant is, and what several of them do alike."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import attrs
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import Inputs

__all__ = ["Contestant", "Entry", "Unavailable", "forward_backward", "need"]


class Unavailable(Exception):  # noqa: N818  # an answer, not an error
    """A contestant cannot run here; the message says why."""


@attrs.frozen(eq=False)
class Entry:
    """A contestant with its weight quantized and its layers built, ready to be timed."""

    call: Callable[[], object]
    """Does it once. In suite decode a functools.partial that can be copied with its weight."""
    another: Callable[[], Callable[[], object]] | None = None
    """Makes the same call on a copy of the weight, where `copy.deepcopy` does not."""
    note: Callable[[], str] = lambda: ""
    """Asked after the run: what a reader should know beside the name."""
    scale: float = 1.0
    """What its time is multiplied by, where it moves more bytes than the case does."""
    timer: Callable[[int], float] | None = None
    """Its own clock, where it runs in another process: repeats to seconds."""
    close: Callable[[], object] = lambda: None
    """Called in the end."""


@attrs.frozen
class Contestant:
    """A name in the table, and how it gets ready for a case."""

    name: str
    suites: tuple[str, ...]
    prepare: Callable[[Case, Inputs], Entry | None]
    """Returns None where the case is not its own; raises Unavailable where it cannot run."""


def need(module: str, hint: str = "") -> ModuleType:
    """Import a module; Unavailable if it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise Unavailable(hint or f"{package} is not installed: {error}") from error


def forward_backward(
    layer: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor], grad_y: Tensor
) -> tuple[Tensor, ...]:
    """Run a layer both ways; return y and the gradients of x and the parameters."""
    y = layer(x)
    return (y.detach(), *torch.autograd.grad(y, [x, *parameters], grad_y.to(y.dtype)))
