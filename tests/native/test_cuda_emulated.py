"""The CUDA kernels, compiled for the CPU and run in emulation, agree with the reference.

No device is needed, and none is proved right: timing, the compiler nvcc and the memory model of a
GPU are not emulated. test_cuda.py is for a device.
"""

import ctypes
import math
import shutil
from pathlib import Path

import pytest
import torch
from emulation.device import CODES, CSRC, KERNELS, Device, EmulationError, Linear, build, int64
from torch import Tensor

from tunesmith.ops import four_bit
from tunesmith.ops.dtypes import DTYPES
from tunesmith.ops.four_bit import BLOCKSIZES, QUANT_TYPES
from tunesmith.ops.frozen import SMALL_TOKENS
from tunesmith.ops.tables import TABLES

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

Scales = tuple[Tensor, Tensor | None, Tensor | None]

# the order of the threads in a block: ascending, descending, shuffled
ORDERS = (0, 1, 7)


@pytest.fixture(scope="session")
def device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    folder = tmp_path_factory.mktemp("emulated")
    return Device(build(folder, [CSRC / "cuda" / f"{name}.cu" for name in KERNELS]))


@pytest.fixture(scope="session")
def narrow_device(tmp_path_factory: pytest.TempPathFactory) -> Device:
    """The kernels with grids of at most two blocks: each must stride over what is left."""
    folder = tmp_path_factory.mktemp("narrow")
    cuda = changed_kernels(folder, "launch.cuh", "kMaxGrid = 1 << 20", "kMaxGrid = 2")
    return Device(build(folder, [cuda / "quantize.cu", cuda / "dequantize.cu"]))


