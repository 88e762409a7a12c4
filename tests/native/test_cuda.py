"""The CUDA kernels on a device: the bits of the reference, streams, graphs, devices, large tensors.

test_cuda_emulated.py runs the same kernels without a device.
"""

from collections.abc import Callable
from types import ModuleType

import attrs
import pytest
import torch
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.ops import NF4Weight, dequantize_nf4, four_bit, linear_nf4, quantize_nf4
from tunesmith.ops.dtypes import DTYPES
from tunesmith.ops.four_bit import QUANT_TYPES
from tunesmith.ops.tables import DYNAMIC_MAP

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(autouse=True)
def cuda_kernels(native: ModuleType) -> None:
    if not native.has_cuda():
        pytest.skip("this build has no CUDA kernels")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("blocksize", [64, 256, 4096])
def test_codes_scales_and_values_are_the_same(
    blocksize: int, quant_type: str, dtype: torch.dtype
) -> None:
    ops = torch.ops.tunesmith
    for numel in (0, 1, 63, 64, 65, 513, 64 * 1000 + 37, 4096 * 300):
        weight = torch.randn(numel).to(dtype)
        packed, absmax = four_bit.reference_quantize_4bit(weight, blocksize, quant_type)
        on_gpu = ops.quantize_4bit(weight.cuda(), blocksize, quant_type)
        assert torch.equal(on_gpu[0].cpu(), packed)
        assert torch.equal(on_gpu[1].cpu(), absmax)
        # the mean, and with it the codes, may differ in the last bit from device to device, so
        # double quantization is compared on the way back
        nested = four_bit.reference_quantize_absmax(absmax)
        for parts in ((absmax, None, None), nested):
            args = ([numel], blocksize, quant_type, dtype)
            values = four_bit.reference_dequantize_4bit(packed, *parts, *args)
            moved = [part if part is None else part.cuda() for part in parts]
            assert torch.equal(ops.dequantize_4bit(packed.cuda(), *moved, *args).cpu(), values)


def test_absmax_codes_are_the_nearest_to_what_the_device_took_for_the_mean() -> None:
    absmax = torch.rand(1000) + 0.5
    codes, nested_absmax, offset = torch.ops.tunesmith.quantize_absmax(absmax.cuda())
    scales = nested_absmax.cpu().repeat_interleave(256)[:1000]
    scaled = (absmax - offset.cpu()) * (1 / scales)
    middle = (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) / 2
    assert torch.equal(codes.cpu().int(), torch.bucketize(scaled, middle, out_int32=True))


def test_nan_is_found() -> None:
    weight = torch.randn(200, device="cuda")
    weight[150] = float("nan")
    with pytest.raises(OpError, match="block 2"):
        torch.ops.tunesmith.quantize_4bit(weight, 64, "nf4")


