"""BitFit: biases, and the gains of norms, are all that is trained (arXiv:2106.10199)."""

from __future__ import annotations

import attrs

from tunesmith.errors import ModelError
from tunesmith.plugin.methods import Method

FILE = "trained.safetensors"


@attrs.frozen(kw_only=True)
class BitFitConfig:
    """Options of `.peft("bitfit")`."""

    norms: bool = True
    """Train the gains of norms as well: many a decoder has no bias at all."""


class BitFit(Method[BitFitConfig]):
    """Trains vectors of the base itself, and keeps those alone."""

    trains_base = True

    def check(self, model):
        """Say if a model has nothing of the kind."""
        if not self._names(model):
            return ("bitfit: the model has no bias to train; pass norms=True",)
        return ()

    def wrap(self, model):
        """Freeze all but biases and gains."""
        names = self._names(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        return model

    def unwrap(self, model):
        """Let all weights be trained again, as they are in a fresh model."""
        model.requires_grad_(True)

    def save(self, model, directory):
        """Write the trained vectors by their names in the model."""
        from safetensors.torch import save_file

        names = self._names(model)
        tensors = {n: p.detach().contiguous() for n, p in model.named_parameters() if n in names}
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / FILE, metadata={"format": "pt"})

    def load(self, model, directory, *, trainable):
        """Put what was saved in the place of the base's own."""
        import torch
        from safetensors.torch import load_file

        stored, names = load_file(directory / FILE), self._names(model)
        if stored.keys() != names:
            odd = ", ".join(sorted(stored.keys() ^ names)[:5])
            raise ModelError(f"{directory}: does not fit the model: {odd}; take the base it is of")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in stored:
                    parameter.copy_(stored[name])
        return self.wrap(model) if trainable else model.requires_grad_(False)

    def _names(self, model):
        def taken(name):
            last = name.rpartition(".")[2]
            return last == "bias" or (self.config.norms and last == "weight" and "norm" in name)

        return {n for n, p in model.named_parameters() if p.dim() == 1 and taken(n)}
