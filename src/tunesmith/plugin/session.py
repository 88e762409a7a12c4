"""Session: what a step finds when it begins - model, tokenizer, adapters, artefacts, device.

Why it stands in this room and not in the engine: every plugin receives one. See
docs/adr/0002-session-and-events-in-plugin.md.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunesmith.errors import RunError, close_matches, listed
from tunesmith.nn.tasks import CAUSAL_LM, Task
from tunesmith.plugin.quantizers import Quantizer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from tunesmith.plugin.methods import Method

__all__ = ["Adapter", "RunRecord", "Session"]


@attrs.frozen
class RunRecord:
    """What a run is, up to the step at work: as recipe.yaml and lock.json have it."""

    recipe: Mapping[str, Any]
    """The recipe as `Recipe.to_dict` gives it, its steps up to this one and no further."""
    lock: Mapping[str, Any]
    """What it was resolved to: "model" (its "sha256" and where it is from), "versions", "plugins",
    "device", "precision", and by the name of each stage so far "data" ("description", "format",
    "rows", "sha256") and "fingerprints", each a hash of all that the stage depends on."""


@attrs.frozen
class Adapter:
    """A named set of trained weights for a base."""

    name: str
    """Label of the step that trained it, such as "sft"."""
    method: Method[Any]
    directory: Path
    task: Task = CAUSAL_LM
    parent: str | None = None
    """Another adapter that its training began from; None if it began afresh."""
    named: bool = False
    """Whether the recipe gave it the name, which it keeps when it is trained further."""


class _Held:
    """The one model in memory, and what it was asked for as."""

    def __init__(self) -> None:
        self.key: Any = None
        self.model: Any = None

    def get(self, key: Any, load: Callable[[], Any]) -> Any:
        if self.model is None or self.key != key:
            self.drop()
            self.model = load()
            self.key = key
        return self.model

    def drop(self) -> None:
        if self.model is not None:
            self.key = self.model = None
            gc.collect()


@attrs.frozen(kw_only=True, eq=False)
class Session:
    """The state that a step begins from. It is never changed: a step leads to another session.

    A model is loaded when it is first asked for, and not before, so a run whose stages are all
    finished loads nothing. Which one that is follows from what is written here and from nothing
    that was loaded before: see docs/adr/0020-one-rule-to-load-by.md. One is in memory at a time;
    sessions that follow from each other share it.
    """

    base: Path
    """A Hugging Face model directory."""
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    """What the run computes in."""
    seed: int = 0
    quantizer: Quantizer[Any] = attrs.field(factory=lambda: Quantizer(None))
    method: Method[Any] | None = None
    """What a training from here on adapts by; None trains all weights."""
    naming: str | None = None
    """Name of the adapter that a training from here on leaves; None takes the step's label."""
    adapters: Mapping[str, Adapter] = attrs.field(factory=dict)
    """Those trained so far on this base, by name."""
    current: str | None = None
    """The one of them that goes on: that is trained further, measured and exported."""
    artefacts: Mapping[str, Mapping[str, Path]] = attrs.field(factory=dict)
    """What earlier stages have made: paths by artefact name, by stage name."""
    metrics: Mapping[str, Mapping[str, float]] = attrs.field(factory=dict)
    """Metrics of each finished stage by its name."""
    samples: tuple[str, ...] = ()
    """A few texts of the run's own data, to try a model on."""
    task: Task = CAUSAL_LM
    """What the step at work needs a model for."""
    trains: bool = False
    """Whether the step at work trains."""
    record: RunRecord | None = attrs.field(default=None, repr=False)
    """See `run`, which says what to do where there is none."""
    _held: _Held = attrs.field(factory=_Held, repr=False)

    @property
    def model(self) -> Any:
        """The model for the step at work: base, with the current adapter if there is one."""
        return self.model_for(task=self.task, trains=self.trains)

    @property
    def run(self) -> RunRecord:
        """Recipe, versions and hashes of the run up to here, for an exporter that `reads_run`.

        Errors: `RunError` for a step that does not say so: its stage would be found again where
        the record has changed.
        """
        if self.record is None:
            raise RunError(
                "session.run: this step does not say that it reads the record of the run; set "
                "reads_run = True in the exporter's class, so that a stage is made anew where the "
                "record is another"
            )
        return self.record

    @property
    def trains_base(self) -> bool:
        """Whether a training from here on changes the base's own weights."""
        return self.method is None or self.method.trains_base

    def model_for(
        self,
        *,
        task: Task = CAUSAL_LM,
        adapter: str | None = None,
        trains: bool = False,
    ) -> Any:
        """Return a model: loaded by one rule, from what is asked for.

        `adapter` names one of `adapters`; unset is the current one, or a fresh one of the method
        where there is none. With `trains`, what is trained requires gradients, and a base whose
        own weights are trained is in fp32 whatever the run's dtype is, for an update of 1e-5 is
        lost in 16 bits; for anything else it is in the run's dtype. Errors: `RunError` for an
        adapter that there is not, or that was trained for another task.
        """
        name = self.current if adapter is None else adapter
        named = None if name is None else self.adapter(name)
        if named is not None and named.task != task:
            raise RunError(
                f"adapter '{named.name}': was trained for {named.task}, and is asked for {task}; "
                "name another one, or train one for it"
            )
        key = (self.base, self.quantizer, self.method, named, task, trains)
        return self._held.get(key, lambda: self._load(task, named, trains))

    @property
    def loaded(self) -> bool:
        """Whether a model is in memory."""
        return self._held.model is not None

    def unload(self) -> None:
        """Drop the model from memory; it is loaded again when next asked for."""
        self._held.drop()

    # what follows from a step

    def at_work(self, *, task: Task = CAUSAL_LM, trains: bool = False) -> Session:
        """Return the session for a step that needs such a model."""
        return attrs.evolve(self, task=task, trains=trains)

    def with_quantizer(self, quantizer: Quantizer[Any]) -> Session:
        """Return a session whose base is loaded by this quantizer."""
        return attrs.evolve(self, quantizer=quantizer)

    def with_method(self, method: Method[Any], name: str | None = None) -> Session:
        """Return a session that trains a fresh adapter of this method next, of a name if given."""
        return attrs.evolve(self, method=method, naming=name, current=None)

    def using(self, name: str) -> Session:
        """Return a session that goes on with another one of its adapters, and its method."""
        adapter = self.adapter(name)
        naming = name if adapter.named else None
        return attrs.evolve(self, method=adapter.method, naming=naming, current=name)

    def with_adapter(
        self, name: str, directory: Path, *, task: Task = CAUSAL_LM, parent: str | None = None
    ) -> Session:
        """Return a session with a finished adapter of its method, which goes on from there.

        It takes the place of an earlier one of its name, from which it was trained on.
        """
        if self.method is None:
            raise RunError(f"adapter '{name}': there is no method that it is of; add one first")
        if parent == name:
            parent = self.adapters[name].parent
        named = name == self.naming
        added = Adapter(name, self.method, directory, task, parent, named)
        return attrs.evolve(self, adapters={**self.adapters, name: added}, current=name)

    def with_base(self, directory: Path, method: Method[Any] | None = None) -> Session:
        """Return a session that goes on from a plain model: no quantizer and no adapter."""
        return attrs.evolve(
            self,
            base=directory,
            quantizer=Quantizer(None),
            method=method,
            adapters={},
            current=None,
        )

    def with_stage(
        self, stage: str, *, artefacts: Mapping[str, Path], metrics: Mapping[str, float]
    ) -> Session:
        """Return a session that knows of a finished stage."""
        return attrs.evolve(
            self,
            artefacts={**self.artefacts, stage: artefacts},
            metrics={**self.metrics, stage: metrics},
        )

    def artefact(self, name: str) -> Path:
        """Return what the latest stage that made an artefact of this name has made.

        Errors: `RunError` naming what there is.
        """
        for made in reversed(list(self.artefacts.values())):
            if name in made:
                return made[name]
        known = {each for made in self.artefacts.values() for each in made}
        raise RunError(
            f"no earlier step has made '{name}'{close_matches(name, known)}; there is: "
            f"{listed(known) or 'nothing yet'}; put the step that makes it before this one"
        )

    def adapter(self, name: str) -> Adapter:
        """Return an adapter by its name. Errors: `RunError` naming those that there are."""
        if name in self.adapters:
            return self.adapters[name]
        raise RunError(
            f"there is no adapter '{name}'{close_matches(name, self.adapters)}; trained so far: "
            f"{listed(self.adapters) or 'none'}"
        )

    def _load(self, task: Task, adapter: Adapter | None, trains: bool) -> Any:
        import torch
        from transformers import set_seed

        # seeded here, so that what is made anew is the same whether or not earlier stages ran
        set_seed(self.seed)
        method = self.method if adapter is None else adapter.method
        full = trains and (method is None or method.trains_base)
        dtype = torch.float32 if full else self.dtype
        model = self.quantizer.load(self.base, dtype=dtype, device=self.device, task=task)
        if method is None:
            return model.requires_grad_(True) if full else model
        set_seed(self.seed)  # however many numbers the loading has drawn
        if adapter is None:
            return method.wrap(model)
        return method.load(model, adapter.directory, trainable=trains)
