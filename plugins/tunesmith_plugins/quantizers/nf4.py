"""NF4: 4-bit NormalFloat with double quantization (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from tunesmith.plugin.options import one_of
from tunesmith.plugin.quantizers import Quantizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["NF4", "NF4Config"]


@attrs.frozen(kw_only=True)
class NF4Config:
    """Options of `.quantize("nf4")`."""

    blocksize: int = attrs.field(default=64, validator=one_of(64, 128, 256, 512, 1024, 2048, 4096))
    """Weights that share one scale; 64 as QLoRA."""
    nested: bool = True
    """Quantize the scales to 8 bits as well (QLoRA's double quantization, blocks of 256)."""
    skip: tuple[str, ...] = ()
    """Names of modules to leave in the compute dtype, besides the head and the embeddings."""


class NF4(Quantizer[NF4Config]):
    """Holds every linear layer but the head as a `tunesmith.nn.nf4_linear.NF4Linear`."""

    def load(self, directory: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """Quantize while loading: one tensor at a time is read, quantized and let go."""
        from tunesmith.nn.loading import NF4LoadConfig

        config = NF4LoadConfig(
            blocksize=self.config.blocksize, nested=self.config.nested, skip=self.config.skip
        )
        return self.from_pretrained(
            directory, dtype=dtype, device=device, quantization_config=config
        )

    def nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Return half a byte a weight and the scales; `itemsize` plays no part."""
        count = 1
        for size in shape:
            count *= size
        blocks = -(-count // self.config.blocksize)
        scales = blocks + 4 * -(-blocks // 256) + 4 if self.config.nested else 4 * blocks
        return -(-count // 2) + scales
