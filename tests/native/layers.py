"""Random linear layers, called with bare pointers as the kernels are, and their formula in fp64."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType
from typing import Any

import attrs
import torch
from torch import Tensor

from tunesmith.ops import four_bit
from tunesmith.ops.dtypes import DTYPES
from tunesmith.ops.four_bit import BLOCKSIZES, QUANT_TYPES

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, "nf4": 3, "fp4": 4}
"""Types as csrc/kernels.h numbers them."""

Place = Callable[[Tensor], int]
"""Gives a tensor's numbers a place in memory, and its address."""


def in_place(tensor: Tensor) -> int:
    """Return where a tensor lies already."""
    return tensor.data_ptr()


@attrs.frozen(kw_only=True)
class Layer:
    """The fields of csrc/kernels.h's `tunesmith_linear`, as tensors."""

    x: Tensor
    """[tokens, in_features]"""
    weight: Tensor
    """Packed, or [out_features, in_features]."""
    scales: tuple[Tensor | None, Tensor | None, Tensor | None]
    """absmax, nested_absmax and nested_offset of a 4-bit weight."""
    dense: Tensor
    """What the weight stands for, fp64 [out_features, in_features]."""
    quant_type: str
    blocksize: int
    bias: Tensor | None
    lora_a: Tensor | None
    lora_b: Tensor | None
    keep: Tensor | None
    scaling: float = 0.75
    keep_scale: float = 1.25

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def in_features(self) -> int:
        return self.x.shape[1]

    @property
    def out_features(self) -> int:
        return self.dense.shape[0]

    @property
    def rank(self) -> int:
        return 0 if self.lora_a is None else self.lora_a.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def adapter_dtype(self) -> torch.dtype:
        return torch.float32 if self.lora_a is None else self.lora_a.dtype

    def arguments(self, place: Place = in_place) -> dict[str, Any]:
        """Return what `_native.Linear` is made of."""

        def at(tensor: Tensor | None) -> int:
            return 0 if tensor is None else place(tensor)

        absmax, nested_absmax, nested_offset = self.scales
        return {
            "tokens": self.tokens,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "dtype": CODES[self.dtype],
            "type": CODES[self.quant_type or self.weight.dtype],
            "weight": at(self.weight),
            "absmax": at(absmax),
            "nested_absmax": at(nested_absmax),
            "nested_offset": at(nested_offset),
            "blocksize": self.blocksize,
            "bias": at(self.bias),
            "rank": self.rank,
            "adapter_dtype": CODES[self.adapter_dtype],
            "lora_a": at(self.lora_a),
            "lora_b": at(self.lora_b),
            "scaling": self.scaling,
            "keep": at(self.keep),
            "keep_scale": self.keep_scale,
        }

    def forward(self, native: ModuleType) -> tuple[Tensor, Tensor]:
        """Return y and s as the kernel writes them."""
        y = torch.empty(self.tokens, self.out_features, dtype=self.dtype)
        s = torch.empty(self.tokens, self.rank)
        native.linear(
            native.Linear(**self.arguments()),
            x=self.x.data_ptr(),
            s=s.data_ptr(),
            y=y.data_ptr(),
            accumulate=False,
        )
        return y, s

    def backward(self, native: ModuleType, s: Tensor, grad_y: Tensor) -> list[Tensor]:
        """Return grad_x, grad_a and grad_b as the kernel writes them."""
        grads = [
            torch.empty_like(self.x),
            torch.empty(self.rank, self.in_features, dtype=self.adapter_dtype),
            torch.empty(self.out_features, self.rank, dtype=self.adapter_dtype),
        ]
        grad_x, grad_a, grad_b = (grad.data_ptr() for grad in grads)
        native.linear_backward(
            native.Linear(**self.arguments()),
            x=self.x.data_ptr(),
            s=s.data_ptr(),
            grad_y=grad_y.data_ptr(),
            grad_x=grad_x,
            grad_a=grad_a,
            grad_b=grad_b,
            accumulate=False,
        )
        return grads

    def without_weight(self) -> Layer:
        """Return the same layer with nothing but its adapter and its bias."""
        return attrs.evolve(self, weight=torch.empty(0), dense=torch.zeros_like(self.dense))

    def rounds_adapter(self, isa: str) -> bool:
        """Return whether an instruction set rounds the adapter's factors to bf16."""
        return "bf16" in isa and self.dtype == torch.bfloat16

    def formula(self, isa: str = "") -> tuple[Tensor, Tensor]:
        """Return y and s in fp64, from factors as an instruction set rounds them."""
        rounded = to_bf16 if self.rounds_adapter(isa) else unchanged
        projected = unchanged if self.x.shape[0] <= FEW_TOKENS else rounded
        s = projected(self._dropped()) @ projected(self._a()).T
        y = self.x.double() @ self.dense.T + self.scaling * rounded(s) @ rounded(self._b()).T
        return (y if self.bias is None else y + self.bias.double()), s

    def formula_of_gradients(self, s: Tensor, grad_y: Tensor, isa: str = "") -> list[Tensor]:
        """Return grad_x, grad_a and grad_b in fp64, likewise."""
        rounded = to_bf16 if self.rounds_adapter(isa) else unchanged
        grad = grad_y.double()
        projected = unchanged if self.x.shape[0] <= FEW_TOKENS else rounded
        grad_s = rounded(self.scaling * grad @ projected(self._b()))
        through_adapter = grad_s @ rounded(self._a())
        if self.keep is not None:
            through_adapter *= self.keep * self.keep_scale
        return [
            grad @ self.dense + through_adapter,
            grad_s.T @ rounded(self._dropped()),
            self.scaling * grad.T @ rounded(s.double()),
        ]

    def assert_output_close(self, y: Tensor, s: Tensor, isa: str = "") -> None:
        """Compare what a forward pass wrote with the formula."""
        expected_y, expected_s = self.formula(isa)
        assert_close(y, expected_y)
        assert_close(s, expected_s)

    def assert_gradients_close(
        self, grads: list[Tensor], s: Tensor, grad_y: Tensor, isa: str = ""
    ) -> None:
        """Compare what a backward pass wrote with the formula."""
        grad_x, grad_a, grad_b = grads
        expected_x, expected_a, expected_b = self.formula_of_gradients(s, grad_y, isa)
        assert_close(grad_x, expected_x)
        # what flows into s may be rounded the other way where it lies halfway
        assert_close(grad_a, expected_a, self.dtype if self.rounds_adapter(isa) else None)
        assert_close(grad_b, expected_b)

    def _dropped(self) -> Tensor:
        x = self.x.double()
        return x if self.keep is None else x * self.keep * self.keep_scale

    def _a(self) -> Tensor:
        none = torch.zeros(0, self.in_features, dtype=torch.float64)
        return none if self.lora_a is None else self.lora_a.double()

    def _b(self) -> Tensor:
        none = torch.zeros(self.out_features, 0, dtype=torch.float64)
        return none if self.lora_b is None else self.lora_b.double()


