"""torchao: the NF4 tensor that torchtune trains QLoRA with."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contestants.entry import Contestant, Entry, Unavailable, forward_backward, need
from benchmarks.inputs import Inputs

__all__ = ["CONTESTANTS"]

# where torchao 0.18 has it, and where it was before
_MODULES = (
    "torchao.quantization.quantize_.workflows.nf4.nf4_tensor",
    "torchao.dtypes.nf4tensor",
)
_HINT = "not installed: pip install --no-deps torchao"


def _nf4_module() -> Any:
    for name in _MODULES:
        try:
            return need(name)
        except Unavailable:
            continue
    need("torchao", _HINT)
    raise Unavailable("this torchao has no NF4 tensor where it is looked for")


def _scaler_block(weight: Tensor) -> int:
    # it takes whole blocks only
    blocks = weight.numel() // 64
    return next(size for size in (256, 64, 32, 16, 8, 4, 2, 1) if blocks % size == 0)


@functools.lru_cache(maxsize=1)
def _nf4(weight: Tensor) -> Any:
    return _nf4_module().to_nf4(weight, 64, _scaler_block(weight))


def _note(weight: Tensor) -> str:
    size = _scaler_block(weight)
    return "" if size == 256 else f"scales in blocks of {size}, 256 do not divide them"


def _quantize(case: Case, inputs: Inputs) -> Entry:
    to_nf4 = _nf4_module().to_nf4
    weight = inputs.weight
    return Entry(
        functools.partial(to_nf4, weight, 64, _scaler_block(weight)), note=lambda: _note(weight)
    )


def _dequantize(case: Case, inputs: Inputs) -> Entry:
    return Entry(_nf4(inputs.weight).get_original_weight)


def _linear(case: Case, inputs: Inputs) -> Entry:
    linear_nf4 = _nf4_module().linear_nf4
    nf4 = _nf4(inputs.weight)
    x = inputs.x.clone().requires_grad_(case.op != "decode")
    # torchtune's QLoRA: adapters in the dtype of x
    a, b = (each.to(x.dtype, copy=True) for each in (inputs.lora_a, inputs.lora_b))

    def adapted(nf4: Any, x: Tensor) -> Tensor:
        y: Tensor = linear_nf4(x, nf4)
        return y + inputs.scaling * F.linear(F.linear(x, a), b)

    def call(nf4: Any) -> functools.partial[Any]:
        if not case.adapter:
            return functools.partial(linear_nf4, x, nf4)
        if case.op == "decode":
            return functools.partial(adapted, nf4, x)
        layer = functools.partial(adapted, nf4)
        parameters = [a.requires_grad_(), b.requires_grad_()]
        return functools.partial(forward_backward, layer, x, parameters, inputs.grad_y)

    return Entry(call(nf4), another=lambda: call(_copy_of(nf4)), note=lambda: _note(inputs.weight))


def _copy_of(nf4: Any) -> Any:
    # its clone() and deepcopy quantize anew, with other block sizes
    names, rest = nf4.__tensor_flatten__()
    parts = {name: getattr(nf4, name).clone() for name in names}
    return type(nf4).__tensor_unflatten__(parts, rest, nf4.shape, nf4.stride())


CONTESTANTS = (
    Contestant("torchao", ("quantize",), _quantize),
    Contestant("torchao", ("dequantize",), _dequantize),
    Contestant("torchao", ("linear", "lora", "decode"), _linear),
)
