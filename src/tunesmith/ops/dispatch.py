"""How an op is called: past torch's dispatcher where nothing else has to see the call.

The dispatcher takes some 10 µs to get from Python to an op written in Python, on each of four ways
(forward and backward, with autograd and below it), which a short sample feels. So an op on plain
tensors goes to its derivative and to its device's implementation at once; it is the dispatcher's
under torch.compile, functorch, a dispatch mode (fake tensors, make_fx) and for subclasses of
tensors, which all need to see it. torch.profiler names the derivative then, not the op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["below_autograd", "call", "differentiate", "implement", "seen_by_torch_alone"]

_derivatives: dict[str, type[torch.autograd.Function]] = {}
_implementations: dict[tuple[str, str], Callable[..., Any]] = {}

_PLAIN = frozenset((Tensor, nn.Parameter, torch.dtype, type(None), bool, int, float, str))


def implement(op: str, device: str, implementation: Callable[..., Any]) -> None:
    """Make a function what an op does on a device of that type."""
    torch.library.impl(f"tunesmith::{op}", device, implementation)
    _implementations[op, device] = implementation


def differentiate(op: str, function: type[torch.autograd.Function]) -> None:
    """Make a function an op's derivative; its forward gets to the op by `below_autograd`.

    torch.library.register_autograd does the same at three times the time of a call.
    """
    _derivatives[op] = function

    def with_autograd(*args: Any) -> Any:
        if _wants_gradient(args):
            return function.apply(*args)  # type: ignore[no-untyped-call]  # torch's own
        return _dispatched(op, args)

    torch.library.impl(f"tunesmith::{op}", "Autograd", with_autograd)


def call(op: str, *args: Any) -> Any:
    """Return what an op gives, so that gradients flow where they are wanted."""
    if not seen_by_torch_alone(args):
        return _overload(op)(*args)
    if not _wants_gradient(args):
        return _implemented(op, args)
    derivative = _derivatives.get(op)
    if derivative is None:
        return _overload(op)(*args)
    return derivative.apply(*args)  # type: ignore[no-untyped-call]  # torch's own


def below_autograd(op: str, *args: Any) -> Any:
    """Return what an op gives, past its derivative."""
    return _implemented(op, args) if seen_by_torch_alone(args) else _dispatched(op, args)


def seen_by_torch_alone(args: tuple[Any, ...]) -> bool:
    """Return whether nothing but torch's own autograd has to see a call with these arguments."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or not _PLAIN.issuperset(map(type, args))
    )


def _implemented(op: str, args: tuple[Any, ...]) -> Any:
    implementation = _implementations.get((op, args[0].device.type))
    if implementation is None:
        return _dispatched(op, args)
    with torch._C._AutoDispatchBelowAutograd():
        return implementation(*args)


def _dispatched(op: str, args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return _overload(op)(*args)


def _overload(op: str) -> Any:
    return getattr(torch.ops.tunesmith, op).default


def _wants_gradient(args: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, Tensor) and arg.requires_grad:
                return True
    return False
