"""Every kernel on memory that ends at a page nobody may touch: `python page_ends.py KERNEL ISA`.

A process of its own, for one byte too far ends it. test_linear_bounds.py runs it.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from guards import PageEnds
from layers import CODES, random_layer

from tunesmith import _native
from tunesmith.ops.dtypes import DTYPES
from tunesmith.ops.four_bit import QUANT_TYPES

SIZES = range(1, 514)


def quantize(native: ModuleType) -> None:
    ends = PageEnds()
    for numel in SIZES:
        dtype, quant_type = DTYPES[numel % 3], QUANT_TYPES[numel // 3 % 2]
        blocksize = 64 << numel % 2
        native.quantize_4bit(
            ends.copy(torch.randn(numel).to(dtype)),
            CODES[dtype],
            numel,
            blocksize,
            CODES[quant_type],
            ends.space((numel + 1) // 2),
            ends.space(-(-numel // blocksize) * 4),
            None,
        )
        native.quantize_absmax(
            ends.copy(torch.rand(numel)),
            numel,
            ends.copy(torch.tensor(0.5)),
            ends.space(numel),
            ends.space(-(-numel // 256) * 4),
            None,
        )
        ends.clear()


def dequantize(native: ModuleType, too_far: int = 0) -> None:
    ends = PageEnds()
    for numel in SIZES:
        dtype, quant_type = DTYPES[numel % 3], QUANT_TYPES[numel // 3 % 2]
        blocks = -(-numel // 64)
        nested = (ends.copy(torch.rand(-(-blocks // 256))), ends.copy(torch.tensor(0.5)))
        plain = numel // 6 % 2 == 0
        native.dequantize_4bit(
            ends.space((numel + 1) // 2),
            ends.copy(torch.rand(blocks)) if plain else ends.space(blocks),
            *((0, 0) if plain else nested),
            numel + too_far,
            64,
            CODES[quant_type],
            CODES[dtype],
            ends.space(numel * dtype.itemsize),
            None,
        )
        ends.clear()


def linear(native: ModuleType) -> None:
    ends = PageEnds()
    for size in SIZES:
        for shape in ((3, size, 2), (2, 3, size), (size, 4, 3), (1 + size % 9, 64, size % 70 + 1)):
            layer = random_layer(*shape, seed=size)
            x_size, y_size = layer.dtype.itemsize, layer.tokens * layer.out_features
            s, x = ends.space(4 * layer.tokens * layer.rank), ends.copy(layer.x)
            y = ends.copy(torch.ones(y_size, dtype=layer.dtype))
            described = native.Linear(**layer.arguments(ends.copy))
            native.linear(described, x=x, s=s, y=y, accumulate=size % 2 == 0)
            adapter_size = layer.rank * layer.adapter_dtype.itemsize
            native.linear_backward(
                described,
                x=x,
                s=s,
                grad_y=y,
                grad_x=ends.space(layer.tokens * layer.in_features * x_size),
                grad_a=ends.space(adapter_size * layer.in_features),
                grad_b=ends.space(adapter_size * layer.out_features),
                accumulate=False,
            )
            ends.clear()


def clip_norm(native: ModuleType) -> None:
    ends = PageEnds()
    for numel in SIZES:
        dtype = DTYPES[numel % 3]
        sizes = [numel, 0, 1, 514 - numel]
        most = 0.1 if numel // 3 % 2 else torch.inf
        tensors = [ends.copy(torch.randn(size).to(dtype)) for size in sizes]
        native.clip_norm(tensors, sizes, CODES[dtype], most)
        ends.clear()


def too_far(native: ModuleType) -> None:
    """Ask for one element more than there are, which has to end this process."""
    dequantize(native, too_far=1)


if __name__ == "__main__":
    kernel, isa = sys.argv[1:]
    _native.set_isa(isa)
    kernels = {f.__name__: f for f in (quantize, dequantize, linear, clip_norm, too_far)}
    kernels[kernel](_native)
    print("done")
