"""Kernels on more than 2^31 elements: `python huge.py CASE ISA`, run by test_linear_bounds.py.

Little memory is taken. Input is zeros, of which only the end is ever written: what is just read
stays the one page of zeros that the system has. Output that is large goes round and round in a
small piece of memory, which at the end holds its end; top counts it each time that it is mapped. A
wrong index would crash, so this is a process of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from types import ModuleType

import torch
from layers import CODES, assert_close
from torch import Tensor

from tunesmith import _native
from tunesmith.ops import four_bit

HUGE = 2**31
BLOCKSIZE = 4096

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
]  # fmt: skip
NO_ACCESS, READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000


def map_memory(at: int | None, nbytes: int, protection: int, flags: int, file: int = -1) -> int:
    address = libc.mmap(at, nbytes, protection, flags, file, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"no {nbytes} bytes of address space")
    return int(address)


def zeros(nbytes: int, end: Tensor) -> int:
    """Return the address of that many bytes, zero but for `end`."""
    at = map_memory(None, nbytes, READ_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    end_size = end.numel() * end.element_size()
    ctypes.memmove(at + nbytes - end_size, end.data_ptr(), end_size)
    return at


def round_and_round(nbytes: int) -> int:
    """Return the address of that many bytes, of which the last 64 MiB are kept."""
    size = 1 << 26
    count = -(-nbytes // size)
    at = map_memory(
        None, count * size, NO_ACCESS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    )
    file = os.memfd_create("output")
    os.ftruncate(file, size)
    for i in range(count):
        map_memory(at + i * size, size, READ_WRITE, mmap.MAP_SHARED | MAP_FIXED, file)
    return at


def read_end(at: int, nbytes: int, count: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(count, dtype=dtype)
    end_size = count * dtype.itemsize
    ctypes.memmove(out.data_ptr(), at + nbytes - end_size, end_size)
    return out


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def dequantize(native: ModuleType) -> None:
    rest = 3 * BLOCKSIZE + 4001
    numel, blocks = HUGE + rest, -(-(HUGE + rest) // BLOCKSIZE)
    packed, absmax = four_bit.reference_quantize_4bit(numbers(rest), BLOCKSIZE, "nf4")
    out = round_and_round(2 * numel)
    native.dequantize_4bit(
        zeros((numel + 1) // 2, packed), zeros(4 * blocks, absmax), 0, 0, numel, BLOCKSIZE,
        CODES["nf4"], CODES[torch.bfloat16], out, None,
    )  # fmt: skip
    expected = four_bit.reference_dequantize_4bit(
        packed, absmax, None, None, [rest], BLOCKSIZE, "nf4", torch.bfloat16
    )
    assert torch.equal(read_end(out, 2 * numel, rest, torch.bfloat16), expected)


def quantize(native: ModuleType) -> None:
    rest = 3 * BLOCKSIZE + 4001
    numel, blocks = HUGE + rest, -(-(HUGE + rest) // BLOCKSIZE)
    weight = numbers(rest, dtype=torch.bfloat16)
    packed, absmax = round_and_round((numel + 1) // 2), zeros(4 * blocks, torch.empty(0))
    native.quantize_4bit(
        zeros(2 * numel, weight), CODES[torch.bfloat16], numel, BLOCKSIZE, CODES["nf4"], packed,
        absmax, None,
    )  # fmt: skip
    expected = four_bit.reference_quantize_4bit(weight, BLOCKSIZE, "nf4")
    for at, nbytes, ours in zip(
        (packed, absmax), ((numel + 1) // 2, 4 * blocks), expected, strict=True
    ):
        assert torch.equal(read_end(at, nbytes, ours.numel(), ours.dtype), ours)


def arguments(
    tokens: int, in_features: int, out_features: int, dtype: torch.dtype, **more: int | float
) -> dict[str, int | float]:
    """Return a layer of a plain weight in fp32, without an adapter."""
    fields = {
        "tokens": tokens, "in_features": in_features, "out_features": out_features,
        "dtype": CODES[dtype], "type": CODES[torch.float32], "weight": 0, "absmax": 0,
        "nested_absmax": 0, "nested_offset": 0, "blocksize": 0, "bias": 0, "rank": 0,
        "adapter_dtype": CODES[torch.float32], "lora_a": 0, "lora_b": 0, "scaling": 1.0, "keep": 0,
        "keep_scale": 1.0,
    }  # fmt: skip
    return fields | more


def weight(native: ModuleType) -> None:
    """One token, and a 4-bit weight of 2^25 rows and a few, of which the few are not zero."""
    columns, few = 64, 128
    rows = HUGE // columns + few
    w = numbers(few, columns)
    packed, absmax = four_bit.reference_quantize_4bit(w, BLOCKSIZE, "nf4")
    dense = four_bit.reference_dequantize_4bit(
        packed, absmax, None, None, w.shape, BLOCKSIZE, "nf4", torch.float32
    ).double()
    numel = rows * columns
    layer = arguments(
        1, columns, rows, torch.float32, type=CODES["nf4"], blocksize=BLOCKSIZE,
        weight=zeros(numel // 2, packed), absmax=zeros(numel // BLOCKSIZE * 4, absmax),
    )  # fmt: skip
    x, y = numbers(1, columns), torch.full((1, rows), 7.0)
    native.linear(native.Linear(**layer), x=x.data_ptr(), s=0, y=y.data_ptr(), accumulate=False)
    assert_close(y[:, -few:], x.double() @ dense.T)
    assert (y[:, :-few] == 0).all()
    grad_y, grad_x = numbers(1, rows), torch.empty(1, columns)
    native.linear_backward(
        native.Linear(**layer), x=0, s=0, grad_y=grad_y.data_ptr(), grad_x=grad_x.data_ptr(),
        grad_a=0, grad_b=0, accumulate=False,
    )  # fmt: skip
    assert_close(grad_x, grad_y[:, -few:].double() @ dense)


def tokens(native: ModuleType) -> None:
    """2^25 tokens and a few of 64 features, dropout and an adapter; all but the few are zero.

    What bf16 products would round is bf16 already, but for what flows into s.
    """
    columns, few, dtype = 64, 100, torch.bfloat16
    count = HUGE // columns + few
    x, keep = numbers(few, columns, dtype=dtype), numbers(few, columns) < 1
    w = numbers(1, columns)
    lora_a, lora_b = (numbers(1, size, dtype=dtype).float() for size in (columns, 1))
    layer = arguments(
        count, columns, 1, dtype, weight=w.data_ptr(), rank=1, lora_a=lora_a.data_ptr(),
        lora_b=lora_b.data_ptr(), keep=zeros(count * columns, keep), keep_scale=2.0, scaling=0.5,
    )  # fmt: skip
    x_at = zeros(2 * count * columns, x)
    y, s = torch.full((count, 1), 7.0, dtype=dtype), torch.full((count, 1), 7.0)
    native.linear(native.Linear(**layer), x=x_at, s=s.data_ptr(), y=y.data_ptr(), accumulate=False)
    dropped = x.double() * keep * 2
    expected_s = dropped @ lora_a.double().T
    assert_close(s[-few:], expected_s)
    assert_close(y[-few:], x.double() @ w.double().T + 0.5 * expected_s @ lora_b.double().T)
    assert (s[:-few] == 0).all()
    assert (y[:-few] == 0).all()

    y[:-few] = 0
    grad_x, grad_a = round_and_round(2 * count * columns), torch.empty(1, columns)
    native.linear_backward(
        native.Linear(**layer), x=x_at, s=0, grad_y=y.data_ptr(), grad_x=grad_x,
        grad_a=grad_a.data_ptr(), grad_b=0, accumulate=False,
    )  # fmt: skip
    grad_s = 0.5 * y[-few:].double() @ lora_b.double()
    through_adapter = grad_s @ lora_a.double() * keep * 2
    ours = read_end(grad_x, 2 * count * columns, few * columns, dtype).view(few, columns)
    assert_close(ours, y[-few:].double() @ w.double() + through_adapter)
    assert_close(grad_a, grad_s.T @ dropped, dtype)


def output(native: ModuleType) -> None:
    """2^25 tokens and a few of one feature, 64 out."""
    columns, few, dtype = 64, 100, torch.bfloat16
    count = HUGE // columns + few
    x, w, bias = numbers(few, 1, dtype=dtype), numbers(columns, 1), numbers(columns, dtype=dtype)
    y = round_and_round(2 * count * columns)
    layer = arguments(count, 1, columns, dtype, weight=w.data_ptr(), bias=bias.data_ptr())
    native.linear(native.Linear(**layer), x=zeros(2 * count, x), s=0, y=y, accumulate=False)
    ours = read_end(y, 2 * count * columns, few * columns, dtype).view(few, columns)
    assert_close(ours, x.double() @ w.double().T + bias.double())


if __name__ == "__main__":
    case, isa = sys.argv[1:]
    _native.set_isa(isa)
    cases = {f.__name__: f for f in (dequantize, quantize, weight, tokens, output)}
    cases[case](_native)
    print("done")
