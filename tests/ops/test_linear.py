"""The frozen linear layer with an adapter beside it: the formula, its gradients, its refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.ops import (
    FrozenLinear,
    LoraWeights,
    dequantize_4bit,
    frozen,
    linear,
    linear_nf4,
    lora_linear,
    native,
    native_status,
    quantize_4bit,
    quantize_fp4,
    quantize_nf4,
)
from tunesmith.ops.dtypes import DTYPES

TOKENS = (0, 1, 2, 3, 5, 16, 17, 64, 130)
SIZES = ((64, 64), (96, 40), (77, 33), (130, 5), (1, 1), (3, 1), (256, 130))  # K, N
WEIGHTS = ("nf4", "nf4 nested", "fp4", "fp4 nested", "plain")

# up to so many the kernels project into the low rank in fp32, whatever x is (csrc/cpu/linear.cpp)
FEW_TOKENS = 8

# of the largest element; y in 16 bits is rounded once for the base and once for the sum
TOLERANCE = {
    torch.float64: 1e-6,  # W itself is fp32
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def flat(forward: Any, backward: Any) -> SimpleNamespace:
    """Return an implementation that takes what the schemas of the ops list."""
    return SimpleNamespace(
        linear=linear._flat(forward), linear_backward=linear._flat_backward(backward)
    )


REFERENCE = flat(linear.reference_linear, linear.reference_linear_backward)


@pytest.fixture(params=["reference", "native: one call", "native: by library"])
def ops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Whatever implements the two ops, each in turn."""
    if request.param == "reference":
        yield REFERENCE
        return
    status = native_status()
    if not status.loaded:
        pytest.skip(str(status))
    own = request.param == "native: one call"

    def in_one_call(tokens: int, dtype: torch.dtype, weight: Tensor, quant_type: str) -> bool:
        return own and weight.is_contiguous()

    monkeypatch.setattr(linear, "in_one_call", in_one_call)
    yield torch.ops.tunesmith


