"""LoRA: low-rank adaptation (Hu et al. 2021, arXiv:2106.09685), by PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from tunesmith.plugin.conditions import Conditions
from tunesmith.plugin.methods import PeftMethod
from tunesmith.plugin.options import at_least, between, one_of

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedModel

    from tunesmith.nn.targets import Targets

__all__ = ["Lora", "LoraConfig"]


@attrs.frozen(kw_only=True)
class LoraConfig:
    """Options of `.lora()`."""

    r: int = attrs.field(default=16, validator=at_least(1))
    """Rank of the update; 16 as PEFT's QLoRA recipes (QLoRA itself: 64, with no gain above 8)."""
    alpha: float | None = attrs.field(default=None, validator=at_least(0))
    """The update is scaled by alpha / r; unset takes 2 r, the ratio of Microsoft's LoRA and of
    "LoRA Learns Less and Forgets Less" (arXiv:2405.09673)."""
    dropout: float = attrs.field(default=0.0, validator=between(0.0, 0.99))
    """Dropout on the adapter's input; 0 as PEFT's default, which keeps DPO's log-probs exact."""
    targets: str | tuple[str, ...] = "all-linear"
    """What to adapt: names of layers (the end of a full name will do) or of stacked weights, or a
    regular expression. "all-linear" is every linear layer but head and routers, as QLoRA."""
    experts: bool = True
    """Let "all-linear" take in the stacked experts of a mixture, which are no layers of their own.
    dropout and dora cannot be had on those."""
    bias: str = attrs.field(default="none", validator=one_of("none", "all", "lora_only"))
    """Which biases are trained along."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rsLoRA, arXiv:2312.03732)."""
    dora: bool = False
    """Train magnitude and direction apart (DoRA, arXiv:2402.09353)."""


class Lora(PeftMethod[LoraConfig]):
    """y = W x + (alpha / r) B A x, with A and B trained and W frozen.

    Linear layers become `tunesmith.nn.lora_linear.LoraLinear`, which does both in one pass.
    """

    mixable = True

    def effective(self, conditions: Conditions) -> Mapping[str, Any]:
        """Return the options as they will act: alpha, and targets as the names of what is adapted.

        Until the model is known, targets are as they were given.
        """
        from tunesmith.nn.targets import last_names

        found = dict(super().effective(conditions)) | {"alpha": self.alpha}
        if conditions.model is not None:
            found["targets"] = last_names(self.targets(conditions.model))
        return found

    @property
    def alpha(self) -> float:
        """The update is scaled by alpha / r: the option, or 2 r."""
        return 2 * self.config.r if self.config.alpha is None else self.config.alpha

    def targets(self, model: PreTrainedModel) -> Targets:
        """Return what of a model is adapted. Errors: `ModelError` for names it does not have."""
        from tunesmith.nn.targets import find_targets

        config = self.config
        cannot = (
            f"dropout={config.dropout:g} needs one"
            if config.dropout
            else "dora=True needs one"
            if config.dora
            else ""
        )
        return find_targets(model, config.targets, experts=config.experts, stackable=cannot)

    def describe(self, model: PreTrainedModel) -> str:
        """Return which layers are adapted and which are left out, and why."""
        return str(self.targets(model))

    def peft_config(self, model: PreTrainedModel) -> peft.PeftConfig:
        """Return PEFT's LoraConfig, which names every layer that is adapted."""
        import peft

        config = self.config
        targets = self.targets(model)
        return peft.LoraConfig(
            r=config.r,
            lora_alpha=self.alpha,
            lora_dropout=config.dropout,
            target_modules=list(targets.modules),
            target_parameters=list(targets.parameters) or None,
            bias=config.bias,
            use_rslora=config.rslora,
            use_dora=config.dora,
        )
