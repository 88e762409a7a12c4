"""A copy beside the others, its time scaled to the bytes of the case: the memory's own pace."""

from __future__ import annotations

import functools

from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contestants.entry import Contestant, Entry
from benchmarks.inputs import Inputs
from benchmarks.limits import big_buffers, bytes_moved

__all__ = ["CONTESTANTS"]

# made once: the first touch of their pages would take longer than the copies
_buffers = functools.lru_cache(maxsize=1)(big_buffers)


def _copy(case: Case, inputs: Inputs) -> Entry | None:
    if case.op == "decode" and inputs.weight.device.type == "cpu":
        return None  # there reading has a pace of its own, which the limit goes by
    source, target = _buffers(str(inputs.weight.device))
    moved = 2 * source.numel() * source.element_size()
    call = functools.partial(_copy_into, target, source)
    return Entry(
        call,
        another=lambda: call,
        scale=bytes_moved(case) / moved,
        note=lambda: "scaled to the same bytes",
    )


def _copy_into(target: Tensor, source: Tensor) -> None:
    target.copy_(source)


CONTESTANTS = (Contestant("copy", ("quantize", "dequantize", "decode"), _copy),)
