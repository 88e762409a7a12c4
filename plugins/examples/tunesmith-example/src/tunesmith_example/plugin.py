"""What this package adds to tunesmith; the entry point in pyproject.toml names this module.

It is imported whenever plugins are listed, so it imports the config classes and nothing heavy.
"""

from __future__ import annotations

from tunesmith.plugin import Spec, hookimpl
from tunesmith.plugin.options import NoOptions
from tunesmith_example.lora_fa import LoraFAConfig


@hookimpl
def tunesmith_formats() -> list[Spec]:
    """Register the data formats."""
    return [
        Spec(
            "dolly",
            NoOptions,
            "tunesmith_example.dolly:Dolly",
            summary="instruction, context, response, category",
        )
    ]


@hookimpl
def tunesmith_methods() -> list[Spec]:
    """Register the PEFT methods."""
    return [
        Spec(
            "lora_fa",
            LoraFAConfig,
            "tunesmith_example.lora_fa:LoraFA",
            summary="LoRA with A frozen: half the trained weights, less activation memory",
        )
    ]
