"""The PyTorch implementation gives what bitsandbytes gives: codes, scales, and values back.

bitsandbytes divides the last, short block by its absmax and multiplies every other by the inverse;
here all are multiplied, as its CUDA kernels do. Sizes with a short block below are ones where that
makes no difference.
"""

import pytest
import torch
from torch import Tensor

from tunesmith.ops import four_bit, tables
from tunesmith.ops.dtypes import DTYPES
from tunesmith.ops.four_bit import BLOCKSIZES

bnb = pytest.importorskip("bitsandbytes.functional")

quant_types = pytest.mark.parametrize("quant_type", four_bit.QUANT_TYPES)


def random_weight(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def by_bitsandbytes(weight: Tensor, blocksize: int, quant_type: str, nested: bool = False):
    packed, state = bnb.quantize_4bit(
        weight, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
    )
    return packed.flatten(), state


@quant_types
def test_the_16_values_are_the_same(quant_type: str) -> None:
    code, order = tables.TABLES[quant_type]
    assert torch.equal(code, bnb.get_4bit_type(quant_type, device="cpu"))
    assert (code[order.int()].diff() >= 0).all()
    assert order.sort().values.tolist() == list(range(16))


def test_the_dynamic_map_is_the_same() -> None:
    # bitsandbytes gets its map from torch.linspace, whose last bit is the CPU's: it is equal with
    # FMA, and one unit in the last place away without
    theirs = bnb.create_dynamic_map()
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert torch.equal(tables.DYNAMIC_MAP, theirs)
    torch.testing.assert_close(tables.DYNAMIC_MAP, theirs, rtol=1.3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@quant_types
def test_codes_and_absmax_are_the_same(quant_type: str, blocksize: int, dtype: torch.dtype) -> None:
    weight = random_weight(37, 4096, dtype=dtype)
    packed, absmax = four_bit.reference_quantize_4bit(weight, blocksize, quant_type)
    theirs, state = by_bitsandbytes(weight, blocksize, quant_type)
    assert torch.equal(packed, theirs)
    assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("numel", [1, 2, 3, 63, 65, 127, 130, 513])
@quant_types
def test_a_short_block_and_the_nibble_beside_an_odd_last_element_are_the_same(
    quant_type: str, numel: int
) -> None:
    weight = random_weight(numel, seed=numel)
    packed, absmax = four_bit.reference_quantize_4bit(weight, 64, quant_type)
    theirs, state = by_bitsandbytes(weight, 64, quant_type)
    assert torch.equal(packed, theirs)
    assert torch.equal(absmax, state.absmax)


@quant_types
def test_values_on_and_beside_each_midpoint_get_the_same_codes(quant_type: str) -> None:
    code = tables.TABLES[quant_type][0].sort().values
    middle = (code[:-1] + code[1:]) / 2
    above, below = torch.nextafter(middle, torch.ones(())), torch.nextafter(middle, -torch.ones(()))
    weight = torch.cat([middle, above, below, code, torch.tensor([0.0, -0.0, 1e-30])])
    packed, _ = four_bit.reference_quantize_4bit(weight, 64, quant_type)
    assert torch.equal(packed, by_bitsandbytes(weight, 64, quant_type)[0])


@quant_types
def test_a_block_of_zeros_gets_the_same_codes(quant_type: str) -> None:
    for zeros in (torch.zeros(64), -torch.zeros(64)):
        packed, _ = four_bit.reference_quantize_4bit(zeros, 64, quant_type)
        assert torch.equal(packed, by_bitsandbytes(zeros, 64, quant_type)[0])
        assert (packed == (0x77 if quant_type == "nf4" else 0x00)).all()


@quant_types
def test_denormal_blocks_get_the_same_codes(quant_type: str) -> None:
    scales = torch.tensor([1e-37, 1.2e-38, 1e-38, 5e-39, 2.9e-39, 1e-40, 1e-45, 0.0])
    weight = random_weight(8, 64).clamp(-1, 1) * scales[:, None]
    packed, absmax = four_bit.reference_quantize_4bit(weight, 64, quant_type)
    theirs, state = by_bitsandbytes(weight, 64, quant_type)
    assert torch.equal(packed, theirs)
    assert torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
@quant_types
def test_dequantized_values_are_the_same(
    quant_type: str, blocksize: int, dtype: torch.dtype
) -> None:
    weight = random_weight(37, 4096, dtype=dtype)
    packed, state = by_bitsandbytes(weight, blocksize, quant_type)
    ours = four_bit.reference_dequantize_4bit(
        packed, state.absmax, None, None, weight.shape, blocksize, quant_type, dtype
    )
    assert torch.equal(ours, bnb.dequantize_4bit(packed.unsqueeze(1), state))


@quant_types
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_16_codes_stand_for_the_same_values(dtype: torch.dtype, quant_type: str) -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(2)
    absmax = random_weight(16).abs()
    code = bnb.get_4bit_type(quant_type, device="cpu")
    # bitsandbytes 0.50.2 has two implementations, and the first, where it runs AVX-512, gets other
    # values when a block reaches from one row into the next
    for shape in ((16, 64), (31, 33)):
        numel = shape[0] * shape[1]
        held = packed[: (numel + 1) // 2]
        state = bnb.QuantState(absmax, torch.Size(shape), code, 64, quant_type, dtype)
        ours = four_bit.reference_dequantize_4bit(
            held, absmax[: -(-numel // 64)], None, None, shape, 64, quant_type, dtype
        )
        assert torch.equal(ours, bnb.dequantize_4bit(held.unsqueeze(1), state))


@quant_types
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantized_values_are_the_same_when_nested(dtype: torch.dtype, quant_type: str) -> None:
    weight = random_weight(37, 4096, dtype=dtype)
    packed, state = by_bitsandbytes(weight, 64, quant_type, nested=True)
    ours = four_bit.reference_dequantize_4bit(
        packed, state.absmax, state.state2.absmax, state.offset, weight.shape, 64, quant_type, dtype
    )
    assert torch.equal(ours, bnb.dequantize_4bit(packed.unsqueeze(1), state))


def test_nested_scale_and_offset_are_the_same() -> None:
    weight = random_weight(64 * 1000, dtype=torch.bfloat16)
    _, absmax = four_bit.reference_quantize_4bit(weight, 64, "nf4")
    _, nested_absmax, offset = four_bit.reference_quantize_absmax(absmax)
    _, state = by_bitsandbytes(weight, 64, "nf4", nested=True)
    assert torch.equal(offset, state.offset)
    assert torch.equal(nested_absmax, state.state2.absmax)


def test_nested_codes_are_the_nearest_where_bitsandbytes_on_cpu_errs_in_a_few() -> None:
    absmax = random_weight(65536).abs() + 2
    codes, nested_absmax, offset = four_bit.reference_quantize_absmax(absmax)
    theirs, _ = bnb.quantize_blockwise(absmax - offset, blocksize=256)

    inverse = 1 / nested_absmax.repeat_interleave(256)
    scaled = (absmax - offset) * inverse
    # in float64, to which fp32 rounding is nothing: no code is nearer than the one that was taken
    table = tables.DYNAMIC_MAP.double()
    distance = (scaled.double()[:, None] - table).abs()  # [65536, 256]
    taken = distance.gather(1, codes.long()[:, None]).squeeze(1)
    assert (taken - distance.min(dim=1).values).max() < 1e-8

    # their kernel looks the code up in a coarse table, and errs where a step of it holds a midpoint
    wrong = codes != theirs
    assert 0 < wrong.sum() < 400
    theirs_taken = distance.gather(1, theirs.long()[:, None]).squeeze(1)
    assert (taken[wrong] < theirs_taken[wrong]).all()
    assert (theirs_taken - taken).max() < 1e-4


@quant_types
def test_the_size_of_a_chunk_does_not_matter(
    quant_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random_weight(64 * 300 + 7)
    packed, absmax = four_bit.reference_quantize_4bit(weight, 64, quant_type)
    nested = four_bit.reference_quantize_absmax(absmax)
    args = (weight.shape, 64, quant_type, torch.float32)
    values = four_bit.reference_dequantize_4bit(packed, *nested, *args)
    monkeypatch.setattr(four_bit, "_CHUNK", 4096)
    again, absmax_again = four_bit.reference_quantize_4bit(weight, 64, quant_type)
    assert torch.equal(packed, again)
    assert torch.equal(absmax, absmax_again)
    monkeypatch.setattr(four_bit, "_CHUNK", 256)
    for part, part_again in zip(nested, four_bit.reference_quantize_absmax(absmax), strict=True):
        assert torch.equal(part, part_again)
    # 4 blocks a chunk: chunks begin inside a group of 256 scales
    assert torch.equal(values, four_bit.reference_dequantize_4bit(packed, *nested, *args))
