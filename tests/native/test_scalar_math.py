"""The arithmetic that CPU and GPU share (four_bit.h, floats.h), number by number against torch."""

import itertools
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from tunesmith.ops.tables import DYNAMIC_MAP, FP4_CODE, FP4_ORDER, NF4_CODE


def every_half(dtype: torch.dtype) -> Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def float32_from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_16_bit_number_widens_as_in_torch(native: ModuleType, name: str) -> None:
    widen = getattr(native, f"{name}_to_float32")
    expected = every_half(getattr(torch, name)).float().tolist()
    for bits, value in enumerate(expected):
        ours = widen(bits)
        assert ours == value or (math.isnan(ours) and math.isnan(value)), hex(bits)
        assert math.copysign(1, ours) == math.copysign(1, value)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_numbers_narrow_to_the_nearest_with_ties_to_even(native: ModuleType, name: str) -> None:
    dtype = getattr(torch, name)
    narrow = getattr(native, f"float32_to_{name}")
    numbers = every_half(dtype)[::5]
    ends = numbers[numbers.isfinite()].float().view(torch.int32).long()
    halfway = 0x1000 if name == "float16" else 0x8000
    around = [ends + offset for offset in (0, 1, halfway - 1, halfway, halfway + 1)]
    values = float32_from_bits(torch.cat(around))
    values = torch.cat(
        [values, torch.tensor([65519.0, 65520.0, 3.4e38, 1e-45, 2.0**-25, 2.0**-24])]
    )
    values = values[~values.isnan()]
    expected = (values.to(dtype).view(torch.int16).int() & 0xFFFF).tolist()
    wrong = [v for v, e in zip(values.tolist(), expected, strict=True) if narrow(v) != e]
    assert wrong == []


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_nan_stays_nan_and_infinity_stays_infinite(native: ModuleType, name: str) -> None:
    narrow = getattr(native, f"float32_to_{name}")
    widen = getattr(native, f"{name}_to_float32")
    assert math.isnan(widen(narrow(math.nan)))
    assert widen(narrow(math.inf)) == math.inf
    assert widen(narrow(-math.inf)) == -math.inf


def test_the_tables_are_those_of_the_reference(native: ModuleType) -> None:
    assert [native.nf4_value(code) for code in range(16)] == NF4_CODE.tolist()
    assert [native.fp4_value(code) for code in range(16)] == FP4_CODE.tolist()
    assert [native.dynamic_value(code) for code in range(256)] == DYNAMIC_MAP.tolist()


@pytest.mark.parametrize(("name", "table"), [("nf4", NF4_CODE), ("dynamic", DYNAMIC_MAP)])
def test_a_code_stands_for_itself_and_a_tie_takes_the_lower(
    native: ModuleType, name: str, table: Tensor
) -> None:
    encode = getattr(native, f"{name}_code")
    for code, value in enumerate(table.tolist()):
        assert encode(value) == code
    for code, (low, high) in enumerate(itertools.pairwise(table)):
        middle = (low + high) / 2
        assert encode(middle.item()) == code
        assert encode(torch.nextafter(middle, high).item()) == code + 1
    assert encode(-math.inf) == 0
    assert encode(math.inf) == len(table) - 1


def test_an_fp4_tie_takes_the_lower_and_zero_the_first_of_its_two_codes(native: ModuleType) -> None:
    codes, values = FP4_ORDER.tolist(), FP4_CODE[FP4_ORDER.int()]
    for code, value in zip(codes, values.tolist(), strict=True):
        assert native.fp4_code(value) == (0 if value == 0 else code)
    middles = (values[:-1] + values[1:]) / 2
    above = torch.nextafter(middles, torch.tensor(2.0))
    assert [native.fp4_code(value) for value in middles.tolist()] == codes[:-1]
    assert [native.fp4_code(value) for value in above.tolist()] == codes[1:]
    assert native.fp4_code(-math.inf) == codes[0]
    assert native.fp4_code(math.inf) == codes[-1]
