"""NF4Linear: a frozen 4-bit layer that is an nn.Linear to everyone else."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.errors import OpError
from tunesmith.nn.nf4_linear import NF4Linear
from tunesmith.ops import FP4Weight, NF4Weight, dequantize_4bit, quantize_fp4, quantize_nf4
from tunesmith.ops.dtypes import DTYPES

PARTS = ("packed", "absmax", "nested_absmax", "nested_offset")


def make_linear(in_features: int = 96, out_features: int = 40, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias)


def make_layer(dtype: torch.dtype = torch.float32, **settings: object) -> NF4Linear:
    return NF4Linear.from_linear(make_linear().to(dtype), **settings)  # type: ignore[arg-type]


def parts_of(layer: NF4Linear) -> dict[str, Tensor]:
    return {
        name: getattr(layer, name).clone() for name in PARTS if getattr(layer, name) is not None
    }


def assert_parts_equal(layer: NF4Linear, expected: dict[str, Tensor]) -> None:
    parts = parts_of(layer)
    assert parts.keys() == expected.keys()
    for name, part in parts.items():
        assert part.dtype == expected[name].dtype, name
        assert torch.equal(part, expected[name]), name


# --- what it looks like


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_an_nn_linear_of_the_same_features(bias: bool) -> None:
    linear = make_linear(bias=bias).eval()
    layer = NF4Linear.from_linear(linear)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (96, 40)
    assert (layer.bias is not None) is bias
    assert layer.training is False
    assert not any(p.requires_grad for p in layer.parameters())
    assert {name for name, _ in layer.named_parameters()} == ({"bias"} if bias else set())
    if bias:
        assert torch.equal(layer.bias, linear.bias)
        assert layer.bias.data_ptr() != linear.bias.data_ptr()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_reports_shape_device_and_compute_dtype(dtype: torch.dtype, nested: bool) -> None:
    linear = make_linear()
    layer = NF4Linear.from_linear(linear, blocksize=128, nested=nested, dtype=dtype)
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((40, 96), dtype, "cpu")
    assert not weight.requires_grad
    assert (weight.float() - linear.weight).abs().max() < 0.155 * linear.weight.abs().max()


def test_the_compute_dtype_is_the_weight_s_unless_told_otherwise() -> None:
    assert make_layer(torch.bfloat16).weight.dtype == torch.bfloat16
    layer = NF4Linear.from_linear(make_linear().bfloat16(), dtype=torch.float32)
    assert layer.weight.dtype == layer.bias.dtype == torch.float32


def test_nf4_is_what_quantizing_the_weight_gives() -> None:
    layer, expected = make_layer(), quantize_nf4(make_linear().weight)
    assert isinstance(layer.nf4, NF4Weight)
    assert torch.equal(layer.nf4.packed, expected.packed)
    assert layer.nf4.nbytes == expected.nbytes < 0.6 * 40 * 96


def test_its_repr_says_4_bit_blocksize_and_nesting() -> None:
    assert repr(make_layer(torch.bfloat16)) == (
        "NF4Linear(in_features=96, out_features=40, bias=True, 4-bit NF4, blocksize=64, nested, "
        "bfloat16)"
    )
    assert "blocksize=256, not nested" in repr(make_layer(blocksize=256, nested=False))


def test_assigning_to_weight_is_refused_and_names_the_way() -> None:
    layer = make_layer()
    for value in (torch.zeros(40, 96), nn.Parameter(torch.zeros(40, 96)), None):
        with pytest.raises(OpError, match=r"read-only; take dense\(\)"):
            layer.weight = value
    assert layer.weight.abs().max() > 0


def test_resetting_parameters_is_refused() -> None:
    with pytest.raises(OpError, match="from_weight"):
        make_layer().reset_parameters()


def test_dense_is_a_plain_linear_of_its_own() -> None:
    layer = make_layer()
    before = parts_of(layer)
    for dtype in (None, *DTYPES):
        dense = layer.dense(dtype)
        assert type(dense) is nn.Linear
        assert dense.weight.dtype == dense.bias.dtype == (dtype or torch.float32)
        assert not dense.weight.requires_grad
    dense = layer.dense()
    assert torch.equal(dense.weight, layer.weight)
    dense.weight.data.zero_()
    dense.bias.data.zero_()
    assert_parts_equal(layer, before)
    assert layer.bias.abs().max() > 0
    assert NF4Linear.from_linear(make_linear(bias=False)).dense().bias is None


def test_a_weight_that_cannot_be_quantized_is_refused_by_name() -> None:
    with pytest.raises(OpError, match=r"^mlp\.up_proj: block 0 .*NaN"):
        NF4Linear.from_weight(torch.full((4, 64), float("nan")), name="mlp.up_proj")
    with pytest.raises(OpError, match="a linear layer's is"):
        NF4Linear.from_weight(torch.ones(64))
    with pytest.raises(OpError, match="has 4 rows"):
        NF4Linear.from_weight(torch.ones(4, 64), torch.ones(5))
    with pytest.raises(OpError, match=r"compute dtype torch\.float64"):
        NF4Linear.from_weight(torch.ones(4, 64), dtype=torch.float64)


# --- forward and backward


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 96), (2, 1, 3, 96), (0, 96), (2, 0, 96)])
def test_output_and_input_gradient_are_those_of_the_dense_layer(
    shape: tuple[int, ...], dtype: torch.dtype, bias: bool
) -> None:
    layer = NF4Linear.from_linear(make_linear(bias=bias).to(dtype))
    dense = layer.dense()
    x = torch.randn(shape).to(dtype).requires_grad_()
    x_dense = x.detach().clone().requires_grad_()
    y, y_dense = layer(x), dense(x_dense)
    assert (y.dtype, y.shape) == (dtype, (*shape[:-1], 40))
    # sums are taken in another order than the library's
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(y, y_dense, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(y)
    y.backward(grad)
    y_dense.backward(grad)
    torch.testing.assert_close(x.grad, x_dense.grad, rtol=tolerance, atol=tolerance)


def test_an_input_that_is_not_contiguous_is_taken_by_its_logical_order() -> None:
    layer = make_layer()
    x = torch.randn(96, 7).t().requires_grad_()
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(7, 96))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_an_input_of_another_dtype_is_computed_in_its_own(dtype: torch.dtype) -> None:
    layer = make_layer(torch.bfloat16)
    x = torch.randn(3, 96).to(dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    weight = layer.dense(torch.float32).weight.to(dtype)
    tolerance = 1e-5 if dtype in (torch.float32, torch.float64) else 1e-2
    expected = F.linear(x, weight, layer.bias.to(dtype))
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


def test_its_gradient_is_right_by_finite_differences() -> None:
    layer = make_layer()
    x = torch.randn(3, 96, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,))


def test_a_bias_that_is_trained_gets_its_gradient_and_the_weight_gets_none() -> None:
    layer = make_layer()
    layer.bias.requires_grad_()
    x = torch.randn(2, 3, 96)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(layer.bias.grad, grad.sum((0, 1)))
    assert all(buffer.grad is None for buffer in layer.buffers())


def test_nothing_is_recorded_when_nothing_requires_a_gradient() -> None:
    assert not make_layer()(torch.randn(2, 96)).requires_grad


def test_only_the_4_bit_weight_is_kept_for_backward() -> None:
    layer = make_layer()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(torch.randn(8, 96, requires_grad=True))
    assert sum(t.numel() * t.element_size() for t in saved) == layer.nf4.nbytes
    y.sum().backward()


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast_decides_the_dtype_as_it_does_for_an_nn_linear(x_dtype: torch.dtype) -> None:
    layer = make_layer()
    dense = layer.dense(torch.bfloat16)
    x = torch.randn(4, 96).to(x_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        expected = dense(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    y.float().sum().backward()
    assert x.grad.dtype == x_dtype


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    net = nn.Sequential(make_layer(), nn.ReLU(), NF4Linear.from_linear(make_linear(40, 96)))
    grads = []
    for wrapped in (False, True):
        x = torch.randn(4, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = checkpoint(net, x, use_reentrant=reentrant) if wrapped else net(x)
        y.square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("features", [95, 97])
def test_an_input_of_another_width_is_refused(features: int) -> None:
    with pytest.raises(OpError, match=rf"got shape \[2, {features}\]; allowed is \[..., 96\]"):
        make_layer()(torch.randn(2, features))


@pytest.mark.parametrize("nested", [False, True])
def test_fp4_is_a_kind_of_it(nested: bool) -> None:
    layer = make_layer(quant_type="fp4", nested=nested)
    assert isinstance(layer.nf4, FP4Weight)
    assert "4-bit FP4, blocksize=64" in repr(layer)
    assert torch.equal(layer.nf4.packed, quantize_fp4(make_linear().weight).packed)
    assert torch.equal(layer.weight, dequantize_4bit(layer.nf4))
    x = torch.randn(5, 96, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, layer.dense()(x), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, 96), rtol=1e-5, atol=1e-5)
    other = copy.deepcopy(layer).half()
    assert other.quant_type == "fp4"
    assert isinstance(other.nf4, FP4Weight)


# --- casts, moves, copies

CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "half()": (lambda m: m.half(), torch.float16),
    "bfloat16()": (lambda m: m.bfloat16(), torch.bfloat16),
    "float()": (lambda m: m.float(), torch.float32),
    "to(dtype)": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to(device, dtype)": (lambda m: m.to("cpu", torch.float16), torch.float16),
    "to(tensor)": (lambda m: m.to(torch.ones(1, dtype=torch.float16)), torch.float16),
    "type(dtype)": (lambda m: m.type(torch.bfloat16), torch.bfloat16),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_changes_the_compute_dtype_and_never_the_4_bit_weight(
    cast: str, nested: bool
) -> None:
    call, dtype = CASTS[cast]
    layer = make_layer(nested=nested)
    before, weight = parts_of(layer), layer.weight
    model = nn.Sequential(layer)
    call(model)
    assert_parts_equal(layer, before)
    assert layer.weight.dtype == layer.bias.dtype == layer.nf4.dtype == dtype
    model.float()
    assert_parts_equal(layer, before)
    assert torch.equal(layer.weight, weight)


def test_a_cast_to_what_it_cannot_compute_in_is_refused_and_changes_nothing() -> None:
    layer = make_layer()
    before = parts_of(layer)
    with pytest.raises(OpError, match=r"torch\.float64; an NF4Linear computes in"):
        layer.double()
    assert_parts_equal(layer, before)
    assert layer.bias.dtype == torch.float32


def test_a_move_takes_everything_along() -> None:
    layer = make_layer(torch.bfloat16).to("meta", torch.float16)
    assert {t.device.type for t in (*layer.buffers(), *layer.parameters())} == {"meta"}
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.float16)
    assert layer.absmax.dtype == torch.uint8
    assert layer.nested_absmax.dtype == torch.float32
    assert layer(torch.empty(2, 96, device="meta")).shape == (2, 40)
    assert layer.to_empty(device="cpu").packed.device.type == "cpu"


@pytest.mark.parametrize("nested", [False, True])
def test_a_state_dict_goes_there_and_back(nested: bool) -> None:
    layer = make_layer(nested=nested)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = NF4Linear.from_weight(torch.ones(40, 96), torch.ones(40), nested=nested)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_parts_equal(other, parts_of(layer))
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(other.bias, layer.bias)


def test_a_state_dict_of_another_block_size_or_with_cast_scales_is_refused() -> None:
    layer = make_layer()
    with pytest.raises(RuntimeError, match=r"nf4 in blocks of 128, .* holds .* blocks of 64"):
        layer.load_state_dict(make_layer(blocksize=128).state_dict())
    cast = {k: v.half() if v.is_floating_point() else v for k, v in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"nested_absmax: got torch\.float16"):
        layer.load_state_dict(cast)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deep", "pickle"],
)
def test_a_copy_is_equal_and_apart(copied: Callable[[NF4Linear], NF4Linear], nested: bool) -> None:
    layer = make_layer(torch.bfloat16, nested=nested)
    other = copied(layer)
    assert_parts_equal(other, parts_of(layer))
    assert other.weight.dtype == torch.bfloat16
    other.packed.zero_()
    assert layer.packed.any()


# --- under PEFT


class Net(nn.Module):
    def __init__(self, quantized: bool) -> None:
        super().__init__()
        first, second = (NF4Linear.from_linear(make_linear(*size)) for size in ((96, 40), (40, 96)))
        self.first = first if quantized else first.dense()
        self.second = second if quantized else second.dense()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def train_under_peft(quantized: bool) -> tuple[nn.Module, Tensor, list[float]]:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["first", "second"], lora_dropout=0.0)
    model = peft.get_peft_model(Net(quantized), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    x = torch.randn(16, 96, generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(10):
        loss = (model(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, model(x).detach(), losses


def test_peft_wraps_and_trains_it_as_it_does_the_dense_layer() -> None:
    model, output, losses = train_under_peft(quantized=True)
    dense_model, dense_output, _ = train_under_peft(quantized=False)
    assert isinstance(model.base_model.model.first.get_base_layer(), NF4Linear)
    assert losses[-1] < 0.98 * losses[0]
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(with_grad) == 4
    assert all("lora_A" in name or "lora_B" in name for name in with_grad)
    torch.testing.assert_close(output, dense_output, rtol=1e-5, atol=1e-5)
    dense_parameters = dict(dense_model.named_parameters())
    for name in with_grad:
        torch.testing.assert_close(
            dict(model.named_parameters())[name], dense_parameters[name], rtol=1e-5, atol=1e-5
        )
