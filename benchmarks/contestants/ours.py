"""tunesmith: the ops, and the layers that a user gets."""

from __future__ import annotations

import functools

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contestants.entry import Contestant, Entry, forward_backward
from benchmarks.contestants.peft import lora_entry
from benchmarks.inputs import Inputs
from tunesmith.nn.nf4_linear import NF4Linear
from tunesmith.ops import NF4Weight, dequantize_nf4, linear_nf4, quantize_nf4

__all__ = ["CONTESTANTS"]


@functools.lru_cache(maxsize=1)
def _nf4(weight: Tensor) -> NF4Weight:
    return quantize_nf4(weight)


def _quantize(case: Case, inputs: Inputs) -> Entry:
    return Entry(functools.partial(quantize_nf4, inputs.weight))


def _dequantize(case: Case, inputs: Inputs) -> Entry:
    return Entry(functools.partial(dequantize_nf4, _nf4(inputs.weight)))


def _op(case: Case, inputs: Inputs) -> Entry:
    return _op_entry(case, inputs, inputs.lora_a, inputs.lora_b)


def _op_16bit_adapter(case: Case, inputs: Inputs) -> Entry | None:
    if case.dtype == "fp32" or not case.adapter:
        return None
    kind = case.torch_dtype
    return _op_entry(case, inputs, inputs.lora_a.to(kind), inputs.lora_b.to(kind))


def _op_entry(case: Case, inputs: Inputs, lora_a: Tensor, lora_b: Tensor) -> Entry:
    nf4 = _nf4(inputs.weight)
    if case.op == "lora":
        x, a, b = (each.clone().requires_grad_() for each in (inputs.x, lora_a, lora_b))

        def layer(x: Tensor) -> Tensor:
            return linear_nf4(x, nf4, lora=(a, b, inputs.scaling))

        return Entry(functools.partial(forward_backward, layer, x, [a, b], inputs.grad_y))
    x = inputs.x.clone().requires_grad_(case.op == "linear")
    lora = (lora_a, lora_b, inputs.scaling) if case.adapter else None
    return Entry(functools.partial(linear_nf4, x, nf4, lora=lora))


def _layer(case: Case, inputs: Inputs) -> Entry:
    layer = NF4Linear(_nf4(inputs.weight))
    if case.adapter:
        return _adapted(case, inputs, layer, autocast=False)
    x = inputs.x.clone().requires_grad_(case.op == "linear")
    return Entry(functools.partial(layer.train(case.op == "linear"), x))


def _layer_autocast(case: Case, inputs: Inputs) -> Entry | None:
    if case.dtype == "fp32":
        return None
    return _adapted(case, inputs, NF4Linear(_nf4(inputs.weight)), autocast=True)


def _adapted(case: Case, inputs: Inputs, layer: NF4Linear, *, autocast: bool) -> Entry:
    from tunesmith.nn.lora_linear import LoraLinear, register  # imports PEFT

    return lora_entry(
        case, inputs, layer, autocast=autocast, register=register, expected=LoraLinear
    )


CONTESTANTS = (
    Contestant("ours", ("quantize",), _quantize),
    Contestant("ours", ("dequantize",), _dequantize),
    Contestant("ours (op)", ("linear", "lora", "decode"), _op),
    Contestant("ours (op), 16-bit adapters", ("lora", "decode"), _op_16bit_adapter),
    Contestant("ours (layer)", ("linear", "lora", "decode"), _layer),
    Contestant("ours (layer), autocast", ("lora",), _layer_autocast),
)
