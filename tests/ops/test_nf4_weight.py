"""Quantizing and dequantizing as their users see them, whatever implements them."""

from collections.abc import Callable

import attrs
import pytest
import torch
from torch import Tensor

from tunesmith.errors import OpError, TunesmithError
from tunesmith.ops import (
    FP4Weight,
    NF4Weight,
    dequantize_4bit,
    dequantize_nf4,
    four_bit,
    quantize_4bit,
    quantize_fp4,
    quantize_nf4,
)
from tunesmith.ops.dtypes import DTYPES
from tunesmith.ops.tables import DYNAMIC_MAP


def random_weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def is_plus_zero(tensor: Tensor) -> bool:
    words = tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    return bool((words == 0).all())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_comes_back_has_the_shape_the_dtype_and_nearly_the_values(
    dtype: torch.dtype, nested: bool
) -> None:
    weight = random_weight(48, 100, dtype=dtype)
    w = quantize_nf4(weight, nested=nested)
    back = dequantize_nf4(w)
    assert back.shape == weight.shape
    assert back.dtype == dtype
    # half the widest gap between two codes, 0.3039, times the largest absmax, and the scale's error
    assert (back.float() - weight.float()).abs().max() < 0.155 * weight.float().abs().max()
    for other in DTYPES:
        assert dequantize_nf4(w, other).dtype == other


def test_element_0_is_the_high_nibble_and_element_1_the_low_one() -> None:
    weight = torch.zeros(64)
    weight[0], weight[1], weight[2] = 1.0, -1.0, -1.0
    w = quantize_nf4(weight, nested=False)
    assert w.packed[:2].tolist() == [0xF0, 0x07]
    assert torch.equal(dequantize_nf4(w), weight)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp4_comes_back_with_nearly_the_values(dtype: torch.dtype, nested: bool) -> None:
    weight = random_weight(48, 100, dtype=dtype)
    w = quantize_fp4(weight, nested=nested)
    back = dequantize_4bit(w)
    assert (back.shape, back.dtype) == (weight.shape, dtype)
    # half the widest gap, from 2/3 to 1, and the scale's error
    assert (back.float() - weight.float()).abs().max() < 0.17 * weight.float().abs().max()
    assert is_plus_zero(dequantize_4bit(quantize_fp4(torch.zeros(5, 77), nested=nested)))


def test_fp4_holds_its_own_values_exactly() -> None:
    twelfths = torch.tensor([0, 1 / 16, 2, 3, 4, 6, 8, 12.0]) / 12
    weight = torch.cat([twelfths, -twelfths]).repeat(4)
    w = quantize_fp4(weight, nested=False)
    assert torch.equal(dequantize_4bit(w), weight)
    # bit 3 is the sign: the second half's codes are the first's with it set, but for 0
    assert w.packed[:8].tolist() == [0x01, 0x67, 0x45, 0x23, 0x09, 0xEF, 0xCD, 0xAB]


def test_each_kind_is_made_by_its_name() -> None:
    weight = random_weight(64)
    assert type(quantize_4bit(weight)) is type(quantize_nf4(weight)) is NF4Weight
    assert type(quantize_4bit(weight, quant_type="fp4")) is type(quantize_fp4(weight)) is FP4Weight
    assert not torch.equal(quantize_fp4(weight).packed, quantize_nf4(weight).packed)
    with pytest.raises(OpError, match="got quant_type 'int4'; allowed are nf4, fp4"):
        quantize_4bit(weight, quant_type="int4")
    with pytest.raises(OpError, match="got quant_type ''"):
        torch.ops.tunesmith.quantize_4bit(weight, 64, "")


