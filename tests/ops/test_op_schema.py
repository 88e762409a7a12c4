"""torch's own check of an op: its schema, fake kernel and tracing agree with what it does."""

import pytest
import torch

from tunesmith.ops import quantize_4bit
from tunesmith.ops.dtypes import DTYPES
from tunesmith.ops.four_bit import QUANT_TYPES

CHECKS = (
    "test_schema",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_autograd_registration",
)


def opcheck(op: object, args: tuple[object, ...]) -> None:
    torch.library.opcheck(op, args, test_utils=CHECKS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [0, 1, 64, 130])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_quantize_4bit_is_a_sound_op(quant_type: str, numel: int, dtype: torch.dtype) -> None:
    weight = torch.randn(numel).to(dtype)
    opcheck(torch.ops.tunesmith.quantize_4bit.default, (weight, 64, quant_type))


@pytest.mark.parametrize("blocks", [0, 1, 300])
def test_quantize_absmax_is_a_sound_op(blocks: int) -> None:
    opcheck(torch.ops.tunesmith.quantize_absmax.default, (torch.rand(blocks),))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_dequantize_4bit_is_a_sound_op(quant_type: str, dtype: torch.dtype, nested: bool) -> None:
    w = quantize_4bit(torch.randn(7, 33), nested=nested, quant_type=quant_type)
    args = (w.packed, w.absmax, w.nested_absmax, w.nested_offset, [7, 33], 64, quant_type, dtype)
    opcheck(torch.ops.tunesmith.dequantize_4bit.default, args)
