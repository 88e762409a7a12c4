"""The linear layer's kernels at the edges of memory, sizes, numbers, processes and threads."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from guards import Guarded
from layers import Layer, assert_close, random_layer
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.ops import (
    FrozenLinear,
    four_bit,
    linear,
    linear_nf4,
    lora_linear,
    native_status,
    quantize_4bit,
)
from tunesmith.ops.dtypes import DTYPES
from tunesmith.ops.four_bit import QUANT_TYPES

HERE = Path(__file__).parent

# what varies from 1 to 513, beside sizes that are small
SHAPES: dict[str, Callable[[int], tuple[int, int, int]]] = {
    "in_features": lambda size: (3, size, 2),
    "out_features": lambda size: (2, 3, size),
    "tokens": lambda size: (size, 4, 3),
    # what kernels for few tokens ask for
    "few tokens": lambda size: (1 + size % 9, 64 + size % 5 * 64, 1 + size % 70),
}


def run_apart(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, one thread unless told otherwise."""
    return subprocess.run(
        [sys.executable, "-W", "error", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def random_like(tensor: Tensor) -> Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)).to(tensor.dtype)


# --- memory ---


@pytest.mark.parametrize("what", SHAPES)
def test_every_size_writes_inside_its_buffers_and_what_the_formula_says(
    native: ModuleType, isa: str, what: str
) -> None:
    for size in range(1, 514):
        layer = random_layer(*SHAPES[what](size), seed=size)
        described, x = native.Linear(**layer.arguments()), layer.x.data_ptr()
        y = Guarded(layer.tokens * layer.out_features * layer.dtype.itemsize)
        s = Guarded(layer.tokens * layer.rank * 4)
        native.linear(described, x=x, s=s.pointer, y=y.pointer, accumulate=False)
        our_y = y.as_dtype(layer.dtype).view(layer.tokens, layer.out_features)
        our_s = s.as_dtype(torch.float32).view(layer.tokens, layer.rank)
        layer.assert_output_close(our_y, our_s, isa)

        grad_y = random_like(our_y)
        shapes = [
            (layer.tokens, layer.in_features),
            (layer.rank, layer.in_features),
            (layer.out_features, layer.rank),
        ]
        dtypes = (layer.dtype, layer.adapter_dtype, layer.adapter_dtype)
        grads = [Guarded(math.prod(s) * d.itemsize) for s, d in zip(shapes, dtypes, strict=True)]
        pointers = zip(("grad_x", "grad_a", "grad_b"), grads, strict=True)
        native.linear_backward(
            described,
            **{name: grad.pointer for name, grad in pointers},
            x=x,
            s=s.pointer,
            grad_y=grad_y.data_ptr(),
            accumulate=False,
        )
        ours = [
            grad.as_dtype(dtype).view(shape)
            for grad, dtype, shape in zip(grads, dtypes, shapes, strict=True)
        ]
        layer.assert_gradients_close(ours, our_s, grad_y, isa)
        assert all(guarded.intact() for guarded in (y, s, *grads))


@pytest.mark.parametrize("kernel", ["quantize", "dequantize", "linear", "clip_norm"])
def test_nothing_behind_the_end_of_a_tensor_is_touched(
    native: ModuleType, isa: str, kernel: str
) -> None:
    done = run_apart(str(HERE / "page_ends.py"), kernel, isa)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_one_element_too_far_would_be_noticed(native: ModuleType, isa: str) -> None:
    done = run_apart(str(HERE / "page_ends.py"), "too_far", isa)
    assert done.returncode == -signal.SIGSEGV


@pytest.mark.slow
@pytest.mark.parametrize("case", ["quantize", "dequantize", "weight", "tokens", "output"])
def test_more_than_2_to_31_elements(native: ModuleType, isa: str, case: str) -> None:
    done = run_apart(str(HERE / "huge.py"), case, isa)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


# --- sizes ---


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_size_of_zero_gives_sums_of_nothing(
    native: ModuleType, isa: str, shape: tuple[int, int, int], rank: int
) -> None:
    for seed in range(12):
        layer = random_layer(*shape, rank=rank, seed=seed)
        y, s = layer.forward(native)
        layer.assert_output_close(y, s, isa)
        layer.assert_gradients_close(layer.backward(native, s, y), s, y, isa)


