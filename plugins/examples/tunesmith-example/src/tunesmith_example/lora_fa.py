"""LoRA-FA: LoRA with A frozen at its random start (Zhang et al. 2023, arXiv:2308.03303).

A projects down at random and stays as it is, only B learns. That halves the trained weights, and
the backward pass keeps the r numbers of A x in place of x itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from tunesmith.plugin.methods import PeftMethod
from tunesmith.plugin.options import at_least, between

if TYPE_CHECKING:  # heavy, and not needed to list the plugin
    import peft
    from transformers import PreTrainedModel

__all__ = ["LoraFA", "LoraFAConfig"]


@attrs.frozen(kw_only=True)
class LoraFAConfig:
    """Options of `.peft("lora_fa")`."""

    r: int = attrs.field(default=16, validator=at_least(1))
    """Rank of the update."""
    alpha: float | None = attrs.field(default=None, validator=at_least(0))
    """The update is scaled by alpha / r; unset takes 2 r."""
    dropout: float = attrs.field(default=0.0, validator=between(0.0, 0.99))
    """Dropout on the adapter's input."""
    targets: str | tuple[str, ...] = "all-linear"
    """Names of modules to adapt; "all-linear" is every linear layer but the head."""


class LoraFA(PeftMethod[LoraFAConfig]):
    """y = W x + (alpha / r) B A x, with B trained, A and W frozen."""

    def peft_config(self, model: PreTrainedModel) -> peft.PeftConfig:
        """Return PEFT's LoraConfig: to PEFT, and to whoever opens the adapter, it is a LoRA."""
        import peft

        from tunesmith.nn.targets import find_targets

        config = self.config
        targets = find_targets(model, config.targets, experts=False)
        return peft.LoraConfig(
            r=config.r,
            lora_alpha=2 * config.r if config.alpha is None else config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(targets.modules),
            target_parameters=list(targets.parameters) or None,
        )

    def wrap(self, model: PreTrainedModel) -> peft.PeftModel:
        """Return the model with a fresh adapter, of which only B is trained."""
        return _freeze_a(super().wrap(model))

    def load(self, model: PreTrainedModel, directory: Path, *, trainable: bool) -> peft.PeftModel:
        """Return the model with a saved adapter, of which only B is trained further."""
        return _freeze_a(super().load(model, directory, trainable=trainable))


def _freeze_a(model: peft.PeftModel) -> peft.PeftModel:
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    return model