@pytest.mark.parametrize("nested", [False, True])
def test_a_holder_says_what_it_holds(nested: bool) -> None:
    w = quantize_nf4(random_weight(129, 127, dtype=torch.bfloat16), 128, nested)
    assert w.nested is nested
    assert (w.shape, w.dtype, w.blocksize) == (torch.Size([129, 127]), torch.bfloat16, 128)
    assert w.device == torch.device("cpu")
    assert w.packed.shape == (8192,)  # 16383 elements
    assert w.absmax.shape == (128,)
    assert w.absmax.dtype == (torch.uint8 if nested else torch.float32)
    assert w.nbytes == 8192 + (128 + 4 + 4 if nested else 4 * 128)


def test_a_holder_is_frozen() -> None:
    w = quantize_nf4(random_weight(64))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        w.blocksize = 128  # type: ignore[misc]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(0,), (0, 64), (3, 0, 5)])
def test_no_elements_go_there_and_back(shape: tuple[int, ...], nested: bool) -> None:
    w = quantize_nf4(torch.empty(shape), nested=nested)
    assert w.packed.numel() == w.absmax.numel() == 0
    assert dequantize_nf4(w).shape == shape
    if nested:
        assert w.nested_offset == 0


def test_a_scalar_tensor_goes_there_and_back() -> None:
    assert dequantize_nf4(quantize_nf4(torch.tensor(-3.0), nested=False)) == torch.tensor(-3.0)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_zeros_is_code_7_and_comes_back_as_zeros(
    dtype: torch.dtype, nested: bool
) -> None:
    w = quantize_nf4(torch.zeros(5, 77, dtype=dtype), nested=nested)
    assert (w.packed == 0x77).all()
    assert is_plus_zero(dequantize_nf4(w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_block_of_zeros_among_others_comes_back_as_plus_zero_through_nesting(
    dtype: torch.dtype,
) -> None:
    # the scale of a zero block is off by the rounding of its code, either way
    below_zero = 0
    for largest in range(2, 40):
        weight = random_weight(256, 64).clamp(-1, 1)
        weight[5] = 0
        weight[9] *= largest
        w = quantize_nf4(weight.to(dtype))
        assert (w.packed.view(256, 32)[5] == 0x77).all()
        assert is_plus_zero(dequantize_nf4(w)[5])
        parts = (w.packed, w.absmax, w.nested_absmax, w.nested_offset)
        assert is_plus_zero(
            four_bit.reference_dequantize_4bit(*parts, w.shape, 64, "nf4", dtype)[5]
        )
        assert w.nested_absmax is not None
        assert w.nested_offset is not None
        value = DYNAMIC_MAP[int(w.absmax[5])]
        below_zero += int(value * w.nested_absmax[0] + w.nested_offset < 0)
    assert below_zero > 0


def test_the_weight_is_left_alone_and_needs_no_gradient_afterwards() -> None:
    weight = random_weight(4, 64).requires_grad_()
    before = weight.detach().clone()
    w = quantize_nf4(weight)
    assert torch.equal(weight, before)
    assert w.nested_absmax is not None
    parts = (w.packed, w.absmax, w.nested_absmax, w.nested_offset, dequantize_nf4(w))
    assert not any(part.requires_grad for part in parts if part is not None)


@pytest.mark.parametrize(
    "quantize", [torch.ops.tunesmith.quantize_4bit, four_bit.reference_quantize_4bit]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_refused_by_name_and_block(
    quantize: Callable[[Tensor, int, str, str], tuple[Tensor, Tensor]], bad: float
) -> None:
    weight = random_weight(3, 100)
    weight[2, 99] = bad  # element 299 of block 4, which ends there
    with pytest.raises(OpError, match=r"^layers\.0\.q_proj: block 4 \(elements 256 to 299 of "):
        quantize(weight, 64, "nf4", "layers.0.q_proj")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64, torch.bool])
def test_another_dtype_is_refused_with_what_is_allowed(dtype: torch.dtype) -> None:
    with pytest.raises(OpError, match=r"bfloat16, float16, float32 can be quantized.*cast"):
        quantize_nf4(torch.ones(64, dtype=dtype))
    with pytest.raises(OpError, match=r"bfloat16, float16, float32 can be dequantized into.*cast"):
        dequantize_nf4(quantize_nf4(torch.ones(64)), dtype)


@pytest.mark.parametrize("blocksize", [-64, 0, 32, 63, 65, 100, 8192])
def test_another_block_size_is_refused_with_what_is_allowed(blocksize: int) -> None:
    with pytest.raises(OpError, match=rf"got blocksize {blocksize}; allowed are 64, 128, .*4096"):
        quantize_nf4(torch.ones(64), blocksize)


def test_a_sparse_tensor_is_refused() -> None:
    with pytest.raises(OpError, match=r"sparse_coo tensor; only dense .* call \.to_dense\(\)"):
        quantize_nf4(torch.eye(64).to_sparse())


def test_a_mean_beyond_fp32_is_refused_when_nested() -> None:
    weight = torch.full((64 * 8,), 3e38)
    with pytest.raises(OpError, match="nested=False"):
        quantize_nf4(weight)
    assert torch.equal(dequantize_nf4(quantize_nf4(weight, nested=False)), weight)


def test_parts_that_do_not_fit_together_are_refused() -> None:
    w = quantize_nf4(random_weight(10, 64))
    misfits = [
        ({"packed": w.packed[:-1]}, r"packed: got uint8 \[319\].* needs uint8 \[320\]"),
        ({"absmax": w.absmax[:-1]}, r"absmax codes: got uint8 \[9\]"),
        ({"nested_absmax": torch.zeros(2)}, r"nested_absmax: got float32 \[2\]"),
        ({"nested_absmax": None}, "only one of nested_absmax and nested_offset"),
        ({"nested_offset": torch.zeros(1)}, r"nested_offset: got float32 \[1\]"),
        ({"absmax": w.absmax.float()}, r"absmax codes: got float32"),
        ({"nested_absmax": None, "nested_offset": None}, r"absmax: got uint8"),
        ({"shape": (11, 64)}, "packed"),
        ({"shape": (-10, -64)}, "cannot be negative"),
        ({"blocksize": 32}, "allowed are 64"),
        ({"dtype": torch.float64}, "got dtype float64"),
    ]
    for change, message in misfits:
        with pytest.raises(OpError, match=message):
            attrs.evolve(w, **change)


def test_parts_on_two_devices_are_refused() -> None:
    w = quantize_nf4(random_weight(10, 64))
    with pytest.raises(OpError, match=r"on meta, but the packed data is on cpu.*one device"):
        attrs.evolve(w, absmax=w.absmax.to("meta"))


def test_the_ops_themselves_refuse_what_does_not_fit() -> None:
    # kernels get bare pointers: a short buffer must be found before
    w = quantize_nf4(random_weight(10, 64), nested=False)
    with pytest.raises(OpError, match="packed"):
        torch.ops.tunesmith.dequantize_4bit(
            w.packed, w.absmax, None, None, [11, 64], 64, "nf4", torch.float32
        )
    with pytest.raises(OpError, match="absmax"):
        torch.ops.tunesmith.quantize_absmax(torch.ones(4, dtype=torch.float16))


def test_an_op_error_is_a_tunesmith_error_and_a_value_error() -> None:
    assert issubclass(OpError, TunesmithError)
    assert issubclass(OpError, ValueError)


@pytest.mark.parametrize("nested", [False, True])
def test_on_the_meta_device_shapes_and_dtypes_come_out(nested: bool) -> None:
    w = quantize_nf4(torch.empty(33, 65, device="meta", dtype=torch.bfloat16), nested=nested)
    assert isinstance(w, NF4Weight)
    assert w.device.type == "meta"
    out = dequantize_nf4(w, torch.float16)
    assert (out.device.type, out.dtype, out.shape) == ("meta", torch.float16, (33, 65))
