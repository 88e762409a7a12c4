"""The bitsandbytes library's 4-bit and 8-bit layers, for those who want exactly those."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunesmith.plugin.options import one_of
from tunesmith.plugin.quantizers import Quantizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["BitsAndBytes", "BitsAndBytesConfig"]


@attrs.frozen(kw_only=True)
class BitsAndBytesConfig:
    """Options of `.quantize("bitsandbytes")`."""

    bits: int = attrs.field(default=4, validator=one_of(4, 8))
    """4 holds NF4 or FP4; 8 is LLM.int8() (arXiv:2208.07339)."""
    quant_type: str = attrs.field(default="nf4", validator=one_of("nf4", "fp4"))
    """4-bit table; nf4 as QLoRA."""
    nested: bool = True
    """Quantize the scales as well (double quantization)."""


class BitsAndBytes(Quantizer[BitsAndBytesConfig]):
    """Loads by `transformers.BitsAndBytesConfig`, with every base weight frozen."""

    def load(self, directory: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """Return the model with bitsandbytes' linear layers."""
        import transformers

        four = self.config.bits == 4
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=four,
            load_in_8bit=not four,
            bnb_4bit_quant_type=self.config.quant_type,
            bnb_4bit_use_double_quant=self.config.nested,
            bnb_4bit_compute_dtype=dtype,
        )
        model = self.from_pretrained(
            directory, dtype=dtype, device=device, quantization_config=config
        )
        model.requires_grad_(False)
        return model

    def dense_weight(self, module: torch.nn.Module) -> torch.Tensor:
        """Return the weight [out_features, in_features] in fp32, dequantized by the library."""
        import bitsandbytes
        import torch
        from bitsandbytes import functional

        weight: Any = module.weight
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            dense: torch.Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
            return dense.to(torch.float32)
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            state: Any = module.state
            codes: torch.Tensor = weight.data if weight.CB is None else weight.CB
            scale: torch.Tensor = weight.SCB if state.SCB is None else state.SCB
            return codes.to(torch.float32) * (scale.to(torch.float32).view(-1, 1) / 127.0)
        return super().dense_weight(module)

    def nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Return the bytes of codes and scales; `itemsize` plays no part."""
        count = 1
        for size in shape:
            count *= size
        if self.config.bits == 8:
            return count + 4 * shape[0]
        blocks = -(-count // 64)
        return -(-count // 2) + (
            blocks + 4 * -(-blocks // 256) if self.config.nested else 4 * blocks
        )