@attrs.frozen
class Layer:
    """The arguments of the ops, and W in fp64."""

    parts: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
    dense: Tensor
    blocksize: int
    quant_type: str
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    keep: Tensor | None
    scaling: float = 0.75
    keep_scale: float = 1.25

    @property
    def value(self) -> FrozenLinear:
        return FrozenLinear(
            *self.parts,
            *self.dense.shape,
            self.blocksize,
            self.quant_type,
            self.bias,
            self.lora_a,
            self.lora_b,
            self.scaling,
            self.keep,
            self.keep_scale,
        )

    def forward(self, ops: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return ops.linear(x, *self.value)

    def backward(
        self, ops: Any, grad_y: Tensor, x: Tensor | None, s: Tensor | None, *need: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops.linear_backward(grad_y, x, s, *self.value, *need)

    def formula(self, x: Tensor, grad_y: Tensor, narrow: bool = False) -> dict[str, Tensor]:
        """Return y, s and the gradients in fp64, by autograd over the written-out formula.

        `narrow` rounds the adapter's factors to bf16, and what flows back into s.
        """

        def rounded(factor: Tensor) -> Tensor:
            return factor + (to_bf16(factor) - factor).detach() if narrow else factor

        x = x.double().requires_grad_()
        y = F.linear(x, self.dense, None if self.bias is None else self.bias.double())
        out = {"x": x}
        s = x.new_empty((math.prod(x.shape[:-1]), 0))
        if self.lora_a is not None and self.lora_b is not None:
            out["a"] = a = self.lora_a.double().requires_grad_()
            out["b"] = b = self.lora_b.double().requires_grad_()
            dropped = x if self.keep is None else x * self.keep * self.keep_scale
            s = rounded(dropped) @ rounded(a).t()
            few = narrow and math.prod(x.shape[:-1]) <= FEW_TOKENS
            if few:  # projected in fp32 both ways; all other products are as ever
                s = s + (dropped @ a.t() - s).detach()
            if narrow:
                s.register_hook(to_bf16)
            low_rank = rounded(s) @ rounded(b).t()
            if few:
                slopes = s @ b.detach().t() + rounded(s.detach()) @ b.t()
                low_rank = slopes + (low_rank - slopes).detach()
            y = y + self.scaling * low_rank
            s = s.reshape(-1, a.shape[0]) if x.numel() else s.new_empty((0, a.shape[0]))
        y.backward(grad_y.double())
        grads = {name: leaf.grad for name, leaf in out.items()}
        return {"y": y.detach(), "s": s.detach(), **grads}


def make_layer(
    size: tuple[int, int],
    weight: str = "nf4 nested",
    *,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    rank: int = 3,
    adapter: torch.dtype = torch.float32,
    keep: tuple[int, ...] | None = None,
) -> Layer:
    """Return a layer of that size; `keep` is the shape of x's leading dimensions, for a mask."""
    generator = torch.Generator().manual_seed(7)
    in_features, out_features = size

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dense = random(out_features, in_features)
    if weight == "plain":
        dense = dense.to(torch.float32 if dtype == torch.float64 else dtype)
        parts: Any = (dense, None, None, None)
        blocksize, quant_type = 0, ""
    else:
        quant_type, _, nested = weight.partition(" ")
        w = quantize_4bit(dense, nested=bool(nested), quant_type=quant_type)
        parts, blocksize = (w.packed, w.absmax, w.nested_absmax, w.nested_offset), w.blocksize
        dense = dequantize_4bit(w, dtype if dtype in DTYPES else None)
    mask = None if keep is None else random(*keep, in_features) > -0.84  # 0.8 are kept
    return Layer(
        parts=parts,
        dense=dense.double(),
        blocksize=blocksize,
        quant_type=quant_type,
        bias=random(out_features).to(dtype) if bias else None,
        lora_a=(random(rank, in_features) / in_features**0.5).to(adapter) if rank else None,
        lora_b=random(out_features, rank).to(adapter) if rank else None,
        keep=mask if rank else None,
    )


def to_bf16(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16).double()


def assert_close(ours: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert ours.shape == expected.shape, what
    if expected.numel():
        error = (ours.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        assert error <= tolerance, (what, float(error))


def check(ops: Any, layer: Layer, x: Tensor, grad_y: Tensor) -> None:
    """Compare forward and backward with the formula, elementwise."""
    narrow = ops is not REFERENCE and x.dtype == torch.bfloat16 and "bf16" in native_status().isa
    expected = layer.formula(x, grad_y, narrow)
    tolerance = TOLERANCE[x.dtype]
    y, s = layer.forward(ops, x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert (y.dtype, s.dtype) == (x.dtype, wide)
    assert_close(y, expected["y"], tolerance, "y")
    assert_close(s, expected["s"], 1e-5, "s")
    adapted = layer.lora_a is not None
    grads = layer.backward(ops, grad_y, x, s, True, adapted, adapted)
    assert grads[0].dtype == x.dtype
    assert_close(grads[0], expected["x"], tolerance, "grad_x")
    if layer.lora_a is None:
        assert grads[1].numel() == grads[2].numel() == 0
        return
    assert grads[1].dtype == grads[2].dtype == layer.lora_a.dtype
    # sums are fp32: what rounds is the dtype they are given out in
    rounding = max(1e-5, TOLERANCE[layer.lora_a.dtype])
    # what flows into s may be rounded the other way where it lies halfway
    halfway = TOLERANCE[x.dtype] if narrow else rounding
    assert_close(grads[1], expected["a"], max(rounding, halfway), "grad_a")
    assert_close(grads[2], expected["b"], rounding, "grad_b")


def random_x(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- the ops


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_outputs_and_gradients_are_those_of_the_formula(
    ops: Any, tokens: int, dtype: torch.dtype
) -> None:
    for index, (in_features, out_features) in enumerate(SIZES):
        for number, weight in enumerate(WEIGHTS):
            layer = make_layer(
                (in_features, out_features),
                weight,
                dtype=dtype,
                bias=(index + number) % 2 == 0,
                rank=(3, 16, 0, 1, 64)[(index + 2 * number) % 5],
                adapter=DTYPES[(index + number) % 3],
                keep=(tokens,) if number % 2 else None,
            )
            x = random_x(tokens, in_features, dtype=dtype)
            check(ops, layer, x, random_x(tokens, out_features, dtype=dtype, seed=2))


@pytest.mark.parametrize("adapter", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropped", [False, True])
def test_any_dtype_of_x_goes_with_any_of_the_adapter(
    ops: Any, dropped: bool, dtype: torch.dtype, adapter: torch.dtype
) -> None:
    keep = (17,) if dropped else None
    for weight in ("nf4 nested", "plain"):
        layer = make_layer((96, 40), weight, dtype=dtype, adapter=adapter, keep=keep)
        check(ops, layer, random_x(17, 96, dtype=dtype), random_x(17, 40, dtype=dtype, seed=2))


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 3), (2, 0, 3)])
def test_leading_dimensions_are_kept(ops: Any, leading: tuple[int, ...]) -> None:
    layer = make_layer((96, 40), keep=leading)
    check(ops, layer, random_x(*leading, 96), random_x(*leading, 40, seed=2))


def test_x_and_its_gradient_may_lie_anyhow_in_memory(ops: Any) -> None:
    layer = make_layer((96, 40), "fp4 nested", keep=(5, 7))
    turned = random_x(96, 7, 5).permute(2, 1, 0)
    strided = random_x(5, 7, 192)[..., ::2]
    same = random_x(96).expand(5, 7, 96)
    grads = (random_x(40, 7, 5, seed=2).permute(2, 1, 0), torch.ones(()).expand(5, 7, 40))
    for x in (turned, strided, same):
        for grad_y in grads:
            assert not x.is_contiguous()
            assert not grad_y.is_contiguous()
            check(ops, layer, x, grad_y)
    keep = layer.keep
    assert keep is not None
    turned_mask = keep.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert not turned_mask.is_contiguous()
    check(ops, attrs.evolve(layer, keep=turned_mask), turned, grads[0])


def test_an_adapter_and_a_weight_may_lie_anyhow_in_memory(ops: Any) -> None:
    layer = make_layer((96, 40), "plain", rank=8)
    assert layer.lora_a is not None
    assert layer.lora_b is not None

    def turned(matrix: Tensor) -> Tensor:
        out = matrix.t().contiguous().t()
        assert not out.is_contiguous()
        return out

    layer = attrs.evolve(
        layer,
        lora_a=turned(layer.lora_a),
        lora_b=turned(layer.lora_b),
        parts=(turned(layer.parts[0]), None, None, None),
    )
    check(ops, layer, random_x(17, 96), random_x(17, 40, seed=2))


@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("need_a", [False, True])
@pytest.mark.parametrize("need_b", [False, True])
@pytest.mark.parametrize("tokens", [0, 5])
def test_only_what_is_needed_is_worked_out_and_nothing_else_changes_it(
    ops: Any, need_x: bool, need_a: bool, need_b: bool, tokens: int
) -> None:
    layer = make_layer((96, 40), keep=(tokens,))
    x, grad_y = random_x(tokens, 96), random_x(tokens, 40, seed=2)
    _, s = layer.forward(ops, x)
    all_three = layer.backward(ops, grad_y, x, s, True, True, True)
    some = layer.backward(
        ops, grad_y, x if need_a else None, s if need_b else None, need_x, need_a, need_b
    )
    for needed, full, part in zip((need_x, need_a, need_b), all_three, some, strict=True):
        if needed:
            torch.testing.assert_close(part, full)
        else:
            assert part.shape == (0,)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_plain_weight_may_have_another_dtype_than_x(
    ops: Any, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    layer = make_layer((96, 40), "plain", dtype=dtype)
    weight = layer.parts[0].to(weight_dtype)
    layer = attrs.evolve(layer, parts=(weight, None, None, None), dense=weight.double())
    check(ops, layer, random_x(17, 96, dtype=dtype), random_x(17, 40, dtype=dtype, seed=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_adapter_alone_is_exact_where_the_base_is_zero(ops: Any, dtype: torch.dtype) -> None:
    # a small update must not be lost in the rounding of something larger
    w = quantize_nf4(torch.zeros(40, 96))
    layer = make_layer((96, 40), dtype=dtype, bias=False)
    parts = (w.packed, w.absmax, w.nested_absmax, w.nested_offset)
    layer = attrs.evolve(layer, parts=parts, dense=torch.zeros(40, 96).double(), scaling=1e-3)
    check(ops, layer, random_x(17, 96, dtype=dtype), random_x(17, 40, dtype=dtype, seed=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_does_not_reach_into_an_op(ops: Any, dtype: torch.dtype) -> None:
    # it is asked before: within, what is fp32 must stay fp32
    layer = make_layer((96, 40), dtype=dtype, keep=(17,))
    x, grad_y = random_x(17, 96, dtype=dtype), random_x(17, 40, dtype=dtype, seed=2)
    y, s = layer.forward(ops, x)
    plain = [y, s, *layer.backward(ops, grad_y, x, s, True, True, True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, s = layer.forward(ops, x)
        under = [y, s, *layer.backward(ops, grad_y, x, s, True, True, True)]
    for one, other in zip(under, plain, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


# --- through autograd


@pytest.mark.parametrize("weight", ["nf4", "plain"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_every_gradient_is_right_by_finite_differences(weight: str, dropout: float) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    w = torch.randn(5, 12)
    packed = quantize_nf4(w)

    def layer(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(3)
        lora = LoraWeights(a, b, 0.5)
        if weight == "plain":
            return lora_linear(x, w, bias, lora, dropout=dropout)
        return linear_nf4(x, packed, bias, lora, dropout=dropout)

    assert torch.autograd.gradcheck(layer, (leaf(2, 3, 12), leaf(4, 12), leaf(5, 4), leaf(5)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_draws_the_numbers_that_torch_would(p: float, dtype: torch.dtype) -> None:
    w = quantize_nf4(random_x(40, 96, seed=4))
    a, b = random_x(3, 96, seed=5), random_x(40, 3, seed=6)
    dense = dequantize_4bit(w, torch.float32)
    for x in (random_x(2, 17, 96), random_x(96, 17).t(), random_x(96).expand(17, 96)):
        x = x.to(dtype)
        torch.manual_seed(11)
        y = linear_nf4(x, w, None, (a, b, 2.0), dropout=p)
        after = torch.rand(())
        torch.manual_seed(11)
        dropped = F.dropout(x.float(), p)
        expected = F.linear(x.float(), dense) + 2.0 * dropped @ a.t() @ b.t()
        if p < 1.0:  # where torch draws nothing
            assert after == torch.rand(())
        tolerance = TOLERANCE[dtype]
        assert (y.float() - expected).abs().max() <= tolerance * expected.abs().max()


def test_without_dropout_no_number_is_drawn() -> None:
    before = torch.random.get_rng_state()
    w = quantize_nf4(random_x(40, 96))
    linear_nf4(random_x(2, 96), w, None, (random_x(3, 96), random_x(40, 3), 1.0))
    linear_nf4(random_x(0, 96), w, None, (random_x(3, 96), random_x(40, 3), 1.0), dropout=0.5)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("trained", ["x", "a", "b", "ab", "bias"])
def test_no_more_is_kept_for_backward_than_a_gradient_needs(trained: str) -> None:
    w = quantize_nf4(random_x(40, 96))
    tensors = {
        "x": random_x(8, 96),
        "a": random_x(3, 96, seed=2),
        "b": random_x(40, 3, seed=3),
        "bias": random_x(40, seed=4),
    }
    for name in {"ab": ("a", "b")}.get(trained, (trained,)):
        tensors[name].requires_grad_()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = linear_nf4(tensors["x"], w, tensors["bias"], (tensors["a"], tensors["b"], 1.0))
    held = {tensor.data_ptr() for tensor in saved}
    assert (tensors["x"].data_ptr() in held) is ("a" in trained and trained != "bias")
    assert any(t.shape == (8, 3) for t in saved) is ("b" in trained and trained != "bias")
    assert not any(t.shape == (40, 96) for t in saved)  # the dense weight
    y.sum().backward()
    for name, tensor in tensors.items():
        wanted = name in ({"a", "b"} if trained == "ab" else {trained})
        assert (tensor.grad is not None) is wanted


def test_nothing_is_recorded_when_nothing_requires_a_gradient() -> None:
    y = linear_nf4(random_x(2, 96), quantize_nf4(random_x(40, 96)))
    assert not y.requires_grad


def test_a_weight_that_requires_a_gradient_is_refused() -> None:
    weight = random_x(40, 96).requires_grad_()
    with pytest.raises(OpError, match=r"has none for its weight.*\.requires_grad_\(False\)"):
        lora_linear(random_x(2, 96), weight)
    with torch.no_grad():
        assert lora_linear(random_x(2, 96), weight).shape == (2, 40)


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x = random_x(2, 96).requires_grad_()
    a, b = random_x(3, 96).requires_grad_(), random_x(40, 3).requires_grad_()
    y = linear_nf4(x, quantize_nf4(random_x(40, 96)), None, (a, b, 1.0))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(OpError, match="first derivatives only"):
        grad.sum().backward()


def test_fp4_is_multiplied_as_nf4_is() -> None:
    w = quantize_fp4(random_x(40, 96))
    x = random_x(7, 96)
    expected = F.linear(x, dequantize_4bit(w))
    torch.testing.assert_close(linear_nf4(x, w), expected, rtol=1e-5, atol=1e-4)


def test_on_the_meta_device_shapes_and_dtypes_come_out() -> None:
    w = quantize_nf4(torch.empty(40, 96, device="meta"))
    x = torch.empty(2, 3, 96, device="meta", dtype=torch.bfloat16)
    a, b = torch.empty(4, 96, device="meta"), torch.empty(40, 4, device="meta")
    y = linear_nf4(x, w, None, (a, b, 1.0), dropout=0.5)
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, (2, 3, 40))


# --- what is refused


def test_what_does_not_fit_together_is_refused_by_the_functions() -> None:
    w = quantize_nf4(random_x(40, 96))
    x, bias = random_x(2, 96), random_x(40)
    a, b = random_x(3, 96), random_x(40, 3)
    refused: list[tuple[tuple[Any, ...], float, str]] = [
        ((random_x(2, 95), w), 0, r"x: got shape \[2, 95\]; allowed is \[\.\.\., 96\]"),
        ((torch.tensor(1.0), w), 0, r"x: got shape \[\]"),
        ((x.int(), w), 0, "x: got dtype int32; allowed are bfloat16, float16, float32, float64"),
        ((x, quantize_nf4(random_x(64))), 0, r"got a weight of shape \[64\]; allowed is \[out_"),
        ((x, w, bias[:-1]), 0, r"bias: got float32 \[39\]; allowed here is float32 \[40\]"),
        ((x, w, None, (a[:, :-1], b, 1.0)), 0, r"lora_a: got float32 \[3, 95\]; .* \[3, 96\]"),
        ((x, w, None, (a, b[:-1], 1.0)), 0, r"lora_b: got float32 \[39, 3\]; .* \[40, 3\]"),
        ((x, w, None, (a, b.half(), 1.0)), 0, r"lora_b: got float16 .*allowed here is float32"),
        ((x, w, None, (a.double(), b, 1.0)), 0, r"lora_a: got float64"),
        ((x, w, None, (a[:0], b[:, :0], 1.0)), 0, r"lora_a: got shape \[0, 96\].*1 or more"),
        ((x, w, None, (a[0], b, 1.0)), 0, r"lora_a: got float32 \[96\]"),
        ((x, w, None, (a, None, 1.0)), 0, "only one of lora_a and lora_b"),
        ((x, w, None, (a, b, 1.0)), 1.5, "got dropout 1.5; allowed is a probability from 0 to 1"),
        ((x, w, None, (a, b, 1.0)), -0.1, "got dropout -0.1"),
        ((x, w), 0.5, "got dropout 0.5 without an adapter"),
        ((x, w, bias.to("meta")), 0, "bias: got a tensor on meta, but the input is on cpu"),
        ((x.to("meta"), w), 0, "weight: got a tensor on cpu, but the input is on meta"),
    ]
    for args, dropout, message in refused:
        with pytest.raises(OpError, match=message):
            linear_nf4(*args, dropout=dropout)
    with pytest.raises(OpError, match=r"got a weight of shape \[96\]"):
        lora_linear(x, random_x(96))
    with pytest.raises(OpError, match=r"weight: got int32 .*bfloat16 or float16 or float32"):
        lora_linear(x, random_x(40, 96).int())


def test_one_row_of_an_odd_weight_takes_no_more_features_than_it_has() -> None:
    # 3 and 4 elements are both 2 bytes: their number alone does not tell them apart
    with pytest.raises(OpError, match="the weight has 3 columns"):
        linear_nf4(random_x(2, 4), quantize_nf4(random_x(1, 3)))


def test_what_does_not_fit_together_is_refused_by_every_implementation(ops: Any) -> None:
    layer = make_layer((96, 40), keep=(2,))
    x, grad_y = random_x(2, 96), random_x(2, 40)
    _, s = layer.forward(ops, x)
    packed, *scales = layer.parts
    plain = random_x(40, 96)
    forward: list[tuple[dict[str, Any], str]] = [
        ({"parts": (packed[:-1], *scales)}, r"packed: got uint8 \[1919\]"),
        ({"parts": (packed, scales[0][:-1], *scales[1:])}, "absmax codes: got uint8"),
        ({"parts": (packed, None, None, None)}, "got no absmax for a weight in nf4"),
        ({"parts": (packed, *(t if t is None else t.to("meta") for t in scales))}, "on meta"),
        ({"parts": (packed.to("meta"), *scales)}, "weight: got a tensor on meta"),
        ({"quant_type": "int4"}, "got quant_type 'int4'"),
        ({"quant_type": ""}, "got scales for a plain weight"),
        ({"quant_type": "", "parts": (plain.t(), None, None, None)}, r"weight: got float32 \[96, "),
        ({"quant_type": "", "parts": (plain.double(), None, None, None)}, "weight: got float64"),
        ({"blocksize": 32}, "got blocksize 32"),
        ({"keep": torch.ones(2, 95, dtype=torch.bool)}, r"keep: got bool \[2, 95\]"),
        ({"keep": torch.ones(2, 96)}, r"keep: got float32"),
        ({"keep": torch.ones(2, 96, dtype=torch.bool, device="meta")}, "keep: got a tensor on m"),
        ({"lora_a": None, "lora_b": None}, "got a dropout mask without an adapter"),
        ({"lora_b": None}, "only one of lora_a and lora_b"),
        ({"bias": torch.ones(40).half()}, r"bias: got float16 \[40\]"),
    ]
    for change, message in forward:
        with pytest.raises(OpError, match=message):
            attrs.evolve(layer, **change).forward(ops, x)
    with pytest.raises(OpError, match=r"x: got a sparse_coo tensor"):
        layer.forward(ops, x.to_sparse())
    with pytest.raises(OpError, match=r"x: .* \[2, 95\]; allowed is a dense tensor \[\.\.\., 96\]"):
        layer.forward(ops, x[:, :-1])
    backward: list[tuple[tuple[Any, ...], str]] = [
        ((grad_y, None, s, True, True, True), "got need_a without x"),
        ((grad_y, x, None, True, True, True), "got need_b without s"),
        ((grad_y, x[:1], s, True, True, True), r"x: got float32 \[1, 96\]"),
        ((grad_y, x.half(), s, True, True, True), r"x: got float16"),
        ((grad_y, x, s[:1], True, True, True), r"s: got float32 \[1, 3\]"),
        ((grad_y, x, s.half(), True, True, True), r"s: got float16"),
        ((grad_y[:, :-1], x, s, True, True, True), r"grad_y: .* \[2, 39\]; .* \[\.\.\., 40\]"),
        ((grad_y.int(), x, s, True, True, True), r"grad_y: got dtype int32"),
        ((grad_y[:1], x, s, True, False, False), r"keep: got bool \[2, 96\]"),
    ]
    for args, message in backward:
        with pytest.raises(OpError, match=message):
            layer.backward(ops, *args)
    bare = attrs.evolve(layer, lora_a=None, lora_b=None, keep=None)
    with pytest.raises(OpError, match="need_a or need_b without an adapter"):
        bare.backward(ops, grad_y, x, s, True, True, False)


# --- torch's own check


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["bare", "adapter", "dropout", "plain"])
def test_linear_is_a_sound_op(kind: str, dtype: torch.dtype, trained: bool) -> None:
    layer = make_layer(
        (33, 10),
        "plain" if kind == "plain" else "nf4 nested",
        dtype=dtype,
        rank=0 if kind == "bare" else 3,
        keep=(2, 5) if kind == "dropout" else None,
    )
    x = random_x(2, 5, 33, dtype=dtype)
    if trained:
        for tensor in (x, layer.bias, layer.lora_a, layer.lora_b):
            if tensor is not None:
                tensor.requires_grad_()

    class Recorder:
        def linear(self, *args: Any) -> Any:
            torch.library.opcheck(torch.ops.tunesmith.linear.default, args, atol=0.05, rtol=0.05)
            return torch.ops.tunesmith.linear(*args)

        def linear_backward(self, *args: Any) -> Any:
            torch.library.opcheck(torch.ops.tunesmith.linear_backward.default, args)

    _, s = layer.forward(Recorder(), x)
    adapted = layer.lora_a is not None
    if not trained:
        for need in ((True, adapted, adapted), (False, adapted, False), (True, False, adapted)):
            layer.backward(Recorder(), random_x(2, 5, 10, dtype=dtype, seed=2), x, s, *need)


# --- what CUDA does, on CPU tensors


@pytest.mark.parametrize("small_tokens", [0, 16])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_the_way_over_cuda_gives_the_formula_too(
    dtype: torch.dtype, small_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = native_status()
    if not status.loaded:
        pytest.skip(str(status))
    calls = []

    def linear_small(stream: int | None, **same: Any) -> None:
        # the CPU's in place of the kernel, which takes the same but for the stream
        assert stream is None
        calls.append(same["layer"])
        native.kernels.linear(**same, accumulate=False)

    monkeypatch.setattr(frozen, "SMALL_TOKENS", small_tokens)
    monkeypatch.setattr(native.kernels, "linear_small", linear_small)
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 2e-2)
    on_cuda = flat(linear._linear_cuda, linear._linear_backward_cuda)
    for tokens in (0, 1, 5, 16, 17):
        for weight in ("nf4 nested", "fp4", "plain"):
            for rank, keep in ((0, None), (4, None), (4, (tokens,))):
                layer = make_layer((96, 40), weight, dtype=dtype, rank=rank, keep=keep)
                x = random_x(tokens, 96, dtype=dtype)
                grad_y = random_x(tokens, 40, dtype=dtype, seed=2)
                expected = layer.formula(x, grad_y)
                before = len(calls)
                y, s = layer.forward(on_cuda, x)
                small = 0 < tokens <= small_tokens and weight != "plain" and keep is None
                assert len(calls) - before == (small and dtype != torch.float64)
                assert s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
                need = (True, rank > 0, rank > 0)
                grads = layer.backward(on_cuda, grad_y, x, s, *need)
                assert_close(y, expected["y"], tolerance, "y")
                assert_close(grads[0], expected["x"], tolerance, "grad_x")
                if rank:
                    assert grads[1].dtype == grads[2].dtype == torch.float32
                    assert_close(s, expected["s"], tolerance, "s")
                    assert_close(grads[1], expected["a"], tolerance, "grad_a")
                    assert_close(grads[2], expected["b"], tolerance, "grad_b")


# --- which way the CPU goes


def test_few_tokens_and_dtypes_that_the_cpu_does_not_multiply_take_one_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "_multiplies", lambda dtype: dtype == torch.float32)
    limit = linear._OWN_TOKENS_FP32
    assert linear._own_product(1, torch.float32)
    assert linear._own_product(limit, torch.float32)
    assert not linear._own_product(limit + 1, torch.float32)
    assert linear._own_product(limit + 1, torch.bfloat16)

    packed, weight = torch.empty(0, dtype=torch.uint8), torch.empty(4, 4)
    assert linear.in_one_call(1, torch.float32, packed, "nf4")
    assert not linear.in_one_call(limit + 1, torch.float32, packed, "nf4")
    # a plain weight that the library can take as it is
    assert not linear.in_one_call(1, torch.float32, weight, "")
    assert linear.in_one_call(1, torch.float32, weight.half(), "")
    assert linear.in_one_call(1, torch.bfloat16, weight.bfloat16(), "")
    assert not linear.in_one_call(1, torch.bfloat16, weight.bfloat16().t()[:2], "")


def test_how_many_tokens_take_one_call_depends_on_what_multiplies_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "_multiplies", lambda dtype: True)
    for isa, dtype, most in (
        ("amx_bf16", torch.bfloat16, linear._OWN_TOKENS_AMX),
        ("amx_bf16", torch.float32, linear._OWN_TOKENS_FP32),
        ("amx_bf16", torch.float16, linear._OWN_TOKENS),
        ("avx512", torch.bfloat16, linear._OWN_TOKENS),
        ("avx2", torch.float32, linear._OWN_TOKENS_FP32),
    ):
        monkeypatch.setattr(native, "kernels", SimpleNamespace(isa=lambda isa=isa: isa))
        assert linear._own_product(most, dtype)
        assert not linear._own_product(most + 1, dtype)


def test_what_the_cpu_multiplies_is_read_from_its_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, expected in (
        (frozenset({"avx2"}), (True, False)),
        (frozenset({"avx512_fp16"}), (True, True)),
    ):
        monkeypatch.setattr(linear, "cpu_flags", lambda flags=flags: flags)
        linear._multiplies.cache_clear()
        got = (linear._multiplies(torch.float32), linear._multiplies(torch.float16))
        linear._multiplies.cache_clear()
        assert got == expected


def test_a_large_weight_is_dequantized_into_memory_that_is_used_again() -> None:
    status = native_status()
    if not status.loaded:
        pytest.skip(str(status))
    w = quantize_nf4(random_x(1024, 512))  # 2 MiB in fp32
    first = dequantize_4bit(w)
    kept = first.clone()
    address = first.data_ptr()
    other = dequantize_4bit(w)
    assert other.data_ptr() != address
    assert address % 64 == 0
    del first
    again = dequantize_4bit(w)
    assert again.data_ptr() == address
    assert torch.equal(again, kept)
    again.zero_()
    assert torch.equal(other, kept)
