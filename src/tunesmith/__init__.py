"""tunesmith: a fine-tuning SDK for language models.

    from tunesmith import Tuner

    Tuner(model).quantize("nf4").lora(r=16).sft(data).dpo(prefs).merge().run("runs/a")

Importing this loads no torch.
"""

from __future__ import annotations

from tunesmith.errors import TunesmithError
from tunesmith.recipe import Data, Recipe, Step
from tunesmith.tuner import Tuner

__all__ = ["Data", "Recipe", "Step", "Tuner", "TunesmithError", "__version__"]

__version__ = "0.1.0"
