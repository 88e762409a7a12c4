"""The dtypes that the ops take, and what messages call them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["DTYPES", "sum_dtype", "word", "words"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What can be quantized, and what can be dequantized into."""


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which products of that dtype are summed: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def word(value: torch.dtype | torch.layout) -> str:
    """Return what messages and files call a dtype or layout: torch's name without "torch."."""
    return str(value).removeprefix("torch.")


def words(dtypes: Sequence[torch.dtype]) -> str:
    """Return what messages call some dtypes."""
    return ", ".join(map(word, dtypes))
