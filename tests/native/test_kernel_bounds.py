"""Quantizing and dequantizing write what is theirs and not one byte beside it."""

from types import ModuleType

import pytest
import torch
from guards import Guarded
from layers import CODES

from tunesmith.ops import four_bit
from tunesmith.ops.dtypes import DTYPES
from tunesmith.ops.four_bit import QUANT_TYPES

SIZES = [*range(1, 514), 64 * 300 + 1]

# the code of 1.0 in both nibbles
ONES = {"nf4": 0xFF, "fp4": 0x33}


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantizing_writes_inside_its_buffers(
    native: ModuleType, isa: str, dtype: torch.dtype, blocksize: int, quant_type: str
) -> None:
    for numel in SIZES:
        weight = torch.randn(numel).to(dtype)
        blocks = -(-numel // blocksize)
        packed, absmax = Guarded((numel + 1) // 2), Guarded(4 * blocks)
        native.quantize_4bit(
            weight.data_ptr(),
            CODES[dtype],
            numel,
            blocksize,
            CODES[quant_type],
            packed.pointer,
            absmax.pointer,
            None,
        )
        assert packed.intact()
        assert absmax.intact()
        assert absmax.as_dtype(torch.float32).max() == weight.abs().max()


def test_double_quantizing_writes_inside_its_buffers(native: ModuleType) -> None:
    for blocks in range(1, 514):
        absmax, offset = torch.rand(blocks), torch.tensor(0.5)
        codes, nested = Guarded(blocks), Guarded(4 * -(-blocks // 256))
        native.quantize_absmax(
            absmax.data_ptr(), blocks, offset.data_ptr(), codes.pointer, nested.pointer, None
        )
        assert codes.intact()
        assert nested.intact()
        assert nested.as_dtype(torch.float32).max() == (absmax - offset).abs().max()


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantizing_writes_inside_its_buffer(
    native: ModuleType, isa: str, dtype: torch.dtype, blocksize: int, quant_type: str
) -> None:
    for numel in SIZES:
        packed = torch.full(((numel + 1) // 2,), ONES[quant_type], dtype=torch.uint8)
        absmax = torch.full((-(-numel // blocksize),), 2.0)
        out = Guarded(numel * dtype.itemsize)
        native.dequantize_4bit(
            packed.data_ptr(),
            absmax.data_ptr(),
            0,
            0,
            numel,
            blocksize,
            CODES[quant_type],
            CODES[dtype],
            out.pointer,
            None,
        )
        assert out.intact()
        assert (out.as_dtype(dtype) == 2.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_output_too_large_for_the_caches_is_written_inside_its_buffer(
    native: ModuleType, isa: str, dtype: torch.dtype
) -> None:
    numel = (1 << 24) // dtype.itemsize + 101
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(256, ((numel + 1) // 2,), dtype=torch.uint8, generator=generator)
    absmax = torch.randn(-(-numel // 64), generator=generator)
    expected = four_bit.reference_dequantize_4bit(
        packed, absmax, None, None, [numel], 64, "nf4", dtype
    )
    for misaligned in (0, 32, dtype.itemsize):
        out = Guarded(numel * dtype.itemsize, misaligned)
        native.dequantize_4bit(
            packed.data_ptr(),
            absmax.data_ptr(),
            0,
            0,
            numel,
            64,
            CODES["nf4"],
            CODES[dtype],
            out.pointer,
            None,
        )
        assert out.intact()
        assert torch.equal(out.as_dtype(dtype), expected)


def test_nothing_is_written_for_no_elements(native: ModuleType, isa: str) -> None:
    empty = Guarded(0)
    at, fp32, nf4 = empty.pointer, native.FLOAT32, native.NF4
    native.quantize_4bit(at, fp32, 0, 64, nf4, at, at, None)
    native.dequantize_4bit(at, at, 0, 0, 0, 64, nf4, fp32, at, None)
    assert empty.intact()
