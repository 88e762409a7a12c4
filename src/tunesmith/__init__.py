"""tunesmith: a fine-tuning SDK for language models.

    from tunesmith import Tuner

    Tuner(model).quantize("nf4").lora(r=16).sft(data).dpo(prefs).merge().run("runs/a")

and later, what such a run has left::

    tunesmith.open("runs/a").generate("Who keeps the light?")

Importing this loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.errors import TunesmithError
from tunesmith.recipe import Data, Recipe, Step
from tunesmith.tuner import Tuner

if TYPE_CHECKING:
    from pathlib import Path

    from tunesmith.engine.result import RunResult

# without `open`, which a star import would put in the place of Python's own
__all__ = ["Data", "Recipe", "Step", "Tuner", "TunesmithError", "__version__"]

__version__ = "0.1.0"


def open(directory: str | Path) -> RunResult:  # as in gzip.open, wave.open
    """Return the result of a run from its directory: metrics, adapters, and the model to use.

    A run that was stopped, or is still at work, is opened as far as it has come, with a warning
    that says what is still to be made. Errors: `RunError` that says what is there if it is no run,
    or what of it is damaged.
    """
    import warnings

    from tunesmith.engine.result import RunResult

    result = RunResult.open(directory)
    if result.standing.ahead:
        warnings.warn(f"{directory}: {result.standing}", stacklevel=2)
    return result
