"""Interface of a quantizer: how base weights are loaded, held and read back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["Quantizer"]

C = TypeVar("C")


class Quantizer(Generic[C]):
    """Decides how the base model's weights are loaded.

    The class itself loads them unquantized, which is what a recipe without a quantize step does;
    a quantizer overrides what it does otherwise.
    """

    def __init__(self, config: C) -> None:
        self.config = config

    def load(self, directory: Path, *, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """Return the causal LM in a Hugging Face directory, computing in `dtype` on `device`."""
        return self.from_pretrained(directory, dtype=dtype, device=device)

    def dense_weight(self, module: torch.nn.Module) -> torch.Tensor:
        """Return a linear module's weight [out_features, in_features] in fp32, dequantized."""
        import torch

        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        return weight.detach().to(torch.float32)

    def nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Return the bytes that a linear weight of this shape takes once loaded.

        `itemsize` is that of the compute dtype in bytes; used to predict memory.
        """
        count = itemsize
        for size in shape:
            count *= size
        return count

    def from_pretrained(
        self, directory: Path, *, dtype: torch.dtype, device: torch.device, **options: Any
    ) -> PreTrainedModel:
        """Return `AutoModelForCausalLM.from_pretrained(directory, ...)` without its chatter."""
        from transformers import AutoModelForCausalLM

        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, device_map={"": device}, local_files_only=True, **options
        )
        return model
