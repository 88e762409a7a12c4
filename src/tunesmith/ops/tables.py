"""What the codes of 4-bit weights and of their scales stand for.

NF4 and double quantization are those of QLoRA (arXiv:2305.14314), FP4 is that of bitsandbytes.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["DYNAMIC_MAP", "FP4_CODE", "FP4_ORDER", "NF4_CODE", "NF4_ORDER", "TABLES"]

NF4_CODE = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
    device="cpu",
)
"""What each of the 16 codes of NF4 stands for, fp32 [16]: appendix E of the QLoRA paper."""

NF4_ORDER = torch.arange(16, dtype=torch.uint8, device="cpu")
"""The codes of NF4 in ascending order of their values, uint8 [16]: already sorted."""

FP4_CODE = torch.tensor(
    [
        0.0,
        0.0052083334885537624,
        0.6666666865348816,
        1.0,
        0.3333333432674408,
        0.5,
        0.1666666716337204,
        0.25,
        0.0,
        -0.0052083334885537624,
        -0.6666666865348816,
        -1.0,
        -0.3333333432674408,
        -0.5,
        -0.1666666716337204,
        -0.25,
    ],
    dtype=torch.float32,
    device="cpu",
)
"""What each of the 16 codes of FP4 stands for, fp32 [16]: 0, 1/16, 8, 12, 4, 6, 2, 3 over 12.

Bit 3 is the sign. Code 8 is a second zero; bitsandbytes gives it a minus in some of its kernels.
"""

FP4_ORDER = torch.tensor(
    [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], dtype=torch.uint8, device="cpu"
)
"""The codes of FP4 in ascending order of their values, uint8 [16].

Zero is before its twin, code 8, so what rounds to zero from below is code 0 and from above code 8:
that is what bitsandbytes does on the CPU. The 15 midpoints between neighbours are the plain fp32
means of NF4, and as there a value strictly above one takes the higher neighbour. On CUDA
bitsandbytes searches magnitudes: there a negative tie takes the other neighbour, zero from below is
code 8 and from above 0, and a threshold like 0.583333 is a few units in the last place off.
"""

TABLES = {"nf4": (NF4_CODE, NF4_ORDER), "fp4": (FP4_CODE, FP4_ORDER)}
"""The table and the order of each quant_type."""


def _dynamic_map() -> Tensor:
    """Return the signed dynamic 8-bit data type, fp32 [256] ascending (arXiv:1511.04561).

    Seven decades 1e-6 to 1 hold 1, 2, 4, ... 64 values each: the middles of as many equal steps
    from 0.1 to 1, times the decade. Their negatives, 0 and 1 make up 256. Each value is worked out
    in double and rounded to fp32 where bitsandbytes rounds. So the map is the same on every
    machine, which torch.linspace's is not: its last bit depends on whether the CPU has FMA.
    """

    def fp32(value: float) -> float:
        return torch.tensor(value, dtype=torch.float32, device="cpu").item()

    magnitudes = []
    for exponent in range(7):
        steps = 2**exponent
        first, step = fp32(0.1), fp32(fp32(1 - fp32(0.1)) / steps)
        # counted from the nearer end
        edges = [
            fp32(first + step * k) if k < (steps + 1) // 2 else fp32(1 - step * (steps - k))
            for k in range(steps + 1)
        ]
        for low, high in itertools.pairwise(edges):
            middle = fp32(fp32(low + high) / 2)
            magnitudes.append(fp32(fp32(10.0 ** (exponent - 6)) * middle))
    values = [-m for m in reversed(magnitudes)] + [0.0] + magnitudes + [1.0]
    return torch.tensor(values, dtype=torch.float32, device="cpu")


DYNAMIC_MAP = _dynamic_map()
"""What each of the 256 codes of a double-quantized absmax stands for, fp32 [256]."""
