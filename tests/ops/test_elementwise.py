"""The fused element-wise ops agree with plain PyTorch, and their derivatives with autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.ops import elementwise as op

# kernels sum in another order; in 16 bits that may tip a value to its neighbour
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
SIZES = [1, 2, 3, 15, 16, 17, 31, 33, 64, 100, 576]


def random(*shape: int, dtype: torch.dtype, seed: int, size: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * size).to(dtype)


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def both_ways(call: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return what a function gives and the gradients of its inputs."""
    inputs = tuple(t.detach().clone().requires_grad_() for t in inputs)
    out = call(*inputs)
    grad = random(*out.shape, dtype=out.dtype, seed=9)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def stock_norm(x: Tensor, weight: Tensor, eps: float, from_one: bool) -> Tensor:
    """RMSNorm as transformers writes it for Llama, or for Gemma."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if from_one:
        return (wide * (1.0 + weight.float())).type_as(x)
    return weight * wide.to(x.dtype)


def stock_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    turned = torch.cat((-high, low), dim=-1)
    return x * cos.unsqueeze(2) + turned * sin.unsqueeze(2)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("from_one", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm_is_that_of_transformers(size: int, from_one: bool, dtype: torch.dtype) -> None:
    x = random(3, 5, size, dtype=dtype, seed=0, size=3.0)
    weight = random(size, dtype=dtype, seed=1)
    got = both_ways(lambda x: op.rms_norm(x, weight, 1e-5, from_one), x)
    expected = both_ways(lambda x: stock_norm(x, weight, 1e-5, from_one), x)
    # where the two parts of a gradient nearly cancel (one or two columns) its norm says little
    assert error(got[0], expected[0]) <= LIMITS[dtype]
    scale = expected[1].norm().clamp_min(random(3, 5, size, dtype=dtype, seed=9).norm() * 0.3)
    assert float((got[1] - expected[1]).norm() / scale) <= 3 * LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("activation", op.ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_gated_is_activation_times_up(size: int, activation: str, dtype: torch.dtype) -> None:
    gate = random(4, size, dtype=dtype, seed=0, size=4.0)
    up = random(4, size, dtype=dtype, seed=1)
    got = both_ways(lambda g, u: op.gated(g, u, activation), gate, up)
    if dtype == torch.float32:  # torch's own 1 + tanh cancels where the gate is far below zero
        gate, up = gate.double(), up.double()
    expected = both_ways(lambda g, u: op.ACTIVATIONS[activation](g) * u, gate, up)
    for ours, theirs in zip(got, expected, strict=True):
        assert error(ours, theirs) <= LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("size", [2, 6, 16, 34, 64, 128])
def test_rotary_is_bit_for_bit_that_of_transformers(size: int, dtype: torch.dtype) -> None:
    x = random(2, 7, 3, size, dtype=dtype, seed=0)
    # both halves differ, as they do in no model: nothing may take one for the other
    cos, sin = (random(2, 7, size, dtype=dtype, seed=s) for s in (1, 2))
    got = both_ways(lambda x: op.rotary(x, cos, sin), x)
    expected = both_ways(lambda x: stock_rotary(x, cos, sin), x)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 17, 1000, 1025, 5000])
def test_logps_and_their_slopes_are_those_of_log_softmax(classes: int, dtype: torch.dtype) -> None:
    logits = random(5, classes, dtype=dtype, seed=0, size=6.0)
    labels = torch.arange(5) * 7919 % classes
    wide = logits.double().requires_grad_()
    expected = wide.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    (slopes,) = torch.autograd.grad(expected.sum(), wide)
    held = logits.clone()
    torch.testing.assert_close(op.logps_(held, labels, False).double(), expected, rtol=0, atol=5e-6)
    assert torch.equal(held, logits)
    torch.testing.assert_close(op.logps_(held, labels, True).double(), expected, rtol=0, atol=5e-6)
    # an fp32 logit of 20 is known to 1e-6, and so is the power of it
    assert float((held.double() - slopes).abs().max()) <= 2 * torch.finfo(dtype).eps + 1e-6


def test_logps_of_extreme_logits() -> None:
    logits = torch.tensor(
        [[1e4, -1e4, 0.0], [-torch.inf, 3.0, 3.0], [torch.nan, 0.0, 0.0], [5e37, 5e37, -5e37]]
    )
    labels = torch.tensor([0, 1, 1, 0])
    expected = logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    got = op.logps_(logits, labels, True)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert logits[2].isnan().all()


def test_logps_of_labels_and_logits_that_do_not_fit() -> None:
    logits = torch.zeros(3, 4)
    for message, call in [
        (r"from 0 to 4 for 4 classes", lambda: op.logps_(logits, torch.tensor([0, 4, 1]), True)),
        (r"from -100 to 1", lambda: op.logps_(logits, torch.tensor([0, -100, 1]), True)),
        (r"int64 \[2\]", lambda: op.logps_(logits, torch.tensor([0, 1]), True)),
        (r"with gaps", lambda: op.logps_(torch.zeros(4, 3).mT, torch.tensor([0, 1, 1]), True)),
    ]:
        with pytest.raises(OpError, match=message):
            call()
    assert not logits.any()


@pytest.mark.parametrize("activation", op.ACTIVATIONS)
def test_gated_holds_at_the_ends(activation: str) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e30, torch.inf, torch.nan])
    up = torch.full_like(gate, 2.0)
    got = op.gated(gate, up, activation)
    expected = op.ACTIVATIONS[activation](gate) * up
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_nan_is_kept(dtype: torch.dtype) -> None:
    x = random(3, 40, dtype=dtype, seed=0)
    x[1, 7] = torch.nan
    weight, other = random(40, dtype=dtype, seed=1), random(3, 40, dtype=dtype, seed=2)
    assert op.rms_norm(x, weight, 1e-6).isnan().all(-1).tolist() == [False, True, False]
    assert torch.equal(op.gated(x, other, "silu").isnan(), x.isnan())
    assert torch.equal(op.gated(other, x, "silu").isnan(), x.isnan())


def test_inputs_may_have_gaps_and_cos_one_row() -> None:
    x = random(2, 3, 7, 16, dtype=torch.float32, seed=0).transpose(1, 2)  # [2, 7, 3, 16]
    cos, sin = (random(1, 7, 16, dtype=torch.float32, seed=s) for s in (1, 2))
    assert torch.equal(op.rotary(x, cos, sin), stock_rotary(x, cos, sin))
    weight = random(32, dtype=torch.float32, seed=3)[::2]
    got = op.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(got, stock_norm(x, weight, 1e-6, False))
    torch.testing.assert_close(op.gated(x, x, "silu"), torch.nn.functional.silu(x) * x)


@pytest.mark.parametrize("name", ["rms_norm", "gated", "rotary"])
def test_ops_keep_the_contract_of_torch_library(name: str) -> None:
    x = random(2, 4, 2, 6, dtype=torch.float32, seed=0).requires_grad_()
    weight = random(6, dtype=torch.float32, seed=1)
    cos = random(2, 4, 6, dtype=torch.float32, seed=2)
    arguments: dict[str, tuple[Any, ...]] = {
        "rms_norm": (x, weight, 1e-6, True),
        "gated": (x, x.detach() + 1, "gelu_tanh"),
        "rotary": (x, cos, cos + 1, False),
    }
    torch.library.opcheck(getattr(torch.ops.tunesmith, name).default, arguments[name])


def test_fp64_gradients_are_those_of_finite_differences() -> None:
    x, other = (random(2, 3, 2, 4, dtype=torch.float64, seed=s).requires_grad_() for s in (0, 1))
    weight, cos, sin = (
        random(*s, dtype=torch.float64, seed=3) for s in ((4,), (2, 3, 4), (2, 3, 4))
    )
    for from_one in (False, True):
        assert torch.autograd.gradcheck(lambda x, f=from_one: op.rms_norm(x, weight, 1e-6, f), x)
    for activation in op.ACTIVATIONS:
        assert torch.autograd.gradcheck(lambda g, u, a=activation: op.gated(g, u, a), (x, other))
    assert torch.autograd.gradcheck(lambda x: op.rotary(x, cos, sin), x)


def test_a_second_backward_pass_is_refused() -> None:
    x = random(3, 8, dtype=torch.float32, seed=0).requires_grad_()
    calls: list[Callable[[], Tensor]] = [
        lambda: op.rms_norm(x, torch.ones(8), 1e-6),
        lambda: op.gated(x, x + 1, "silu"),
    ]
    for call in calls:
        with pytest.raises(OpError, match="create_graph=False"):
            torch.autograd.grad(call().sum(), x, create_graph=True)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2, 4, 3, 8)
    cos = torch.zeros(2, 4, 8)
    frozen = torch.ones(8)
    for message, call in [
        (r"weight \[7\]", lambda: op.rms_norm(x, torch.ones(7), 1e-6)),
        (r"got bfloat16 on cpu", lambda: op.rms_norm(x, frozen.bfloat16(), 1e-6)),
        (r"got a int64 strided", lambda: op.rms_norm(x.long(), frozen.long(), 1e-6)),
        (r"requires a gradient", lambda: op.rms_norm(x, frozen.clone().requires_grad_(), 1e-6)),
        (r"'relu'; allowed are silu, gelu_tanh", lambda: op.gated(x, x, "relu")),
        (r"up \[2, 4, 3\]", lambda: op.gated(x, x[..., 0], "silu")),
        (r"even head size", lambda: op.rotary(x[..., :7], cos[..., :7], cos[..., :7])),
        (r"cos \[2, 3, 8\]", lambda: op.rotary(x, cos[:, :3], cos[:, :3])),
        (r"got float64 on cpu", lambda: op.rotary(x, cos.double(), cos.double())),
    ]:
        with pytest.raises(OpError, match=message):
            call()


@pytest.mark.parametrize("isa", ["avx512", "avx2", "scalar"])
def test_every_instruction_set_agrees(isa: str) -> None:
    native = pytest.importorskip("tunesmith._native")
    if isa not in native.isas():
        pytest.skip(f"this CPU has no {isa}")
    x, y = (random(5, 77, dtype=torch.bfloat16, seed=s, size=3.0) for s in (0, 1))
    weight = random(77, dtype=torch.bfloat16, seed=2)
    heads = x[:, :76].reshape(1, 5, 2, 38)
    cos, sin = (random(1, 5, 38, dtype=torch.bfloat16, seed=s) for s in (3, 4))

    def all_of_it() -> list[Tensor]:
        return [
            *both_ways(lambda x: op.rms_norm(x, weight, 1e-6), x),
            *both_ways(lambda x, y: op.gated(x, y, "gelu_tanh"), x, y),
            *both_ways(lambda x: op.rotary(x, cos, sin), heads),
            op.logps_(slopes := x.clone(), torch.arange(5), True),
            slopes,
        ]

    before, best = native.isa(), all_of_it()
    native.set_isa(isa)
    try:
        other = all_of_it()
    finally:
        native.set_isa(before)
    for ours, theirs in zip(other, best, strict=True):
        assert error(ours, theirs) <= LIMITS[torch.bfloat16]