def test_more_than_2_to_31_elements_are_dequantized() -> None:
    numel, blocksize = 2**31 + 4096 * 3 + 5, 4096
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("this takes 8 GB of device memory")
    packed = torch.randint(256, ((numel + 1) // 2,), dtype=torch.uint8, device="cuda")
    absmax = torch.rand(-(-numel // blocksize), device="cuda")
    args = (blocksize, "nf4", torch.bfloat16)
    out = torch.ops.tunesmith.dequantize_4bit(packed, absmax, None, None, [numel], *args)
    for start in (0, 2**30, 2**31 - 4096, 2**31, 2**31 + 4096 * 2):
        size = min(2 * 4096, numel - start)
        codes = packed[start // 2 : (start + size + 1) // 2].cpu()
        scales = absmax[start // blocksize :][: -(-size // blocksize)].cpu()
        expected = four_bit.reference_dequantize_4bit(codes, scales, None, None, [size], *args)
        assert torch.equal(out[start : start + size].cpu(), expected)


@attrs.frozen
class Layer:
    """A frozen 4-bit weight with an adapter and a bias, on one device."""

    packed: Tensor
    scales: tuple[Tensor, Tensor | None, Tensor | None]
    out_features: int
    quant_type: str
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor

    @classmethod
    def random(
        cls,
        in_features: int,
        out_features: int,
        dtype: torch.dtype = torch.bfloat16,
        quant_type: str = "nf4",
        nested: bool = True,
        device: str = "cuda",
    ) -> "Layer":
        weight = torch.randn(out_features, in_features)
        packed, absmax = four_bit.reference_quantize_4bit(weight, 64, quant_type)
        scales = four_bit.reference_quantize_absmax(absmax) if nested else (absmax, None, None)
        return cls(
            packed.to(device),
            tuple(part if part is None else part.to(device) for part in scales),
            out_features,
            quant_type,
            torch.randn(out_features, dtype=dtype, device=device),
            torch.randn(16, in_features, device=device),
            torch.randn(out_features, 16, device=device),
        )

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.tunesmith.linear(
            x, self.packed, *self.scales, self.out_features, 64, self.quant_type, self.bias,
            self.lora_a, self.lora_b, 0.5, None, 1.0,
        )[0]  # fmt: skip

    def check(self, x: Tensor, y: Tensor) -> None:
        """Compare with the same in fp64, as near as y's dtype and fp32 sums allow."""
        shape = (self.out_features, x.shape[-1])
        parts = (self.packed, *self.scales, shape, 64, self.quant_type, torch.float32)
        dense = four_bit.reference_dequantize_4bit(*parts).double()
        a, b, wide = self.lora_a.double(), 0.5 * self.lora_b.double(), x.double()
        expected = wide @ dense.T + self.bias.double() + wide @ a.T @ b.T
        terms = wide.abs() @ dense.abs().T + wide.abs() @ a.abs().T @ b.abs().T
        limit = torch.finfo(y.dtype).eps / 2 * 1.01 * expected.abs() + 2e-6 * terms
        assert ((y.double() - expected).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(4096, 4096), (11008, 160), (576, 1536), (1120, 33), (75, 17)]
)
def test_a_linear_layer_of_few_tokens(
    in_features: int, out_features: int, quant_type: str, dtype: torch.dtype
) -> None:
    for nested in (False, True):
        layer = Layer.random(in_features, out_features, dtype, quant_type, nested)
        for tokens in range(1, 17):
            x = torch.randn(tokens, in_features, dtype=dtype, device="cuda")
            layer.check(x, layer(x))


def test_a_linear_layer_is_captured_in_a_graph() -> None:
    layer = Layer.random(4096, 512)
    x = torch.randn(4, 4096, dtype=torch.bfloat16, device="cuda")
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        layer(x)  # loads the kernels
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        layer.check(x, y)


def test_a_linear_layer_runs_on_the_current_stream() -> None:
    layer = Layer.random(4096, 512)
    later = torch.randn(4, 4096, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros_like(later)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would see the zeros
        x.copy_(later)
        y = layer(x)
    torch.cuda.synchronize()
    layer.check(later, y)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second device")
def test_a_linear_layer_runs_on_the_device_of_its_tensors() -> None:
    assert torch.cuda.current_device() == 0
    layer = Layer.random(4096, 512, device="cuda:1")
    x = torch.randn(3, 4096, dtype=torch.bfloat16, device="cuda:1")
    layer.check(x, layer(x))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [3, 16, 17, 300])
def test_both_ways_agree_with_fp64(tokens: int, adapter_dtype: torch.dtype) -> None:
    in_features, out_features = 1024, 640
    weight = quantize_nf4(torch.randn(out_features, in_features, dtype=torch.bfloat16) / 32)
    on_gpu = NF4Weight(**{
        each.name: part.cuda() if isinstance(part := getattr(weight, each.name), Tensor) else part
        for each in attrs.fields(NF4Weight)
    })  # fmt: skip
    x = torch.randn(tokens, in_features, dtype=torch.bfloat16)
    a = (torch.randn(16, in_features) / 32).to(adapter_dtype)
    b = (torch.randn(out_features, 16) / 4).to(adapter_dtype)
    grad_y = torch.randn(tokens, out_features, dtype=torch.bfloat16)

    def both(x: Tensor, y_of: Callable[..., Tensor], *adapter: Tensor) -> list[Tensor]:
        leaves = [each.detach().requires_grad_() for each in (x, *adapter)]
        y = y_of(*leaves)
        grads = torch.autograd.grad(y, leaves, grad_y.to(y.device, y.dtype))
        return [y.detach().cpu().double(), *(grad.cpu().double() for grad in grads)]

    dense = dequantize_nf4(weight).double()
    expected = both(
        x.double(), lambda x, a, b: x @ dense.T + 0.5 * x @ a.T @ b.T, a.double(), b.double()
    )
    ours = both(
        x.cuda(), lambda x, a, b: linear_nf4(x, on_gpu, lora=(a, b, 0.5)), a.cuda(), b.cuda()
    )
    for mine, right in zip(ours, expected, strict=True):
        assert (mine - right).norm() <= 8e-3 * right.norm()
