"""Ops on plain tensors go past torch's dispatcher; who listens there still hears of the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.ops import dispatch, linear_nf4, native_status, quantize_4bit
from tunesmith.ops.attention import attention, attention_decode
from tunesmith.ops.elementwise import gated, rms_norm, rotary


class Listening(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """A tensor that hears of the ops it goes through."""

    heard: list[str]
    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)  # type: ignore[attr-defined]
        made.held, made.heard = held, []
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for arg in args:
            if isinstance(arg, Wrapped):
                arg.heard.append(str(func))
        return func(*(arg.held if isinstance(arg, Wrapped) else arg for arg in args))


def layer() -> tuple[Tensor, Any, tuple[Tensor, Tensor, float]]:
    generator = torch.Generator().manual_seed(0)
    weight, x, a, b = (
        torch.randn(*shape, generator=generator) for shape in ((8, 64), (3, 64), (2, 64), (8, 2))
    )
    lora = (nn.Parameter(a), nn.Parameter(b), 0.5)
    return x.requires_grad_(), quantize_4bit(weight), lora


@pytest.mark.skipif(not native_status().loaded, reason="there is nothing to go straight to")
def test_plain_tensors_go_past_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(op: str, args: Any) -> Any:
        raise AssertionError(f"{op} was dispatched")

    monkeypatch.setattr(dispatch, "_dispatched", refuse)
    x, w, lora = layer()
    linear_nf4(x, w, None, lora).sum().backward()
    q, k = torch.randn(1, 20, 4, 8, requires_grad=True), torch.randn(1, 20, 2, 8)
    attention(q, k, k, torch.tensor([[0, 0, 20, 0, 19, 1]]), 0.3).sum().backward()
    rms_norm(x, torch.ones(64), 1e-6).sum().backward()
    gated(x, x, "silu").sum().backward()
    angles = torch.randn(1, 20, 8)
    rotary(q, angles.cos(), angles.sin()).sum().backward()


def test_a_dispatch_mode_hears_of_every_op_and_changes_no_result() -> None:
    x, w, lora = layer()
    expected = linear_nf4(x, w, None, lora)
    expected.sum().backward()
    grads = [tensor.grad for tensor in (x, *lora[:2])]
    x, w, lora = layer()
    with Listening() as mode:
        y = linear_nf4(x, w, None, lora)
        y.sum().backward()
    assert {"tunesmith.linear.default", "tunesmith.linear_backward.default"} <= {*mode.heard}
    assert torch.equal(y, expected)
    for tensor, grad in zip((x, *lora[:2]), grads, strict=True):
        assert tensor.grad is not None
        assert grad is not None
        assert torch.equal(tensor.grad, grad)


def test_a_subclass_of_tensors_hears_of_its_ops() -> None:
    x = torch.randn(3, 64)
    seen = Wrapped(x)
    with torch.no_grad():
        y = rms_norm(seen, torch.ones(64), 1e-6)
    assert "tunesmith.rms_norm.default" in seen.heard
    assert torch.equal(y, rms_norm(x, torch.ones(64), 1e-6))


def test_an_op_without_a_derivative_is_not_taken_for_a_constant() -> None:
    q = torch.randn(1, 4, 8, requires_grad=True)
    keys = torch.randn(1, 2, 5, 8)
    out = attention_decode(q, keys, keys, torch.zeros(1, dtype=torch.int64), 5, 0.3)
    # torch lets it pass and warns, or raises, once a gradient is asked for
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        out.sum().backward()


@pytest.mark.parametrize("tokens", [3, 600])
def test_outputs_may_be_written_to_in_place(tokens: int) -> None:
    _, w, lora = layer()
    x = torch.randn(2, tokens, 64)
    y = linear_nf4(x, w, None, lora)
    y += 1.0
    y.relu_().sum().backward()
    assert lora[0].grad is not None
    assert lora[0].grad.abs().sum() > 0
