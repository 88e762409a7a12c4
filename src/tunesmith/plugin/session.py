"""Session: what the steps pass on while a run goes - model, tokenizer, adapters, device, metrics.

Why it stands in this room and not in the engine: every plugin receives one. See
docs/adr/0002-session-and-events-in-plugin.md.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.plugin.quantizers import Quantizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from tunesmith.plugin.methods import Method

__all__ = ["Session"]


class Session:
    """The state that steps read and change.

    The model is loaded when `model` is first read and not before, so a run whose stages are all
    finished loads nothing. What it is loaded from is `base` (a Hugging Face directory), how is the
    quantizer's affair, and the adapter on top is the last one in `adapters`. What is handed out
    depends on these, and on whether it is to be trained, and not on what was loaded before: see
    docs/adr/0014-stopping-and-what-a-stage-depends-on.md.
    """

    def __init__(
        self,
        *,
        base: Path,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        self.base = base
        self.tokenizer = tokenizer
        self.device = device
        self.dtype = dtype
        self.seed = seed
        self.quantizer: Quantizer[Any] = Quantizer(None)
        self.method: Method[Any] | None = None
        self.adapters: dict[str, Path] = {}
        """Directory of each finished adapter by the label of the step that trained it."""
        self.metrics: dict[str, Mapping[str, float]] = {}
        """Metrics of each finished stage by its name."""
        self.samples: tuple[str, ...] = ()
        """A few texts of the run's own data, to try a model on."""
        self.trains = False
        """Whether the step at work trains: `model` is then `model_for(trains=True)`."""
        self._model: Any = None
        self._in_full = False

    @property
    def model(self) -> Any:
        """The model as it stands: base, with the method's adapter on it if there is a method."""
        return self.model_for(trains=self.trains)

    def model_for(self, *, trains: bool) -> Any:
        """Return the model to train, or to measure and export; loaded anew if it was for the other.

        A model without method is trained in fp32 whatever the run's dtype is, and all of it; for
        anything else, and under a method, the base is in the run's dtype.
        """
        full = trains and self.method is None
        if self._model is not None and self._in_full != full:
            self.unload()
        if self._model is None:
            self._model, self._in_full = self._load(full), full
        return self._model

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._model is not None

    def use_quantizer(self, quantizer: Quantizer[Any]) -> None:
        """Load the base by this quantizer from now on."""
        self.quantizer = quantizer
        self.unload()

    def use_method(self, method: Method[Any]) -> None:
        """Train an adapter of this method from now on."""
        self.method = method
        self.unload()

    def use_adapter(self, label: str, directory: Path) -> None:
        """Take note of a finished adapter; a model in memory already holds it."""
        self.adapters[label] = directory

    def use_directory(self, directory: Path) -> None:
        """Go on from a plain model directory: no quantizer, no adapter."""
        self.base = directory
        self.quantizer = Quantizer(None)
        self.method = None
        self.unload()

    def unload(self) -> None:
        """Drop the model from memory; it is loaded again when next read."""
        if self._model is not None:
            self._model = None
            gc.collect()

    def _load(self, full: bool) -> Any:
        import torch
        from transformers import set_seed

        # seeded here, so that what is made anew is the same whether or not earlier stages ran
        set_seed(self.seed)
        # full fine-tuning keeps its weights in fp32: an update of 1e-5 is lost in 16 bits
        dtype = torch.float32 if full else self.dtype
        model = self.quantizer.load(self.base, dtype=dtype, device=self.device)
        if self.method is None:
            if full:
                model.requires_grad_(True)
            return model
        set_seed(self.seed)  # however many numbers the loading has drawn
        if self.adapters:
            from tunesmith.nn.adapters import check_loaded

            latest = list(self.adapters.values())[-1]
            loaded = self.method.load(model, latest)
            check_loaded(loaded, latest)
            return loaded
        return self.method.wrap(model)
