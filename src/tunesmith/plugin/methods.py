"""Interface of a PEFT method: which few weights are trained, and how they are kept and merged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

__all__ = ["Method"]

C = TypeVar("C")


class Method(ABC, Generic[C]):
    """Wraps a base model so that only an adapter is trained.

    A method says by `peft_config` what it is in PEFT's terms (PEFT's own methods, or one it has
    registered with `peft.utils.register_peft_method`); wrapping, saving and loading follow from
    that. It never asks how the base is quantized: a base layer is an `nn.Linear` to it.
    """

    def __init__(self, config: C) -> None:
        self.config = config

    @abstractmethod
    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """Return PEFT's config for this model, which may be on the meta device."""

    def wrap(self, model: PreTrainedModel) -> PeftModel:
        """Return the model with a fresh adapter; every other parameter is frozen."""
        from peft import get_peft_model

        wrapped: PeftModel = get_peft_model(model, self.peft_config(model))
        return wrapped

    def load(self, model: PreTrainedModel, directory: Path) -> PeftModel:
        """Return the model with the adapter saved in `directory`, ready to be trained on."""
        from peft import PeftModel

        wrapped: PeftModel = PeftModel.from_pretrained(
            model, directory, is_trainable=True, local_files_only=True
        )
        return wrapped

    def save(self, model: Any, directory: Path) -> None:
        """Write the adapter in PEFT's own format, which stock PEFT opens."""
        model.save_pretrained(directory)
