"""bitsandbytes: its functions, and its Linear4bit in training and in inference.

On a CPU with avx512_bf16, Linear4bit.forward repacks its weight at the first call that is not in
training mode and whose x requires no gradient. That is its fast path for decoding, and it is not
free: absmax is rounded to bf16 and the nested scales are given up. Saving packs back and quantizes
absmax anew, so what is saved is not what was loaded (bitsandbytes 0.50.2, a normal weight of
4096 x 4096: 29% of the absmax codes and a quarter of the dequantized bf16 values are others). On
CPUs without it inference takes the same path as training: dequantize, then F.linear.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contestants.entry import Contestant, Entry, Unavailable, need
from benchmarks.inputs import Inputs

__all__ = ["CONTESTANTS", "linear4bit", "packs"]

_HINT = "not installed: pip install bitsandbytes"


def linear4bit(weight: Tensor, compute_dtype: Any = None) -> Any:
    """Return a Linear4bit with that weight in NF4 and nested scales."""
    bnb = need("bitsandbytes", _HINT)
    rows, columns = weight.shape
    layer = bnb.nn.Linear4bit(
        columns, rows, bias=False, quant_type="nf4", compute_dtype=compute_dtype, device="meta"
    )
    packed, state = _quantized(weight)
    layer.weight = bnb.nn.Params4bit(
        packed.clone(),
        requires_grad=False,
        quant_state=_copy_of(state),
        quant_type="nf4",
        bnb_quantized=True,
        module=layer,
    )
    return layer


def packs(device_type: str) -> bool:
    """Return whether Linear4bit repacks its weight for inference on this CPU."""
    functional = need("bitsandbytes.functional", _HINT)
    return device_type == "cpu" and bool(functional.has_avx512bf16())


@functools.lru_cache(maxsize=1)
def _quantized(weight: Tensor) -> tuple[Tensor, Any]:
    functional = need("bitsandbytes.functional", _HINT)
    packed, state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return packed, state


def _copy_of(state: Any) -> Any:
    # the packed path writes into it
    return copy.deepcopy(state)


def _quantize(case: Case, inputs: Inputs) -> Entry:
    functional = need("bitsandbytes.functional", _HINT)
    return Entry(
        functools.partial(
            functional.quantize_4bit,
            inputs.weight,
            blocksize=64,
            compress_statistics=True,
            quant_type="nf4",
        )
    )


def _dequantize(case: Case, inputs: Inputs) -> Entry:
    functional = need("bitsandbytes.functional", _HINT)
    return Entry(functools.partial(functional.dequantize_4bit, *_quantized(inputs.weight)))


def _training(case: Case, inputs: Inputs) -> Entry:
    layer = linear4bit(inputs.weight, case.torch_dtype)
    return Entry(functools.partial(layer.train(), inputs.x.clone().requires_grad_()))


def _inference(case: Case, inputs: Inputs) -> Entry | None:
    if case.adapter:
        return None
    if packs(inputs.x.device.type):
        raise Unavailable("this CPU has avx512_bf16, where bitsandbytes packs")
    return Entry(_decoding(case, inputs))


def _packed_inference(case: Case, inputs: Inputs) -> Entry | None:
    if case.adapter or inputs.x.device.type != "cpu":
        return None
    if not packs("cpu"):
        raise Unavailable("bitsandbytes packs on CPUs with avx512_bf16 only; this one has none")
    call = _decoding(case, inputs)
    return Entry(call, note=lambda: packed_note(call.func))


def _decoding(case: Case, inputs: Inputs) -> functools.partial[Tensor]:
    layer = linear4bit(inputs.weight, case.torch_dtype).eval()
    return functools.partial(layer, inputs.x.clone())


def packed_note(layer: Any) -> str:
    """Say which kernel a Linear4bit that ran in inference mode has used."""
    state = layer.weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return "did not pack"
    ops = need("bitsandbytes.backends.cpu.ops")
    own = getattr(ops, "gemm_4bit_forward_kernel", None) is None
    return "own gemv_4bit" if own else "gemm_4bit_forward of kernels-community"


CONTESTANTS = (
    Contestant("bitsandbytes", ("quantize",), _quantize),
    Contestant("bitsandbytes", ("dequantize",), _dequantize),
    Contestant("bitsandbytes", ("linear",), _training),
    Contestant("bitsandbytes", ("decode",), _inference),
    Contestant("bitsandbytes, packed", ("decode",), _packed_inference),
)