def random_layer(
    tokens: int,
    in_features: int,
    out_features: int,
    *,
    seed: int = 0,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
) -> Layer:
    """Return a layer of that size; whatever else it is comes from the seed."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    dtype = dtype or choose.choice(DTYPES)
    adapter_dtype = choose.choice(DTYPES)
    rank = choose.choice((0, 1, 5, 8, 16, 33)) if rank is None else rank
    quant_type, blocksize = choose.choice(("", *QUANT_TYPES)), choose.choice(BLOCKSIZES)
    shape = (out_features, in_features)
    weight = numbers(*shape, dtype=dtype)
    scales: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    dense = weight.double()
    if quant_type:
        weight, absmax = four_bit.reference_quantize_4bit(weight, blocksize, quant_type)
        nested_absmax = nested_offset = None
        if choose.random() < 0.5:
            absmax, nested_absmax, nested_offset = four_bit.reference_quantize_absmax(absmax)
        scales = (absmax, nested_absmax, nested_offset)
        dense = four_bit.reference_dequantize_4bit(
            weight,
            absmax,
            nested_absmax,
            nested_offset,
            shape,
            blocksize,
            quant_type,
            torch.float32,
        ).double()
    return Layer(
        x=numbers(tokens, in_features, dtype=dtype),
        weight=weight,
        scales=scales,
        dense=dense,
        quant_type=quant_type,
        blocksize=blocksize,
        bias=numbers(out_features, dtype=dtype) if choose.random() < 0.5 else None,
        lora_a=numbers(rank, in_features, dtype=adapter_dtype) if rank else None,
        lora_b=numbers(out_features, rank, dtype=adapter_dtype) if rank else None,
        keep=torch.rand(tokens, in_features, generator=generator) < 0.8
        if rank and choose.random() < 0.5
        else None,
    )


# up to so many the kernels project into the low rank in fp32, whatever x is (csrc/cpu/linear.cpp)
FEW_TOKENS = 8

# of the largest element: a 16-bit output is rounded once, a bf16 product has factors in bf16
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def unchanged(tensor: Tensor) -> Tensor:
    """Return a tensor as it is."""
    return tensor


def to_bf16(tensor: Tensor) -> Tensor:
    """Return fp64 rounded to bf16."""
    return tensor.to(torch.bfloat16).double()


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare with what was worked out in fp64, as something of its own dtype or that one."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return
    difference = (actual.double() - expected).abs().max()
    assert difference <= TOLERANCE[dtype or actual.dtype] * expected.abs().max() + 1e-30
