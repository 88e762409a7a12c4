"""The CUDA kernels give the very bits of the PyTorch implementation on the CPU."""

from types import ModuleType

import pytest
import torch

from tunesmith.errors import OpError
from tunesmith.ops import reference
from tunesmith.ops.schema import DTYPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(autouse=True)
def cuda_kernels(native: ModuleType) -> None:
    if not native.has_cuda():
        pytest.skip("this build has no CUDA kernels")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_codes_scales_and_values_are_the_same(blocksize: int, dtype: torch.dtype) -> None:
    ops = torch.ops.tunesmith
    for numel in (0, 1, 63, 64, 65, 513, 64 * 1000 + 37):
        weight = torch.randn(numel).to(dtype)
        packed, absmax = reference.quantize_nf4(weight, blocksize)
        on_gpu = ops.quantize_nf4(weight.cuda(), blocksize)
        assert torch.equal(on_gpu[0].cpu(), packed)
        assert torch.equal(on_gpu[1].cpu(), absmax)
        # the mean, and with it the codes, may differ in the last bit from device to device, so
        # double quantization is compared on the way back
        nested = reference.quantize_absmax(absmax)
        for parts in ((absmax, None, None), nested):
            args = ([numel], blocksize, dtype)
            values = reference.dequantize_nf4(packed, *parts, *args)
            moved = [part if part is None else part.cuda() for part in parts]
            assert torch.equal(ops.dequantize_nf4(packed.cuda(), *moved, *args).cpu(), values)


def test_absmax_codes_are_the_nearest_to_what_the_device_took_for_the_mean() -> None:
    absmax = torch.rand(1000) + 0.5
    codes, nested_absmax, offset = torch.ops.tunesmith.quantize_absmax(absmax.cuda())
    scales = nested_absmax.cpu().repeat_interleave(256)[:1000]
    scaled = (absmax - offset.cpu()) * (1 / scales)
    middle = (reference.DYNAMIC_MAP[:-1] + reference.DYNAMIC_MAP[1:]) / 2
    assert torch.equal(codes.cpu().int(), torch.bucketize(scaled, middle, out_int32=True))


def test_nan_is_found() -> None:
    weight = torch.randn(200, device="cuda")
    weight[150] = float("nan")
    with pytest.raises(OpError, match="block 2"):
        torch.ops.tunesmith.quantize_nf4(weight, 64)