def test_what_is_not_asked_for_is_not_written(native: ModuleType, isa: str) -> None:
    layer = random_layer(5, 70, 9, rank=3, seed=1)
    y, s = layer.forward(native)
    expected = layer.backward(native, s, y)
    for asked in range(3):
        pointers = [0, 0, 0]
        ours = torch.empty_like(expected[asked])
        pointers[asked] = ours.data_ptr()
        native.linear_backward(
            native.Linear(**layer.arguments()),
            # x is there for grad_a alone, and s for grad_b
            x=layer.x.data_ptr() if asked == 1 else 0,
            s=s.data_ptr() if asked == 2 else 0,
            grad_y=y.data_ptr(),
            **dict(zip(("grad_x", "grad_a", "grad_b"), pointers, strict=True)),
            accumulate=False,
        )
        assert torch.equal(ours, expected[asked])


def test_without_a_weight_the_adapter_is_added_to_what_is_there(
    native: ModuleType, isa: str
) -> None:
    for dtype in DTYPES:
        layer = random_layer(7, 65, 33, rank=4, seed=2, dtype=dtype)
        base = random_like(torch.empty(7, 33, dtype=dtype))
        y, s = base.clone(), torch.empty(7, 4)
        arguments = layer.arguments() | {"weight": 0, "bias": 0}
        native.linear(
            native.Linear(**arguments),
            x=layer.x.data_ptr(),
            s=s.data_ptr(),
            y=y.data_ptr(),
            accumulate=True,
        )
        bare = attrs.evolve(layer.without_weight(), bias=None)
        assert_close(y, base.double() + bare.formula(isa)[0])


# tokens, in_features, out_features: beside what tiles, vectors and blocks hold
ADAPTED = [(1, 70, 33), (15, 64, 101), (17, 31, 96), (33, 257, 5), (513, 40, 50), (40, 300, 530)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [1, 3, 16, 17, 64, 300])
def test_an_adapter_of_any_rank_beside_a_weight_and_without_one(
    native: ModuleType, isa: str, rank: int, dtype: torch.dtype
) -> None:
    for seed, shape in enumerate(ADAPTED):
        beside = random_layer(*shape, rank=rank, seed=seed, dtype=dtype)
        for layer in (beside, beside.without_weight()):
            y, s = layer.forward(native)
            layer.assert_output_close(y, s, isa)
            grad_y = random_like(y)
            layer.assert_gradients_close(layer.backward(native, s, grad_y), s, grad_y, isa)


def test_what_flows_into_the_adapter_is_scaled_and_then_rounded_once(
    native: ModuleType, isa: str
) -> None:
    for seed in range(20):
        layer = random_layer(300, 65, 50, rank=7, seed=seed, dtype=torch.bfloat16)
        if layer.adapter_dtype != torch.float32:
            continue
        grad_y = random_like(layer.formula()[0]).bfloat16()
        _, s = layer.forward(native)
        grad_a = layer.backward(native, s, grad_y)[1]
        expected = layer.formula_of_gradients(s, grad_y, isa)[1]
        # as a whole: an element is rounded the other way now and then
        assert (grad_a - expected).norm() <= 3e-4 * expected.norm()


