"""The bitsandbytes library's 4-bit and 8-bit layers, for those who want exactly those."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunesmith.errors import ModelError, OptionError
from tunesmith.nn.tasks import CAUSAL_LM, Task
from tunesmith.plugin.conditions import Conditions
from tunesmith.plugin.options import one_of
from tunesmith.plugin.quantizers import Quantizer, stored_method

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from tunesmith.nn.quantizable import Split

__all__ = ["BitsAndBytes", "BitsAndBytesConfig"]


@attrs.frozen(kw_only=True)
class BitsAndBytesConfig:
    """Options of `.quantize("bitsandbytes")`."""

    bits: int = attrs.field(default=4, validator=one_of(4, 8))
    """4 holds NF4 or FP4; 8 is LLM.int8() (arXiv:2208.07339)."""
    quant_type: str | None = attrs.field(
        default=None, validator=attrs.validators.optional(one_of("nf4", "fp4"))
    )
    """4-bit table: nf4, as QLoRA, unless the model is stored in 4 bits already."""
    nested: bool | None = None
    """Quantize the scales as well (double quantization): yes, unless the model is stored in 4 bits
    already."""

    def __attrs_post_init__(self) -> None:
        unread = {"quant_type": self.quant_type, "nested": self.nested}
        given = [name for name, value in unread.items() if value is not None]
        if self.bits == 8 and given:
            raise OptionError(
                [f"{name} is of 4 bits, and bits=8 has no such; leave it out" for name in given]
            )


class BitsAndBytes(Quantizer[BitsAndBytesConfig]):
    """Loads by `transformers.BitsAndBytesConfig`, with every base weight frozen."""

    def __init__(self, config: BitsAndBytesConfig) -> None:
        super().__init__(config)
        self.quant_type = config.quant_type or "nf4"
        # LLM.int8() rounds activations as well, by some hundredths a layer; the 4-bit kernels of a
        # CPU compute in bf16 whatever dtype they are given
        self.own_error = 0.25 if config.bits == 8 else 0.1
        self.nested = config.nested is not False

    def load(
        self,
        directory: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        task: Task = CAUSAL_LM,
    ) -> PreTrainedModel:
        """Return the model with bitsandbytes' linear layers."""
        import transformers

        from tunesmith.nn.checkpoint import stored_quantization

        stored = stored_quantization(directory)
        if stored is not None:
            self.check_stored(stored, directory)
            model = self.from_pretrained(directory, dtype=dtype, device=device, task=task)
            return _frozen(model)
        four = self.config.bits == 4
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=four,
            load_in_8bit=not four,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.nested,
            bnb_4bit_compute_dtype=dtype,
        )
        model = self.from_pretrained(
            directory, dtype=dtype, device=device, task=task, quantization_config=config
        )
        return _frozen(model)

    def effective(self, conditions: Conditions) -> Mapping[str, Any]:
        """Return the options as they will act; in 8 bits quant_type and nested mean nothing."""
        found = super().effective(conditions)
        if self.config.bits == 8:
            return found
        return {**found, "quant_type": self.quant_type, "nested": self.nested}

    def split(self, model: Any) -> Split:
        """Say which weights the library holds in few bits: those of plain linear layers."""
        from tunesmith.nn.quantizable import split

        return split(model, plain_only=True)

    def check_stored(self, stored: Mapping[str, Any], directory: Path | None) -> str:
        """Leave to the library what it has stored, if it is what the options ask for."""
        method = stored_method(stored)
        if not method.startswith("bitsandbytes"):
            raise ModelError(
                f"got a model that is stored quantized with {method}; bitsandbytes takes one in 16 "
                "or 32 bits, or one of its own; start from the unquantized checkpoint"
            )
        kept: dict[str, Any] = {"bits": 8 if method.endswith("8-bit") else 4}
        if kept["bits"] == 4:
            kept["quant_type"] = stored.get("bnb_4bit_quant_type", "fp4")
            kept["nested"] = bool(stored.get("bnb_4bit_use_double_quant", False))
        for option, got in kept.items():
            asked = getattr(self.config, option)
            if asked is not None and asked != got:
                raise ModelError(
                    f"got {option}={asked!r}, and the model is stored with {option}={got!r}; it is "
                    f"not quantized again: pass {option}={got!r}, or start from the unquantized "
                    "checkpoint"
                )
        self.quant_type = kept.get("quant_type", self.quant_type)
        self.nested = kept.get("nested", self.nested)
        return f"{method}: taken as it is, not quantized again"

    def dense_weight(self, module: torch.nn.Module) -> torch.Tensor:
        """Return the weight [out_features, in_features] in fp32, dequantized by the library."""
        import bitsandbytes
        import torch
        from bitsandbytes import functional

        weight: Any = module.weight
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                raise ModelError(
                    "got a layer of bitsandbytes that has repacked its weight for decoding on this "
                    "CPU, which cannot be read back; load the model by .quantize("
                    '"bitsandbytes"), which keeps layers from it, or use .quantize("nf4")'
                )
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
        return -(-count // 2) + (blocks + 4 * -(-blocks // 256) if self.nested else 4 * blocks)


def _frozen(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model none of whose weights is trained, and which keeps them in one layout.

    On a CPU with AVX512-BF16 the library packs a 4-bit weight another way at its first forward pass
    in eval mode. Nothing unpacks it for training, and no gradient passes through the product with
    it: after an evaluation, layers below would learn nothing, with a warning at most.
    """
    import bitsandbytes

    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            vars(module)["support_avx512bf16_for_cpu"] = False
    return model
