"""PEFT's LoRA on a bitsandbytes base and on plain ones, in the dtypes that people train with.

fp32 adapters: what get_peft_model makes of a 16-bit base unless told otherwise; x is cast to fp32
for the adapter and its result back. autocast: the same layer as transformers.Trainer(bf16=True)
runs it. 16-bit adapters: get_peft_model(..., autocast_adapter_dtype=False).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from benchmarks.cases import RANK, Case
from benchmarks.contestants.bnb import linear4bit, packed_note, packs
from benchmarks.contestants.entry import Contestant, Entry, Unavailable, forward_backward, need
from benchmarks.inputs import Inputs

__all__ = ["CONTESTANTS", "lora_entry"]

_HINT = "not installed: pip install peft"


class _Model(nn.Module):
    """The smallest model there is."""

    def __init__(self, proj: nn.Module, device: torch.device, *, in_4bit: bool) -> None:
        super().__init__()
        self.proj = proj
        # PEFT asks for the device of a model's first parameter; a 4-bit layer may have none
        self.other = nn.Parameter(torch.empty(1, device=device), requires_grad=False)
        self.is_loaded_in_4bit = in_4bit

    def forward(self, x: Tensor) -> Tensor:
        """Apply its only layer."""
        y: Tensor = self.proj(x)
        return y


def lora_entry(
    case: Case,
    inputs: Inputs,
    base: nn.Module,
    *,
    autocast: bool = False,
    adapter_dtype: torch.dtype = torch.float32,
    register: Callable[[Any], Any] | None = None,
    expected: type[nn.Module] | None = None,
) -> Entry:
    """Wrap a base layer by get_peft_model, and run the wrapped layer as the case says.

    `register` may change PEFT's config; `expected` is the layer that PEFT must make of it then.
    """
    layer = _wrap(base, inputs, register)
    if expected is not None and not isinstance(layer, expected):
        raise Unavailable(f"PEFT made a {type(layer).__name__} instead of a {expected.__name__}")
    for tree, value in ((layer.lora_A, inputs.lora_a), (layer.lora_B, inputs.lora_b)):
        tree["default"].to(value.device, adapter_dtype)
        tree["default"].weight.data.copy_(value)
    dtype = case.torch_dtype
    if case.op == "decode":
        return Entry(functools.partial(layer.eval(), inputs.x.clone()))
    parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    run: Callable[[Tensor], Tensor] = layer.train()
    if autocast:
        run = functools.partial(_autocast, layer, dtype)
    x = inputs.x.clone().requires_grad_()
    return Entry(functools.partial(forward_backward, run, x, parameters, inputs.grad_y))


def _wrap(base: nn.Module, inputs: Inputs, register: Callable[[Any], Any] | None) -> Any:
    peft = need("peft", _HINT)
    alpha = round(inputs.scaling * RANK)
    config = peft.LoraConfig(r=RANK, lora_alpha=alpha, lora_dropout=0.0, target_modules=["proj"])
    model = _Model(base, inputs.x.device, in_4bit=type(base).__name__ == "Linear4bit")
    wrapped = peft.get_peft_model(model, register(config) if register else config)
    return wrapped.base_model.model.proj


def _autocast(layer: nn.Module, dtype: torch.dtype, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, dtype=dtype):
        y: Tensor = layer(x)
    return y


def _fp32_adapters(case: Case, inputs: Inputs) -> Entry:
    return lora_entry(case, inputs, linear4bit(inputs.weight, case.torch_dtype))


def _autocasting(case: Case, inputs: Inputs) -> Entry | None:
    if case.dtype == "fp32":
        return None
    base = linear4bit(inputs.weight, case.torch_dtype)
    return lora_entry(case, inputs, base, autocast=True)


def _16bit_adapters(case: Case, inputs: Inputs) -> Entry | None:
    if case.dtype == "fp32":
        return None
    base = linear4bit(inputs.weight, case.torch_dtype)
    return lora_entry(case, inputs, base, adapter_dtype=case.torch_dtype)


def _inference(case: Case, inputs: Inputs) -> Entry | None:
    if not case.adapter:
        return None
    if packs(inputs.x.device.type):
        raise Unavailable("this CPU has avx512_bf16, where bitsandbytes packs")
    return _fp32_adapters(case, inputs)


def _packed_inference(case: Case, inputs: Inputs) -> Entry | None:
    if not case.adapter or inputs.x.device.type != "cpu":
        return None
    if not packs("cpu"):
        raise Unavailable("bitsandbytes packs on CPUs with avx512_bf16 only; this one has none")
    layer = linear4bit(inputs.weight, case.torch_dtype)
    entry = lora_entry(case, inputs, layer)
    return Entry(entry.call, note=lambda: packed_note(layer))


def _on_plain(
    dtype: torch.dtype, *, autocast: bool = False, own_adapters: bool = False
) -> Callable[[Case, Inputs], Entry | None]:
    def prepare(case: Case, inputs: Inputs) -> Entry | None:
        if not case.adapter:
            return None
        if case.dtype == "fp32" and (autocast or own_adapters):
            return None  # the same in each dtype of a case: once is enough
        base = nn.Linear(case.shape[1], case.shape[0], bias=False, device="meta")
        base.weight = nn.Parameter(inputs.weight.to(dtype), requires_grad=False)
        inputs = _cast(inputs, dtype)
        case = attrs.evolve(case, dtype=_NAMES[dtype])
        adapters = dtype if own_adapters else torch.float32
        return lora_entry(case, inputs, base, autocast=autocast, adapter_dtype=adapters)

    return prepare


_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    return attrs.evolve(inputs, x=inputs.x.to(dtype), grad_y=inputs.grad_y.to(dtype))


CONTESTANTS = (
    Contestant("PEFT + bitsandbytes, fp32 adapters", ("lora",), _fp32_adapters),
    Contestant("PEFT + bitsandbytes, autocast", ("lora",), _autocasting),
    Contestant("PEFT + bitsandbytes, 16-bit adapters", ("lora",), _16bit_adapters),
    Contestant("PEFT + bitsandbytes", ("decode",), _inference),
    Contestant("PEFT + bitsandbytes, packed", ("decode",), _packed_inference),
    Contestant("PEFT, bf16 base, fp32 adapters", ("lora", "decode"), _on_plain(torch.bfloat16)),
    Contestant("PEFT, bf16 base, autocast", ("lora",), _on_plain(torch.bfloat16, autocast=True)),
    Contestant(
        "PEFT, bf16 base, bf16 adapters", ("lora",), _on_plain(torch.bfloat16, own_adapters=True)
    ),
    Contestant("PEFT, fp32 base", ("lora", "decode"), _on_plain(torch.float32)),
)
