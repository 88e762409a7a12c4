"""The kernels write what is theirs and not one byte beside it."""

from types import ModuleType

import pytest
import torch

GUARD = 64
PATTERN = 0xA5
SIZES = [*range(1, 140), 511, 512, 513, 64 * 300 + 1]


class Guarded:
    """`size` bytes between two guards."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes = torch.full((size + 2 * GUARD,), PATTERN, dtype=torch.uint8)

    @property
    def pointer(self) -> int:
        return self.bytes.data_ptr() + GUARD

    def as_dtype(self, dtype: torch.dtype) -> torch.Tensor:
        return self.bytes[GUARD : GUARD + self.size].clone().view(dtype)

    def intact(self) -> bool:
        guards = torch.cat([self.bytes[:GUARD], self.bytes[GUARD + self.size :]])
        return bool((guards == PATTERN).all())


@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("half", [False, True])
def test_quantizing_writes_inside_its_buffers(
    native: ModuleType, isa: str, blocksize: int, half: bool
) -> None:
    for numel in SIZES:
        weight = torch.randn(numel).to(torch.float16 if half else torch.float32)
        blocks = -(-numel // blocksize)
        packed, absmax = Guarded((numel + 1) // 2), Guarded(4 * blocks)
        dtype = native.FLOAT16 if half else native.FLOAT32
        native.quantize_nf4(
            weight.data_ptr(), dtype, numel, blocksize, packed.pointer, absmax.pointer, None
        )
        assert packed.intact()
        assert absmax.intact()
        assert absmax.as_dtype(torch.float32).max() == weight.abs().max()


def test_double_quantizing_writes_inside_its_buffers(native: ModuleType) -> None:
    for blocks in (1, 2, 255, 256, 257, 600):
        absmax, offset = torch.rand(blocks), torch.tensor(0.5)
        codes, nested = Guarded(blocks), Guarded(4 * -(-blocks // 256))
        native.quantize_absmax(
            absmax.data_ptr(), blocks, offset.data_ptr(), codes.pointer, nested.pointer, None
        )
        assert codes.intact()
        assert nested.intact()
        assert nested.as_dtype(torch.float32).max() == (absmax - offset).abs().max()


@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("half", [False, True])
def test_dequantizing_writes_inside_its_buffer(
    native: ModuleType, isa: str, blocksize: int, half: bool
) -> None:
    for numel in SIZES:
        packed = torch.full(((numel + 1) // 2,), 0xFF, dtype=torch.uint8)
        absmax = torch.full((-(-numel // blocksize),), 2.0)
        out = Guarded(numel * (2 if half else 4))
        native.dequantize_nf4(
            packed.data_ptr(),
            absmax.data_ptr(),
            0,
            0,
            numel,
            blocksize,
            native.BFLOAT16 if half else native.FLOAT32,
            out.pointer,
            None,
        )
        assert out.intact()
        assert (out.as_dtype(torch.bfloat16 if half else torch.float32) == 2.0).all()


def test_nothing_is_written_for_no_elements(native: ModuleType, isa: str) -> None:
    empty = Guarded(0)
    at = empty.pointer
    native.quantize_nf4(at, native.FLOAT32, 0, 64, at, at, None)
    native.dequantize_nf4(at, at, 0, 0, 0, 64, native.FLOAT32, at, None)
    assert empty.intact()
