"""torch's own check of an op: its schema, fake kernel and tracing agree with what it does."""

import pytest
import torch

from tunesmith.ops import quantize_nf4
from tunesmith.ops.schema import DTYPES

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
def test_quantize_nf4_is_a_sound_op(numel: int, dtype: torch.dtype) -> None:
    opcheck(torch.ops.tunesmith.quantize_nf4.default, (torch.randn(numel).to(dtype), 64))


@pytest.mark.parametrize("blocks", [0, 1, 300])
def test_quantize_absmax_is_a_sound_op(blocks: int) -> None:
    opcheck(torch.ops.tunesmith.quantize_absmax.default, (torch.rand(blocks),))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize_nf4_is_a_sound_op(dtype: torch.dtype, nested: bool) -> None:
    w = quantize_nf4(torch.randn(7, 33), nested=nested)
    args = (w.packed, w.absmax, w.nested_absmax, w.nested_offset, [7, 33], 64, dtype)
    opcheck(torch.ops.tunesmith.dequantize_nf4.default, args)