def changed_kernels(folder: Path, file: str, old: str, new: str) -> Path:
    """Copy the kernels, one text changed in one file, and return their folder."""
    shutil.copytree(CSRC, folder / "csrc", dirs_exist_ok=True)
    changed = folder / "csrc" / "cuda" / file
    text = changed.read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {file}"
    changed.write_text(text.replace(old, new))
    return changed.parent


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1000 * math.prod(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def scales_of(absmax: Tensor, nested: bool) -> Scales:
    return four_bit.reference_quantize_absmax(absmax) if nested else (absmax, None, None)


def check_quantize(
    device: Device, weight: Tensor, blocksize: int, type_: str, misaligned: tuple[str, ...] = ()
) -> None:
    packed, absmax = device.quantize_4bit(weight, blocksize, type_, misaligned=misaligned)
    expected_packed, expected_absmax = four_bit.reference_quantize_4bit(weight, blocksize, type_)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(bits(absmax), bits(expected_absmax))


def check_dequantize(
    device: Device,
    weight: Tensor,
    blocksize: int,
    type_: str,
    nested: bool,
    misaligned: tuple[str, ...] = (),
) -> None:
    packed, absmax = four_bit.reference_quantize_4bit(weight, blocksize, type_)
    scales, numel = scales_of(absmax, nested), weight.numel()
    out = device.dequantize_4bit(
        packed, scales, numel, blocksize, type_, weight.dtype, misaligned=misaligned
    )
    expected = four_bit.reference_dequantize_4bit(
        packed, *scales, [numel], blocksize, type_, weight.dtype
    )
    assert torch.equal(bits(out), bits(expected))


def check_linear(
    device: Device,
    tokens: int,
    in_features: int,
    out_features: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    adapter_dtype: torch.dtype = torch.float32,
    blocksize: int = 64,
    type_: str = "nf4",
    nested: bool = False,
    rank: int = 8,
    bias: bool = True,
    misaligned: tuple[str, ...] = (),
) -> None:
    weight = random(out_features, in_features, seed=1)
    # blocks of very different scales, so that a wrong one shows
    weight *= (
        torch.exp(random(out_features * in_features // 32 + 1, seed=2))
        .repeat_interleave(32)[: weight.numel()]
        .view_as(weight)
    )
    packed, absmax = four_bit.reference_quantize_4bit(weight, blocksize, type_)
    scales = scales_of(absmax, nested)
    x = random(tokens, in_features, dtype=dtype, seed=3)
    b = random(out_features, dtype=dtype, seed=4) if bias else None
    lora_a = random(rank, in_features, dtype=adapter_dtype, seed=5) if rank else None
    lora_b = random(out_features, rank, dtype=adapter_dtype, seed=6) if rank else None
    scaling = 0.7
    y, s = device.linear_small(
        x, packed, scales, out_features, blocksize, type_, b, lora_a, lora_b, scaling, misaligned
    )
    shape = (out_features, in_features)
    dense = four_bit.reference_dequantize_4bit(
        packed, *scales, shape, blocksize, type_, torch.float32
    )
    wide = x.double()
    terms = wide.abs() @ dense.double().abs().T  # [tokens, out_features]: what rounding scales with
    expected = wide @ dense.double().T
    if b is not None:
        expected += b.double()
    if rank:
        expected_s = wide @ lora_a.double().T
        size = wide.abs() @ lora_a.double().abs().T
        assert ((s.double() - expected_s).abs() <= 1e-6 * size).all()
        low_rank = torch.tensor(scaling).double() * lora_b.double()
        expected += expected_s @ low_rank.T
        terms += size @ low_rank.abs().T
    # half a unit in the last place of y, and what fp32 sums may lose
    limit = torch.finfo(dtype).eps / 2 * 1.01 * expected.abs() + 1e-6 * terms
    assert ((y.double() - expected).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("type_", QUANT_TYPES)
def test_quantized_codes_and_scales_are_the_same_bits(
    device: Device, type_: str, dtype: torch.dtype
) -> None:
    for blocksize in BLOCKSIZES:
        sizes = (1, blocksize - 1, blocksize, 3 * blocksize, 9 * blocksize + 37)
        for order, numel in zip((*ORDERS, *ORDERS), sizes, strict=False):
            device.set_order(order)
            check_quantize(device, random(numel, dtype=dtype), blocksize, type_)
    for blocksize in (64, 4096):
        weight = random(2 * blocksize + 33, dtype=dtype)
        for misaligned in ("weight", "packed"):
            check_quantize(device, weight, blocksize, type_, misaligned=(misaligned,))


@pytest.mark.parametrize("type_", QUANT_TYPES)
def test_quantizing_ties_zeros_and_denormals_gives_the_same_bits(
    device: Device, type_: str
) -> None:
    code = TABLES[type_][0].sort().values
    middle = (code[:-1] + code[1:]) / 2
    one = torch.ones(())
    around = torch.cat([middle, torch.nextafter(middle, one), torch.nextafter(middle, -one), code])
    weight = torch.cat([around, torch.zeros(64 - len(around))]).repeat(6)
    scales = torch.tensor([1.0, 0.0, 1e-38, 1e-45, 1e-40, 3.0])
    weight = (weight.view(6, 64) * scales[:, None]).view(-1)
    for dtype in DTYPES:
        check_quantize(device, weight.to(dtype), 64, type_)


def test_double_quantized_scales_are_the_same_bits(device: Device) -> None:
    for order, blocks in zip((*ORDERS, 0, 1), (1, 255, 256, 257, 4000), strict=True):
        device.set_order(order)
        absmax = random(blocks).abs()
        codes, nested_absmax, offset = four_bit.reference_quantize_absmax(absmax)
        ours = device.quantize_absmax(absmax, offset)
        assert torch.equal(ours[0], codes)
        assert torch.equal(bits(ours[1]), bits(nested_absmax))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("type_", QUANT_TYPES)
def test_dequantized_values_are_the_same_bits(
    device: Device, type_: str, dtype: torch.dtype, nested: bool
) -> None:
    for blocksize in BLOCKSIZES:
        sizes = (1, 7, blocksize, 9 * blocksize + 37, 300 * 64 + 1)
        for order, numel in zip((*ORDERS, *ORDERS), sizes, strict=False):
            device.set_order(order)
            weight = random(numel, dtype=dtype)
            check_dequantize(device, weight, blocksize, type_, nested)
    weight = random(1234, dtype=dtype)
    for misaligned in ("packed", "out"):
        check_dequantize(device, weight, 128, type_, nested, misaligned=(misaligned,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_rounding_of_a_16_bit_output_is_the_same(device: Device, dtype: torch.dtype) -> None:
    halves = torch.arange(-(2**15), 2**15, 41, dtype=torch.int32).to(torch.int16)
    ends = torch.cat(
        [bits(halves.view(dtype).float()) for dtype in (torch.float16, torch.bfloat16)]
    )
    offsets = (0, 1, -1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)
    scales = torch.cat([(ends + offset).view(torch.float32) for offset in offsets])
    scales = scales[scales.isfinite()].contiguous()
    packed = torch.full((len(scales) * 32,), 0xFF, dtype=torch.uint8)  # nf4's code of 1
    out = device.dequantize_4bit(packed, (scales, None, None), len(scales) * 64, 64, "nf4", dtype)
    expected = (scales + 0.0).to(dtype)
    assert torch.equal(bits(out.view(-1, 64)[:, 0].contiguous()), bits(expected))
    assert torch.equal(bits(out.view(-1, 64)[:, 63].contiguous()), bits(expected))


def test_a_grid_that_is_too_small_strides_over_the_rest(narrow_device: Device) -> None:
    for nested in (False, True):
        check_dequantize(narrow_device, random(64 * 1024 + 37), 64, "nf4", nested)
        check_dequantize(
            narrow_device, random(64 * 1024 + 5), 64, "fp4", nested, misaligned=("out",)
        )
    for blocksize in (64, 1024):
        check_quantize(narrow_device, random(48 * 1024 + 37), blocksize, "nf4")
        check_quantize(
            narrow_device, random(48 * 1024 + 37), blocksize, "fp4", misaligned=("packed",)
        )
    absmax = random(256 * 20 + 3).abs()
    codes, nested_absmax, offset = four_bit.reference_quantize_absmax(absmax)
    ours = narrow_device.quantize_absmax(absmax, offset)
    assert torch.equal(ours[0], codes)
    assert torch.equal(ours[1], nested_absmax)


@pytest.mark.parametrize("tokens", range(1, 17))
def test_a_linear_layer_for_each_small_number_of_tokens(device: Device, tokens: int) -> None:
    device.set_order(ORDERS[tokens % 3])
    dtype, adapter_dtype = DTYPES[tokens % 3], DTYPES[tokens // 3 % 3]
    for multiprocessors in (1, 132):  # four rows to a warp, two
        device.set_multiprocessors(multiprocessors)
        for nested in (False, True):
            check_linear(
                device, tokens, 1120, 30, dtype=dtype, adapter_dtype=adapter_dtype, nested=nested
            )
    device.set_multiprocessors(132)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=str)
def test_a_linear_layer_of_every_dtype(
    device: Device, adapter_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    for order, rank in zip(ORDERS, (1, 33, 70), strict=True):
        device.set_order(order)
        for in_features in (96, 75):  # by pieces, by elements
            check_linear(
                device, 3, in_features, 17, dtype=dtype, adapter_dtype=adapter_dtype, rank=rank
            )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("type_", QUANT_TYPES)
def test_a_linear_layer_of_every_type_and_block_size(
    device: Device, type_: str, nested: bool
) -> None:
    for blocksize in BLOCKSIZES:
        # rows begin inside blocks, and in the second at odd elements
        for in_features, out_features in ((608, 40), (101, 50)):
            check_linear(
                device,
                2,
                in_features,
                out_features,
                type_=type_,
                nested=nested,
                blocksize=blocksize,
            )


@pytest.mark.parametrize(
    ("tokens", "in_features"), [(1, 2 * 8192 + 544), (2, 4096 + 32), (4, 3 * 2048), (16, 3104)]
)
def test_a_linear_layer_whose_x_is_staged_in_parts(
    device: Device, tokens: int, in_features: int
) -> None:
    device.set_multiprocessors(1)
    for order in ORDERS:
        device.set_order(order)
        check_linear(device, tokens, in_features, 33, nested=True)
    device.set_multiprocessors(132)


def test_a_linear_layer_without_adapter_or_bias(device: Device) -> None:
    for tokens, in_features in ((1, 64), (5, 64), (5, 31)):
        check_linear(device, tokens, in_features, 9, rank=0)
        check_linear(device, tokens, in_features, 9, bias=False)
        check_linear(device, tokens, in_features, 9, rank=0, bias=False)


@pytest.mark.parametrize("what", ["x", "packed", "lora_a", "lora_b", "y"])
def test_a_linear_layer_with_a_misaligned_tensor(device: Device, what: str) -> None:
    for dtype in DTYPES:
        check_linear(
            device, 6, 160, 20, dtype=dtype, adapter_dtype=torch.bfloat16, misaligned=(what,)
        )


def test_a_linear_layer_is_at_most_two_launches_on_the_given_stream(device: Device) -> None:
    for tokens in (1, 7, 16):
        for rank, count in ((0, 1), (8, 2)):
            device.launches()
            check_linear(device, tokens, 2048, 40, rank=rank)
            launches, on_another_stream, shared_bytes = device.launches()
            assert (launches, on_another_stream) == (count, 0)
            assert shared_bytes <= 99 * 1024  # what a block of sm_86 and sm_89 can have


def test_what_the_kernels_do_not_take_is_an_error(device: Device) -> None:
    with pytest.raises(EmulationError, match="invalid argument"):
        check_linear(device, 17, 64, 8)
    assert device.lib.tunesmith_small_tokens() == SMALL_TOKENS == 16


# Of the grids that follow only the last block is run, and only what it touches takes up memory.
HUGE = 2**31


def test_dequantizing_past_the_first_2_to_31_elements(device: Device) -> None:
    block, rest = HUGE // 4096, 8 * 500 + 3
    numel, start = HUGE + rest, HUGE  # 4096 elements to a block
    tail = torch.arange((rest + 1) // 2).mul(11).to(torch.uint8)
    scale = torch.tensor([3.0])
    with device.buffers() as put:
        packed, absmax = put.space((numel + 1) // 2), put.space(-(-numel // 4096) * 4)
        out = put.space(numel * 2)
        put.write(packed, tail, start // 2)
        put.write(absmax, scale, start // 4096 * 4)
        for only in (block, 0):  # the three that fill no vector are the first block's
            with device.only_block(only):
                device.call(
                    "tunesmith_dequantize_4bit_cuda",
                    *(packed, absmax, None, None, *int64(numel, 4096), CODES["nf4"]),
                    *(CODES[torch.bfloat16], out),
                )
        ours = put.read(out, torch.bfloat16, start * 2)
    args = ([rest], 4096, "nf4", torch.bfloat16)
    assert torch.equal(ours, four_bit.reference_dequantize_4bit(tail, scale, None, None, *args))


def test_quantizing_past_the_first_2_to_31_elements(device: Device) -> None:
    block, rest = HUGE // 32768, 3 * 4096  # a warp to 4096 elements
    weight = random(rest, dtype=torch.bfloat16)
    with device.buffers() as put, device.only_block(block):
        space, packed = put.space((HUGE + rest) * 2), put.space((HUGE + rest) // 2)
        absmax = put.space((HUGE + rest) // 4096 * 4)
        put.write(space, weight, HUGE * 2)
        device.call(
            "tunesmith_quantize_4bit_cuda",
            *(space, CODES[torch.bfloat16], *int64(HUGE + rest, 4096), CODES["nf4"]),
            *(packed, absmax),
        )
        ours = (
            put.read(packed, torch.uint8, HUGE // 2),
            put.read(absmax, torch.float32, HUGE // 4096 * 4),
        )
    expected = four_bit.reference_quantize_4bit(weight, 4096, "nf4")
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


@pytest.mark.parametrize(("in_features", "rows"), [(16416, 16), (16415, 8)])
def test_a_linear_layer_of_more_than_2_to_31_weights(
    device: Device, in_features: int, rows: int
) -> None:
    out_features = 2**17 + rows  # rows to a block
    first = 2**17 * in_features
    x, y_dtype = random(1, in_features), torch.float32
    tail = random(rows * in_features // 2).mul(40).to(torch.int8).view(torch.uint8)
    with device.buffers() as put, device.only_block(2**17 // rows):
        packed = put.space(out_features * in_features // 2)
        absmax = put.space(-(-out_features * in_features // 4096) * 4)
        y = put.space(out_features * 4)
        put.write(packed, tail, first // 2)
        scales = random((out_features * in_features - 1) // 4096 - first // 4096 + 1)
        put.write(absmax, scales, first // 4096 * 4)
        linear = Linear(
            *(1, in_features, out_features, CODES[y_dtype], CODES["nf4"], packed, absmax),
            *(None, None, 4096, None, 0, 0, None, None, 1.0, None, 1.0),
        )
        device.call("tunesmith_linear_small_cuda", ctypes.byref(linear), put.copy(x), None, y)
        ours = put.read(y, y_dtype, 2**17 * 4)
    # 2^17 rows are whole blocks
    shape = (rows, in_features)
    dense = four_bit.reference_dequantize_4bit(
        tail, scales, None, None, shape, 4096, "nf4", torch.float32
    )
    expected = (x.double() @ dense.double().T)[0]
    terms = (x.double().abs() @ dense.double().abs().T)[0]
    assert ((ours - expected).abs() <= 1e-6 * terms).all()
