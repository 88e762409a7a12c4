"""Prompt tuning: embeddings before the prompt are all that is learned (arXiv:2104.08691)."""

from __future__ import annotations

import attrs

from tunesmith.plugin.methods import PeftMethod
from tunesmith.plugin.options import at_least


@attrs.frozen(kw_only=True)
class PromptTuningConfig:
    """Options of `.peft("prompt_tuning")`."""

    tokens: int = attrs.field(default=20, validator=at_least(1))
    """Virtual tokens that stand before each row."""


class PromptTuning(PeftMethod[PromptTuningConfig]):
    """Puts learned embeddings before those of a row."""

    mergeable = False
    adds_tokens = True

    def peft_config(self, model):
        """Return PEFT's config, with random embeddings to begin with."""
        import peft

        return peft.PromptTuningConfig(num_virtual_tokens=self.config.tokens)
