"""Clips the gradients of an adapter in one pass: it has hundreds of small ones.

torch takes each as several operations, which takes longer than reading them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tunesmith.ops import native
from tunesmith.ops.dtypes import DTYPES

__all__ = ["clip_grad_norm_", "clipped_by_kernels"]


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Do what `torch.nn.utils.clip_grad_norm_` does, for the 2-norm.

    All gradients are multiplied by max_norm / (norm + 1e-6) if their norm, taken as that of one
    vector, is more than max_norm, and are left alone otherwise. Returns the norm before, a scalar:
    fp32 where the kernels do it (dense gradients on the CPU, all in bf16, fp16 or fp32; sums are
    taken in fp64), torch's own elsewhere.
    """
    parameters = list(parameters)
    grads = [each.grad for each in parameters if each.grad is not None]
    if not _suits(grads):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    norm = native.kernels.clip_norm(
        [each.data_ptr() for each in grads],
        [each.numel() for each in grads],
        native.CODES[grads[0].dtype],
        max_norm,
    )
    return torch.tensor(norm, dtype=torch.float32)


def _suits(grads: Sequence[Tensor]) -> bool:
    if not grads or not native.CODES:
        return False
    dtype = grads[0].dtype
    return dtype in DTYPES and all(
        type(each) is Tensor
        and each.dtype is dtype
        and each.is_cpu
        and each.layout is torch.strided
        and each.is_contiguous()
        for each in grads
    )


@contextmanager
def clipped_by_kernels(accelerator: Any) -> Iterator[None]:
    """Let an `accelerate.Accelerator` clip by `clip_grad_norm_` above, where that is all it does.

    It is not with several processes, under a GradScaler, or for another norm than the second.
    """
    from accelerate import DistributedType

    plain = accelerator.distributed_type == DistributedType.NO and accelerator.scaler is None
    if not plain or "clip_grad_norm_" in vars(accelerator):  # someone else's
        yield
        return
    stock = accelerator.clip_grad_norm_

    def clip(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2) -> Any:
        if norm_type != 2 or isinstance(parameters, Tensor):
            return stock(parameters, max_norm, norm_type)
        return clip_grad_norm_(parameters, float(max_norm))

    accelerator.clip_grad_norm_ = clip
    try:
        yield
    finally:
        del accelerator.clip_grad_norm_
