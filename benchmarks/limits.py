"""What no one can beat: the machine's rates, measured, and what a case takes at these."""

from __future__ import annotations

import functools
from collections.abc import Callable

import attrs
import torch

from benchmarks.cases import RANK, Case
from benchmarks.machine import last_level_cache
from benchmarks.measure import CudaClock, WallClock

__all__ = ["Rates", "big_buffers", "bytes_moved", "flops", "limit_of", "measure_rates"]


@attrs.frozen
class Rates:
    """The best that torch reached on this machine, in this run and with these threads."""

    copy: float
    """Bytes per second, read and written ones added up."""
    read: float
    """Bytes per second."""
    matmul: dict[str, float]
    """Floating-point operations per second, by dtype."""


def big_buffers(device: str, nbytes: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two written buffers, each at least four times the last-level cache."""
    nbytes = nbytes or max(256 << 20, 4 * last_level_cache())
    count = nbytes // 4
    return torch.ones(count, device=device), torch.ones(count, device=device)


def measure_rates(
    dtypes: tuple[str, ...],
    device: str,
    clock: WallClock | CudaClock,
    *,
    nbytes: int = 0,
    shape: tuple[int, int, int] = (512, 4096, 4096),
    rounds: int = 9,
) -> Rates:
    """Measure both bandwidths, and the matmul rate at x [M, K], W [N, K]; fp32's, too."""
    source, target = big_buffers(device, nbytes)
    size = source.numel() * source.element_size()

    def best(call: Callable[[], object]) -> float:
        timer = clock.timer(call)
        return min(timer(1) for _ in range(rounds + 1))

    tokens, rows, columns = shape
    matmul = {}
    for dtype in sorted({*dtypes, "fp32"}):
        kind = Case("linear", (rows, columns), dtype).torch_dtype
        x = torch.randn(tokens, columns, device=device).to(kind)
        weight = torch.randn(rows, columns, device=device).to(kind)
        seconds = best(functools.partial(torch.mm, x, weight.T))
        matmul[dtype] = 2 * tokens * rows * columns / seconds
    return Rates(
        copy=2 * size / best(functools.partial(target.copy_, source)),
        read=size / best(source.sum),
        matmul=matmul,
    )


def bytes_moved(case: Case) -> int:
    """Return the bytes that a case must read and write at the least, its 4-bit weight nested."""
    rows, columns = case.shape
    numel = rows * columns
    item = case.torch_dtype.itemsize
    blocks = -(-numel // 64)
    packed = -(-numel // 2) + blocks + 4 * -(-blocks // 256) + 4
    if case.op in ("quantize", "dequantize"):
        return packed + numel * item
    activations = case.tokens * (rows + columns) * item
    adapter = 4 * RANK * (rows + columns) if case.adapter else 0
    if case.op == "lora":
        # forward, and backward with the gradients: weight, adapter and activations twice
        return 2 * packed + 3 * adapter + 2 * activations
    return packed + adapter + activations


def flops(case: Case) -> int:
    """Return how many multiplications and additions a case takes."""
    rows, columns = case.shape
    if not case.tokens:
        return 0
    product = 2 * case.tokens * rows * columns
    low_rank = 2 * case.tokens * RANK * (rows + columns) if case.adapter else 0
    if case.op == "lora":
        return 2 * product + 3 * low_rank
    return product + low_rank


def limit_of(case: Case, rates: Rates) -> tuple[float, str]:
    """Return the seconds that a case takes at the machine's rates, and which rate that is.

    A 4-bit weight can be multiplied in fp32 as well, so the better of the two rates counts. What
    stays in a cache from call to call, as small weights do, can be read faster than this.
    """
    writes_much = case.op in ("quantize", "dequantize")
    memory = bytes_moved(case) / (rates.copy if writes_much else rates.read)
    rate = max(rates.matmul[case.dtype], rates.matmul["fp32"])
    compute = flops(case) / rate
    if compute > memory:
        return compute, "matmul rate"
    return memory, "copy bandwidth" if writes_much else "read bandwidth"
