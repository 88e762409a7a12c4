"""The tensors of a case: the same for every contestant, the same in every run."""

from __future__ import annotations

import functools
import math

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import RANK, Case

__all__ = ["Inputs", "answer", "inputs_of"]


@attrs.frozen(eq=False)
class Inputs:
    """What a contestant may use; it takes copies of what it writes to."""

    weight: Tensor
    """W [out_features, in_features] in the case's dtype."""
    x: Tensor
    """[tokens, in_features] in the case's dtype."""
    grad_y: Tensor
    """[tokens, out_features] in the case's dtype."""
    lora_a: Tensor
    """A [rank, in_features] in fp32."""
    lora_b: Tensor
    """B [out_features, rank] in fp32; not zero, as it is after the first step."""
    scaling: float = 2.0


def inputs_of(case: Case, device: str) -> Inputs:
    """Make a case's tensors; cases of one shape and dtype that follow each other share a weight."""
    rows, columns = case.shape
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(device)

    return Inputs(
        weight=_weight(case.shape, case.torch_dtype, device),
        x=normal(case.tokens, columns).to(case.torch_dtype),
        grad_y=normal(case.tokens, rows).to(case.torch_dtype),
        lora_a=normal(RANK, columns, std=1 / math.sqrt(columns)),
        lora_b=normal(rows, RANK, std=0.02),
    )


@functools.lru_cache(maxsize=1)
def _weight(shape: tuple[int, int], dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(*shape, generator=generator) * 0.02).to(device, dtype)


def answer(case: Case, inputs: Inputs) -> tuple[Tensor, ...] | None:
    """Return what a contestant's result must resemble: fp32, from the weight before quantization.

    lora: y, dX, dA, dB; linear and decode: y; dequantize: W; quantize has no answer to compare.
    """
    if case.op == "quantize":
        return None
    weight = inputs.weight.float()
    if case.op == "dequantize":
        return (weight,)
    x = inputs.x.float()
    y = F.linear(x, weight)  # [tokens, out_features]
    if not case.adapter:
        return (y,)
    s = x @ inputs.lora_a.T  # [tokens, rank]
    y += inputs.scaling * s @ inputs.lora_b.T
    if case.op == "decode":
        return (y,)
    grad_y = inputs.grad_y.float()
    grad_s = inputs.scaling * grad_y @ inputs.lora_b  # [tokens, rank]
    grad_x = grad_y @ weight + grad_s @ inputs.lora_a  # [tokens, in_features]
    return y, grad_x, grad_s.T @ x, inputs.scaling * grad_y.T @ s
