"""Clipping in one pass does what torch does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.nn.clipping import clip_grad_norm_, clipped_by_kernels
from tunesmith.ops import native, native_status

SHAPES = [(16, 577), (1,), (0, 4), (300, 16), (70001,)]

kernels = pytest.mark.skipif(not native_status().loaded, reason="needs the native extension")


def parameters_of(dtype: torch.dtype, spread: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    for each in made:
        each.grad = (spread * torch.randn(each.shape, generator=generator)).to(dtype)
    return [*made, nn.Parameter(torch.zeros(3))]  # the last has none


def grads_of(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [each.grad for each in parameters if each.grad is not None]


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors the kernel was given, once a call."""
    seen: list[int] = []
    if native_status().loaded:
        own = native.kernels.clip_norm

        def counted(tensors: list[int], *rest: Any) -> float:
            seen.append(len(tensors))
            return own(tensors, *rest)

        monkeypatch.setattr(native.kernels, "clip_norm", counted)
    return seen


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_norm", [1.0, 100.0, 1e4, float("inf")])
def test_norm_and_gradients_are_torchs(
    dtype: torch.dtype, max_norm: float, by_kernels: list[int]
) -> None:
    theirs, ours = parameters_of(torch.float64), parameters_of(dtype)
    for their, our in zip(grads_of(theirs), grads_of(ours), strict=True):
        their.copy_(our)
    before = [grad.clone() for grad in grads_of(ours)]
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    norm = clip_grad_norm_(iter(ours), max_norm)
    assert by_kernels == [len(SHAPES)]
    assert norm.dtype == torch.float32
    assert norm.shape == ()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for was, their, our in zip(before, grads_of(theirs), grads_of(ours), strict=True):
        assert torch.allclose(our.double(), their, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
        assert max_norm < expected or torch.equal(our, was)


@kernels
@pytest.mark.parametrize("spread", [1e-25, 1e25])
def test_squares_may_be_past_what_fp32_holds(spread: float) -> None:
    ours = parameters_of(torch.float32, spread)
    expected = torch.cat([grad.double().flatten() for grad in grads_of(ours)]).norm()
    norm = clip_grad_norm_(ours, float("inf"))
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)


@kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_shows_as_it_does_in_torch(bad: float) -> None:
    both = parameters_of(torch.float32), parameters_of(torch.float32)
    norms = []
    for parameters, clip in zip(
        both, (torch.nn.utils.clip_grad_norm_, clip_grad_norm_), strict=True
    ):
        grads_of(parameters)[3][7, 5] = bad
        norms.append(clip(parameters, 1.0))
    assert torch.equal(norms[0].isnan(), norms[1].isnan())
    assert not norms[1].isfinite()
    for theirs, ours in zip(*map(grads_of, both), strict=True):
        assert torch.equal(theirs.isnan(), ours.isnan())
        assert torch.allclose(theirs.nan_to_num(), ours.nan_to_num())


@kernels
def test_the_norm_does_not_depend_on_how_many_threads_there_are() -> None:
    threads = torch.get_num_threads()
    norms = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            norms.append(clip_grad_norm_(parameters_of(torch.float32), 1.0).item())
    finally:
        torch.set_num_threads(threads)
    assert len(set(norms)) == 1


def test_other_gradients_are_torchs_to_clip(by_kernels: list[int]) -> None:
    def clipped(change: Any) -> None:
        both = []
        for clip in (torch.nn.utils.clip_grad_norm_, clip_grad_norm_):
            parameters = parameters_of(torch.float32)
            change(parameters)
            both.append((clip(parameters, 1.0), *grads_of(parameters)))
        for theirs, ours in zip(*both, strict=True):
            assert torch.equal(theirs, ours)

    def turned(parameters: list[nn.Parameter]) -> None:
        parameters[0].data = torch.zeros(577, 16).t()
        parameters[0].grad = torch.ones(577, 16).t()

    def of_another_dtype(parameters: list[nn.Parameter]) -> None:
        parameters[1] = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        parameters[1].grad = torch.ones(1, dtype=torch.float64)

    def none(parameters: list[nn.Parameter]) -> None:
        for each in parameters:
            each.grad = None

    for change in (turned, of_another_dtype, none):
        clipped(change)
    assert not by_kernels


def test_without_kernels_it_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "CODES", {})
    theirs, ours = parameters_of(torch.float32), parameters_of(torch.float32)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert torch.equal(clip_grad_norm_(ours, 1.0), expected)
    for their, our in zip(grads_of(theirs), grads_of(ours), strict=True):
        assert torch.equal(their, our)


@kernels
def test_an_accelerator_clips_by_it_and_is_itself_again_afterwards(by_kernels: list[int]) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    parameters = parameters_of(torch.float32)
    with clipped_by_kernels(accelerator):
        norm = accelerator.clip_grad_norm_(parameters, 1.0)
        assert by_kernels == [len(SHAPES)]
        # another norm is its own
        other = accelerator.clip_grad_norm_(parameters, 1.0, norm_type=1)
        assert len(by_kernels) == 1
    assert norm.item() > 1
    assert other.item() > 1
    accelerator.clip_grad_norm_(parameters, 1.0)
    assert len(by_kernels) == 1
    assert "clip_grad_norm_" not in vars(accelerator)


@pytest.mark.parametrize("what", ["scaler", "distributed_type", "replaced"])
def test_an_accelerator_that_does_more_is_left_alone(what: str) -> None:
    from accelerate import DistributedType

    def stock(*_: Any) -> str:
        return "stock"

    accelerator = SimpleNamespace(distributed_type=DistributedType.NO, scaler=None)
    if what == "replaced":
        accelerator.clip_grad_norm_ = stock
    else:
        setattr(accelerator, what, {"scaler": 1, "distributed_type": DistributedType.FSDP}[what])
    before = dict(vars(accelerator))
    with clipped_by_kernels(accelerator):
        assert vars(accelerator) == before
