"""PyTorch's own product with a weight of 16 or 32 bits: what 4 bits are compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.cases import Case
from benchmarks.contestants.entry import Contestant, Entry
from benchmarks.inputs import Inputs

__all__ = ["CONTESTANTS"]


def _linear(dtype: torch.dtype) -> Callable[[Case, Inputs], Entry | None]:
    def prepare(case: Case, inputs: Inputs) -> Entry | None:
        if case.adapter:
            return None
        x = inputs.x.to(dtype, copy=True).requires_grad_(case.op == "linear")
        return Entry(functools.partial(F.linear, x, inputs.weight.to(dtype)))

    return prepare


def _without_adapter(case: Case, inputs: Inputs) -> Entry:
    x = inputs.x.clone().requires_grad_()
    weight = inputs.weight

    def both_ways() -> None:  # not to be compared: the others have an adapter
        torch.autograd.grad(F.linear(x, weight), x, inputs.grad_y)

    return Entry(both_ways, note=lambda: "the large products alone")


CONTESTANTS = (
    Contestant("torch, no adapter", ("lora",), _without_adapter),
    Contestant("torch bf16", ("linear", "decode"), _linear(torch.bfloat16)),
    Contestant("torch fp32", ("linear", "decode"), _linear(torch.float32)),
)
