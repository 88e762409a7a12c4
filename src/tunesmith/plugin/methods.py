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

    def check(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Return what would go wrong on wrapping this model, a line each; asked by a plan.

        `model` is on the meta device and unquantized. Unless overridden it is tried, and what is
        said of it handed on.
        """
        from tunesmith.errors import TunesmithError

        try:
            wrapped = self.wrap(model)
            unmatched = _unmatched(wrapped)
            wrapped.unload()
        except TunesmithError as error:
            return tuple(str(error).splitlines())
        except Exception as error:
            return (f"PEFT refuses this model: {type(error).__name__}: {error}",)
        return tuple(f"targets: '{name}' matches no layer of this model" for name in unmatched)

    def describe(self, model: PreTrainedModel) -> str:
        """Return in a line what of a model is adapted and what is not; "" says nothing.

        `model` is as for `check`, which has found nothing wrong with it.
        """
        return ""

    def wrap(self, model: PreTrainedModel) -> PeftModel:
        """Return the model with a fresh adapter; every other parameter is frozen."""
        from peft import get_peft_model

        wrapped: PeftModel = get_peft_model(model, self.peft_config(model))
        return wrapped

    def load(self, model: PreTrainedModel, directory: Path) -> PeftModel:
        """Return the model with the adapter saved in `directory`, ready to be trained on."""
        from tunesmith.nn.adapters import open_adapter

        return open_adapter(model, directory)

    def save(self, model: Any, directory: Path) -> None:
        """Write the adapter in PEFT's own format, which stock PEFT opens."""
        # PEFT adds a whole embedding where one is adapted, which is the base's and would replace it
        model.save_pretrained(directory, save_embedding_layers=False)


def _unmatched(model: Any) -> list[str]:
    """Return the names among a method's targets that PEFT has silently found nothing for."""
    found = [
        *getattr(model.base_model, "targeted_module_names", ()),
        *getattr(model.base_model, "targeted_parameter_names", ()),
    ]
    wanted: set[str] = set()
    for config in model.peft_config.values():
        for names in ("target_modules", "target_parameters"):
            given = getattr(config, names, None)
            wanted.update(given if isinstance(given, (list, set, tuple)) else ())
    return sorted(
        name
        for name in wanted
        if not any(each == name or each.endswith(f".{name}") for each in found)
    )
