"""Low-rank adaptation of which only B is trained, scaled so that the rank does not matter.

A projects down at random and stays as it is (LoRA-FA, arXiv:2308.03303), which halves what is
trained. The update is scaled by alpha / sqrt(r) (rsLoRA, arXiv:2312.03732), so that its size does
not shrink as the rank grows.
"""

import attrs

from tunesmith.plugin import Spec, hookimpl
from tunesmith.plugin.methods import PeftMethod
from tunesmith.plugin.options import at_least, between


@attrs.frozen(kw_only=True)
class NewNameConfig:
    """Options of `.peft("newname")`."""

    r: int = attrs.field(default=16, validator=at_least(1))
    """Rank of the update."""
    alpha: float = attrs.field(default=8.0, validator=at_least(0))
    """The update is scaled by alpha / sqrt(r)."""
    dropout: float = attrs.field(default=0.0, validator=between(0.0, 0.99))
    """Dropout on the adapter's input."""
    targets: str | tuple[str, ...] = "all-linear"
    """Names of modules to adapt; "all-linear" is every linear layer but the head."""


class NewName(PeftMethod[NewNameConfig]):
    """y = W x + (alpha / sqrt(r)) B A x, with B trained, A and W frozen."""

    def peft_config(self, model):
        """Return PEFT's config: to PEFT, and to whoever opens the adapter, it is a LoRA."""
        import peft

        config = self.config
        targets = config.targets if isinstance(config.targets, str) else list(config.targets)
        return peft.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
            use_rslora=True,
        )

    def wrap(self, model):
        """Return the model with a fresh adapter, of which only B is trained."""
        return _freeze_a(super().wrap(model))

    def load(self, model, directory, *, trainable):
        """Return the model with a saved adapter; what `wrap` freezes is frozen here as well."""
        return _freeze_a(super().load(model, directory, trainable=trainable))


def _freeze_a(model):
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)
    return model


@hookimpl
def tunesmith_methods():
    """Register the method."""
    return [
        Spec(
            "newname",
            NewNameConfig,
            f"{__name__}:NewName",
            summary="LoRA with A frozen",
        )
    ]
