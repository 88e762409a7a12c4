"""Norms, gated units, rotary embedding and log-probabilities of CUDA, emulated on the CPU.

What is worked out element by element has the bits of the CPU's kernels, with which it shares its
formulas; what is summed up is compared with sums in double precision.
"""

import shutil
from types import ModuleType

import pytest
import torch
from emulation.device import ACTIVATIONS, CSRC, Device, build
from test_cuda_emulated import ORDERS, bits, changed_kernels, random

from tunesmith.ops.dtypes import DTYPES

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

ops = torch.ops.tunesmith

# by elements; by vectors, a warp to a row; by vectors, a block to a row
COLUMNS = (1, 33, 40, 576, 1032, 1028, 2056)


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    folder = tmp_path_factory.mktemp("elementwise")
    return Device(build(folder, [CSRC / "cuda" / "elementwise.cu"]))


@pytest.fixture(scope="session")
def narrow_device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    """The kernels with grids of at most two blocks: each must stride over what is left."""
    folder = tmp_path_factory.mktemp("narrow-elementwise")
    cuda = changed_kernels(folder, "launch.cuh", "kMaxGrid = 1 << 20", "kMaxGrid = 2")
    return Device(build(folder, [cuda / "elementwise.cu"]))


def check_norm(
    device: Device,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    from_one: bool,
    misaligned: bool = False,
) -> None:
    x, grad_y = (random(rows, columns, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = random(columns, dtype=dtype, seed=3)
    eps = 1e-3
    y, scale = device.rms_norm(x, weight, eps, from_one, misaligned)
    wide, of_weight = x.double(), weight.double() + from_one
    exact_scale = torch.rsqrt(wide.pow(2).mean(-1) + eps)
    assert torch.allclose(scale.double(), exact_scale, rtol=1e-6, atol=0)
    expected = wide * exact_scale[:, None] * of_weight
    unit = torch.finfo(dtype).eps * 1.01 + 1e-6
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of subnormal numbers
    room = unit * expected.abs() + step * (1 + of_weight.abs())
    assert ((y.double() - expected).abs() <= room).all()

    grad_x = device.rms_norm_backward(grad_y, x, weight, scale, from_one, misaligned)
    inflow, of_scale = grad_y.double() * of_weight, scale.double()[:, None]
    along = (inflow * wide).mean(-1, keepdim=True) * of_scale.pow(2)
    size = (inflow * wide).abs().mean(-1, keepdim=True) * of_scale.pow(2)
    expected = of_scale * (inflow - wide * along)
    terms = of_scale * (inflow.abs() + wide.abs() * size)
    room = unit * terms + step * (1 + of_scale * (1 + wide.abs() * size))
    assert ((grad_x.double() - expected).abs() <= room).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("from_one", [False, True])
def test_norms(device: Device, from_one: bool, dtype: torch.dtype) -> None:
    for number, columns in enumerate(COLUMNS):
        device.set_order(ORDERS[number % 3])
        check_norm(device, 11, columns, dtype, from_one)
    check_norm(device, 3, 64, dtype, from_one, misaligned=True)


def check_gated(
    device: Device, numel: int, activation: str, dtype: torch.dtype, misaligned: bool = False
) -> None:
    gate, up, grad_y = (random(numel, dtype=dtype, seed=seed) * 4 for seed in (1, 2, 3))
    y = device.gated(gate, up, activation, misaligned)
    assert torch.equal(bits(y), bits(ops.gated(gate, up, activation)))
    ours = device.gated_backward(grad_y, gate, up, activation, misaligned)
    for mine, of_cpu in zip(ours, ops.gated_backward(grad_y, gate, up, activation), strict=True):
        assert torch.equal(bits(mine), bits(of_cpu))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_units(
    device: Device, activation: str, dtype: torch.dtype, native: ModuleType
) -> None:
    for number, numel in enumerate((1, 7, 8, 4096, 4099, 3 * 2048 + 8)):
        device.set_order(ORDERS[number % 3])
        check_gated(device, numel, activation, dtype)
    check_gated(device, 64, activation, dtype, misaligned=True)


def check_rotary(
    device: Device,
    rows: int,
    tokens: int,
    heads: int,
    size: int,
    dtype: torch.dtype,
    misaligned: bool = False,
) -> None:
    x = random(rows, tokens, heads, size, dtype=dtype, seed=1)
    for of_rows in (1, rows):
        cos, sin = (random(of_rows, tokens, size, dtype=dtype, seed=seed) for seed in (2, 3))
        flat = (x.flatten(0, 1), cos.flatten(0, 1), sin.flatten(0, 1))
        for backward in (False, True):
            out = device.rotary(*flat, backward, misaligned)
            of_cpu = ops.rotary(x, cos, sin, backward)
            assert torch.equal(bits(out), bits(of_cpu.flatten(0, 1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_embeddings(device: Device, dtype: torch.dtype, native: ModuleType) -> None:
    for number, size in enumerate((2, 6, 16, 64, 128)):
        device.set_order(ORDERS[number % 3])
        check_rotary(device, 2, 5, 3, size, dtype)
    check_rotary(device, 2, 3, 2, 32, dtype, misaligned=True)


def check_logps(
    device: Device, rows: int, columns: int, dtype: torch.dtype, misaligned: bool = False
) -> None:
    logits = random(rows, columns, dtype=dtype, seed=1) * 8
    labels = torch.arange(rows) * 37 % columns
    shares = logits.double().log_softmax(-1)
    expected = shares.gather(1, labels[:, None])[:, 0]
    onehot = torch.nn.functional.one_hot(labels, columns)
    for slopes in (False, True):
        logps, left = device.logps(logits, labels, slopes, misaligned)
        limit = 1e-6 * (1 + logits.abs().amax(-1).double() + expected.abs())
        assert ((logps.double() - expected).abs() <= limit).all()
        if slopes:
            slope = onehot - shares.exp()
            unit = torch.finfo(dtype).eps * 1.01 + 1e-5
            tiny = torch.finfo(dtype).smallest_normal
            assert ((left.double() - slope).abs() <= unit * slope.abs() + 2e-6 + tiny).all()
        else:
            assert torch.equal(left, logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities(device: Device, dtype: torch.dtype) -> None:
    for number, columns in enumerate((1, 2, 17, 1000, 4096, 4100, 9000)):
        device.set_order(ORDERS[number % 3])
        check_logps(device, 4, columns, dtype)
    check_logps(device, 4, 64, dtype, misaligned=True)


def test_log_probabilities_of_what_is_no_label_and_of_extremes(device: Device) -> None:
    logits = torch.zeros(3, 16)
    logps, left = device.logps(logits, torch.tensor([-100, 16, 3]), slopes=True)
    assert logps.isnan().tolist() == [True, True, False]
    assert left.isfinite().all()  # the loss says it, not every gradient of the row
    for row, expected in (
        ([1e30, 0.0, 0.0], [0.0, -1e30, -1e30]),
        ([-1e30, 0.0, -torch.inf], [-1e30, 0.0, -torch.inf]),
        ([88.0, 90.0, -500.0], torch.tensor([88.0, 90.0, -500.0]).log_softmax(-1).tolist()),
    ):
        for label in range(3):
            logps, _ = device.logps(torch.tensor([row]), torch.tensor([label]), slopes=False)
            assert torch.allclose(logps[0], torch.tensor(expected[label]), rtol=1e-6, atol=1e-6)
    for bad in (torch.nan, torch.inf):
        logps, _ = device.logps(torch.tensor([[0.0, bad, 1.0]]), torch.tensor([0]), slopes=False)
        assert logps.isnan().all()


def test_nan_is_kept(device: Device) -> None:
    for dtype in DTYPES:
        x = random(2, 64, dtype=dtype)
        x[0, 5] = torch.nan
        y, _ = device.rms_norm(x, torch.ones(64, dtype=dtype), 1e-6, False)
        assert y[0].isnan().all()
        assert y[1].isfinite().all()
        y = device.gated(x.flatten(), torch.ones(128, dtype=dtype), "silu")
        assert y.isnan().sum() == 1


def test_a_grid_that_is_too_small_strides_over_the_rest(
    narrow_device: Device, native: ModuleType
) -> None:
    dtype = torch.bfloat16
    for columns in (33, 64, 1032):
        check_norm(narrow_device, 50, columns, dtype, False)
    check_gated(narrow_device, 8 * 2000, "silu", dtype)
    check_gated(narrow_device, 2001, "silu", dtype)
    check_rotary(narrow_device, 3, 40, 9, 16, dtype)
    check_logps(narrow_device, 9, 1000, dtype)


def test_each_is_one_launch_on_the_given_stream(device: Device) -> None:
    x, weight = random(4, 64), random(64)
    for call in (
        lambda: device.rms_norm(x, weight, 1e-6, False),
        lambda: device.rms_norm_backward(x, x, weight, random(4), False),
        lambda: device.gated(x, x, "silu"),
        lambda: device.gated_backward(x, x, x, "silu"),
        lambda: device.rotary(x.view(2, 2, 64), x, x, False),
        lambda: device.logps(x, torch.zeros(4, dtype=torch.int64), True),
    ):
        device.launches()
        call()
        assert device.launches()[:2] == (1, 0)


def test_nothing_is_nothing(device: Device) -> None:
    none = torch.empty(0, 8)
    device.launches()
    device.rms_norm(none, torch.ones(8), 1e-6, False)
    device.gated(none.flatten(), none.flatten(), "silu")
    device.rotary(torch.empty(0, 2, 8), torch.ones(1, 8), torch.ones(1, 8), False)
    device.logps(none, torch.empty(0, dtype=torch.int64), True)
    assert device.launches()[0] == 0