# --- numbers: the public ops, on every backend ---


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The ops in PyTorch, and as they are bound to the kernels."""
    if request.param == "reference":
        yield SimpleNamespace(
            linear=lambda x, *layer: linear.reference_linear(x, FrozenLinear(*layer)),
            quantize_4bit=four_bit.reference_quantize_4bit,
            dequantize_4bit=four_bit.reference_dequantize_4bit,
        )
        return
    if not native_status().loaded:
        pytest.skip(str(native_status()))
    yield torch.ops.tunesmith


def linear_of(backend: Any, layer: Layer) -> tuple[Tensor, Tensor]:
    y, s = backend.linear(
        layer.x,
        layer.weight,
        *layer.scales,
        layer.out_features,
        layer.in_features,
        layer.blocksize,
        layer.quant_type,
        layer.bias,
        layer.lora_a,
        layer.lora_b,
        layer.scaling,
        layer.keep,
        layer.keep_scale,
    )
    return y, s


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("tokens", [1, 20])
def test_blocks_of_zeros_and_of_denormals(
    backend: Any, isa: str, tokens: int, quant_type: str, dtype: torch.dtype
) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    scales = torch.tensor([0.0, 1.0, tiny, tiny / 4, tiny / 16, 0.0, 1e-38, 1e-30])
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    weight = (weight * scales[:, None]).to(dtype)
    packed, absmax = backend.quantize_4bit(weight, 64, quant_type)
    values = backend.dequantize_4bit(
        packed, absmax, None, None, (8, 64), 64, quant_type, torch.float32
    )
    layer = attrs.evolve(
        random_layer(tokens, 64, 8, rank=0, dtype=torch.float32),
        weight=packed,
        scales=(absmax, None, None),
        dense=values.double(),
        quant_type=quant_type,
        blocksize=64,
        bias=None,
    )
    y, _ = linear_of(backend, layer)
    assert (y[:, [0, 5]] == 0).all()
    # each row by itself: beside a large one it would not be seen that a small one is wrong
    for row, expected in zip(y.T, layer.formula()[0].T, strict=True):
        assert (row - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-42


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_with_nan_or_inf_is_refused_by_name_and_block(
    backend: Any, isa: str, bad: float
) -> None:
    for dtype in DTYPES:
        for quant_type in QUANT_TYPES:
            for position in (0, 63, 64, 191, 192, 197):
                weight = torch.randn(198).to(dtype)
                weight[position] = bad
                with pytest.raises(OpError, match=rf"q_proj: block {position // 64} .*NaN or Inf"):
                    backend.quantize_4bit(weight, 64, quant_type, "q_proj")


@pytest.mark.parametrize("tokens", [3, 21])
@pytest.mark.parametrize("in_features", [64, 75])
def test_nan_in_one_token_stays_there(
    backend: Any, isa: str, tokens: int, in_features: int
) -> None:
    for seed in range(6):
        layer = random_layer(tokens, in_features, 34, seed=seed, rank=5)
        sound, sound_s = linear_of(backend, layer)
        x = layer.x.clone()
        x[1, in_features - 1] = float("nan")
        y, s = linear_of(backend, attrs.evolve(layer, x=x))
        assert y[1].isnan().all()
        others = [row for row in range(tokens) if row != 1]
        assert torch.equal(y[others], sound[others])
        assert torch.equal(s[others], sound_s[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("of_x", "of_scale"), [(2.9e38, 1e-30), (1e-40, 1e30)])
def test_large_and_small_numbers_that_balance(
    isa: str, of_x: float, of_scale: float, dtype: torch.dtype
) -> None:
    if dtype == torch.bfloat16 and "bf16" in isa:
        pytest.skip("its bf16 products take what is subnormal for zero")
    layer = random_layer(2, 128, 8, rank=0, dtype=dtype)
    packed, absmax = four_bit.reference_quantize_4bit(torch.randn(8, 128) * of_scale, 64, "nf4")
    values = four_bit.reference_dequantize_4bit(
        packed, absmax, None, None, (8, 128), 64, "nf4", torch.float32
    )
    layer = attrs.evolve(
        layer,
        x=torch.full((2, 128), of_x, dtype=dtype),
        weight=packed,
        scales=(absmax, None, None),
        dense=values.double(),
        quant_type="nf4",
        blocksize=64,
        bias=None,
    )
    y, _ = linear_of(torch.ops.tunesmith, layer)
    assert_close(y, layer.formula()[0])


# --- processes and threads ---

# nothing that is large here is left to torch: of its own threads it makes no such promise
FORK = """
import os, signal, torch
from tunesmith.ops import linear, FrozenLinear, linear_nf4, quantize_nf4
torch.manual_seed(0)
large, weight = torch.randn(1 << 18), quantize_nf4(torch.randn(512, 768))
x, grad_y = torch.randn(40, 768, requires_grad=True), torch.randn(40, 512)
def use():
    y = linear_nf4(x, weight)
    results = y.detach(), *torch.autograd.grad(y, x, grad_y), quantize_nf4(large).packed
    return [result.numpy().tobytes() for result in results]
before = use()
child = os.fork()
if child == 0:
    signal.alarm(5)
    os._exit(0 if use() == before else 1)
