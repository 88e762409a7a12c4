"""The kernels, each instruction set forced, give the very bits of the PyTorch implementation."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.ops import (
    FP4Weight,
    NF4Weight,
    Weight4Bit,
    dequantize_4bit,
    four_bit,
    quantize_4bit,
)
from tunesmith.ops.dtypes import DTYPES
from tunesmith.ops.four_bit import BLOCKSIZES, QUANT_TYPES
from tunesmith.ops.tables import TABLES

pytestmark = pytest.mark.usefixtures("isa")


def random_weight(numel: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator).to(dtype)


def by_reference(
    weight: Tensor, blocksize: int, nested: bool, quant_type: str = "nf4"
) -> Weight4Bit:
    packed, absmax = four_bit.reference_quantize_4bit(weight, blocksize, quant_type)
    nested_absmax = nested_offset = None
    if nested:
        absmax, nested_absmax, nested_offset = four_bit.reference_quantize_absmax(absmax)
    kind = NF4Weight if quant_type == "nf4" else FP4Weight
    return kind(packed, absmax, nested_absmax, nested_offset, weight.shape, weight.dtype, blocksize)


def dequantized_by_reference(w: Weight4Bit, dtype: torch.dtype) -> Tensor:
    parts = (w.packed, w.absmax, w.nested_absmax, w.nested_offset)
    return four_bit.reference_dequantize_4bit(*parts, w.shape, w.blocksize, w.quant_type, dtype)


def bits(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def assert_same(weight: Tensor, blocksize: int, nested: bool, quant_type: str) -> None:
    ours = quantize_4bit(weight, blocksize, nested, quant_type=quant_type)
    expected = by_reference(weight, blocksize, nested, quant_type)
    assert torch.equal(ours.packed, expected.packed)
    assert torch.equal(ours.absmax, expected.absmax)
    if nested:
        assert torch.equal(bits(ours.nested_absmax), bits(expected.nested_absmax))
        assert torch.equal(bits(ours.nested_offset), bits(expected.nested_offset))
    for dtype in DTYPES:
        out = dequantize_4bit(ours, dtype)
        assert out.dtype == dtype
        assert torch.equal(bits(out), bits(dequantized_by_reference(expected, dtype)))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_up_to_513_is_the_same(dtype: torch.dtype, quant_type: str) -> None:
    for numel in range(514):
        nested = numel // 2 % 2 == 1
        assert_same(random_weight(numel, dtype, seed=numel), 64, nested, quant_type)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_block_size_is_the_same_with_and_without_a_short_block(
    blocksize: int, nested: bool, quant_type: str
) -> None:
    for dtype in DTYPES:
        for numel in (1, blocksize - 1, blocksize, blocksize + 1, 3 * blocksize + blocksize // 2):
            assert_same(random_weight(numel, dtype), blocksize, nested, quant_type)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_a_weight_of_many_groups_is_the_same(nested: bool, quant_type: str) -> None:
    assert_same(random_weight(64 * 1000 + 37, torch.bfloat16), 64, nested, quant_type)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=200),
    dtype=st.sampled_from(DTYPES),
    nested=st.booleans(),
    quant_type=st.sampled_from(QUANT_TYPES),
)
def test_any_values_are_the_same(
    values: list[float], dtype: torch.dtype, nested: bool, quant_type: str
) -> None:
    weight = torch.tensor(values).to(dtype)
    if weight.isfinite().all():
        assert_same(weight, 64, nested, quant_type)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_on_and_beside_each_midpoint_are_the_same(
    dtype: torch.dtype, quant_type: str
) -> None:
    code = TABLES[quant_type][0].sort().values
    middle = (code[:-1] + code[1:]) / 2
    one = torch.ones(())
    around = [middle, torch.nextafter(middle, one), torch.nextafter(middle, -one), code]
    weight = torch.cat([torch.cat(around), torch.zeros(3)])[:64]
    assert weight.abs().max() == 1
    assert_same(weight.to(dtype), 64, nested=False, quant_type=quant_type)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_zeros_and_of_denormals_are_the_same(dtype: torch.dtype, quant_type: str) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    weight = random_weight(64 * 8, torch.float32)
    scales = torch.tensor([0.0, 1.0, tiny, tiny / 4, tiny / 64, 1e-38, 1e-30, 0.0])
    weight = (weight.view(8, 64).clamp(-1, 1) * scales[:, None]).to(dtype)
    for nested in (False, True):
        assert_same(weight, 64, nested, quant_type)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_rounding_of_a_16_bit_output_is_the_same(dtype: torch.dtype) -> None:
    # code 15 stands for 1.0, so a block's scale is what comes out: every fp16 number, and what lies
    # halfway to the next, and right beside that
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = torch.cat([halves.view(torch.float16).float(), halves.view(torch.bfloat16).float()])
    numbers = numbers[numbers.isfinite()]
    ends = bits(numbers)
    offsets = (0, 1, -1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001)
    scales = torch.cat([(ends + offset).view(torch.float32) for offset in offsets])
    scales = scales[scales.isfinite()][::7].contiguous()
    packed = torch.full((len(scales) * 32,), 0xFF, dtype=torch.uint8)
    shape = (len(scales), 64)
    args = (packed, scales, None, None, shape, 64, "nf4", dtype)
    ours = torch.ops.tunesmith.dequantize_4bit(*args)
    expected = (scales + 0.0).to(dtype)  # [blocks]; a product is never -0
    assert torch.equal(bits(ours[:, 0].contiguous()), bits(expected))
    assert torch.equal(bits(ours[:, 63].contiguous()), bits(expected))


def test_a_transposed_expanded_or_strided_weight_is_taken_by_its_logical_order() -> None:
    base = random_weight(96 * 130, torch.float32).view(96, 130)
    for weight in (base.t(), base[::2, 1::3], base[0].expand(64, 130), base[:, 5]):
        assert not weight.is_contiguous()
        ours, expected = quantize_4bit(weight), quantize_4bit(weight.contiguous())
        assert torch.equal(ours.packed, expected.packed)
        assert torch.equal(ours.absmax, expected.absmax)
        assert ours.shape == weight.shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_are_found_wherever_they_stand(dtype: torch.dtype, bad: float) -> None:
    for position in (0, 63, 64, 100, 191, 192, 197):
        weight = random_weight(198, dtype)
        weight[position] = bad
        with pytest.raises(OpError, match=rf"q_proj: block {position // 64} .*holds NaN or Inf"):
            quantize_4bit(weight, name="q_proj")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(threads: int) -> None:
    weight = random_weight(64 * 4096 + 11, torch.float16)
    expected = by_reference(weight, 64, nested=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = quantize_4bit(weight, nested=False)
        out = dequantize_4bit(ours)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(ours.packed, expected.packed)
    assert torch.equal(ours.absmax, expected.absmax)
    assert torch.equal(out, dequantized_by_reference(expected, torch.float16))


def test_two_callers_at_once_do_not_disturb_each_other() -> None:
    weights = [random_weight(64 * 1024 + 5 * i, torch.bfloat16, seed=i) for i in range(2)]
    expected = [by_reference(weight, 64, nested=True) for weight in weights]

    def many_times(i: int) -> bool:
        same = True
        for _ in range(20):
            w = quantize_4bit(weights[i])
            same &= torch.equal(w.packed, expected[i].packed)
            same &= torch.equal(
                dequantize_4bit(w), dequantized_by_reference(expected[i], torch.bfloat16)
            )
        return same

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(many_times, range(2))) == [True, True]