print(os.waitpid(child, 0)[1], use() == before)
"""


def test_a_forked_child_calls_again_and_finishes(native: ModuleType, isa: str) -> None:
    done = run_apart("-c", FORK, TUNESMITH_ISA=isa)
    assert done.stdout == "0 True\n", done.stderr


def test_a_forked_child_finishes_after_its_parent_used_threads(native: ModuleType) -> None:
    done = run_apart("-c", FORK, OMP_NUM_THREADS="2")
    assert done.stdout == "0 True\n", done.stderr


def test_two_callers_at_once_get_what_one_gets(native: ModuleType, isa: str) -> None:
    layers = [random_layer(40 + i, 200, 90, seed=i, rank=8) for i in range(2)]
    grads_y = [random_like(layer.formula()[0]).to(layer.dtype) for layer in layers]

    def all_of(i: int) -> list[Tensor]:
        y, s = layers[i].forward(native)
        return [y, s, *layers[i].backward(native, s, grads_y[i])]

    alone = [all_of(i) for i in range(2)]

    def many_times(i: int) -> bool:
        return all(
            torch.equal(ours, expected)
            for _ in range(40)
            for ours, expected in zip(all_of(i), alone[i], strict=True)
        )

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(many_times, range(2))) == [True, True]


def test_the_number_of_threads_may_change_between_calls(native: ModuleType, isa: str) -> None:
    layers = [random_layer(*shape, seed=9, rank=6) for shape in ((300, 130, 90), (3, 512, 700))]
    before = torch.get_num_threads()
    try:
        for threads in (1, 3, 2, 7, 1):
            torch.set_num_threads(threads)
            for layer in layers:
                y, s = layer.forward(native)
                layer.assert_output_close(y, s, isa)
                grad_y = random_like(y)
                layer.assert_gradients_close(layer.backward(native, s, grad_y), s, grad_y, isa)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_that_fetch_the_scales_together_put_each_in_its_place(
    native: ModuleType, isa: str, dtype: torch.dtype
) -> None:
    def layer_of(tokens: int, in_features: int, out_features: int, seed: int) -> Layer:
        return random_layer(tokens, in_features, out_features, seed=seed, rank=4, dtype=dtype)

    seed = next(
        seed
        for seed in range(1000)
        if (probe := layer_of(1, 64, 1, seed)).quant_type and probe.blocksize == 64
    )
    layer = layer_of(20, 576, 1024, seed)  # 9,216 blocks
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, s = layer.forward(native)
            grad_y = random_like(y)
            layer.assert_gradients_close(layer.backward(native, s, grad_y), s, grad_y, isa)
    finally:
        torch.set_num_threads(before)


def test_with_tunesmith_native_0_the_layer_gives_the_same_in_pytorch() -> None:
    code = """
import torch
from tunesmith.ops import linear, FrozenLinear, linear_nf4, native_status, quantize_4bit
torch.manual_seed(0)
for kind in ("nf4", "fp4"):
    w = quantize_4bit(torch.randn(33, 75), quant_type=kind)
    x = torch.randn(5, 75, requires_grad=True)
    a, b = torch.randn(4, 75, requires_grad=True), torch.randn(33, 4, requires_grad=True)
    y = linear_nf4(x, w, torch.randn(33), (a, b, 0.5))
    y.square().sum().backward()
    print(native_status().loaded, *(f"{t.abs().sum():.4g}" for t in (y, x.grad, a.grad, b.grad)))
"""
    switched_off = run_apart("-c", code, TUNESMITH_NATIVE="0")
    assert switched_off.returncode == 0, switched_off.stderr
    lines = switched_off.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["False", "False"]
    if native_status().loaded:
        in_use = run_apart("-c", code).stdout.splitlines()
        assert [line.split()[1:] for line in in_use] == [line.split()[1:] for line in lines]


@pytest.mark.parametrize("shape", [(0, 64, 3), (2, 64, 0)])
def test_the_public_layer_takes_no_tokens_and_no_rows(
    isa: str, shape: tuple[int, int, int]
) -> None:
    tokens, in_features, out_features = shape
    x = torch.randn(tokens, in_features, requires_grad=True)
    weight = torch.randn(out_features, in_features)
    lora = (torch.randn(2, in_features), torch.randn(out_features, 2), 1.0)
    for y in (linear_nf4(x, quantize_4bit(weight), None, lora), lora_linear(x, weight, None, lora)):
        assert y.shape == (tokens, out_features)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert (grad == 0).all()
