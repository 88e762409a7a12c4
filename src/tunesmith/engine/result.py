"""RunResult: what a finished run hands back, and how its model is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from tunesmith.engine.store import Stage, read_stages
from tunesmith.errors import RunError

__all__ = ["RunResult"]


@attrs.frozen
class RunResult:
    """A finished run."""

    path: Path
    """The run directory."""
    metrics: Mapping[str, Mapping[str, float]]
    """Metrics of each stage by its name, such as "03-sft"."""
    adapters: Mapping[str, Path]
    """Directory of each trained adapter by its name: that given to it, or its step's label."""
    model_path: Path | None
    """Directory of the last full model: merged, or fully fine-tuned; None if there is none."""
    stages: tuple[Stage, ...]
    _loaded: dict[str, Any] = attrs.field(factory=dict, repr=False, eq=False, init=False)

    @classmethod
    def from_stages(cls, path: Path, stages: tuple[Stage, ...]) -> RunResult:
        """Gather a result from finished stages."""
        adapters: dict[str, Path] = {}
        models = [stage.model for stage in stages if stage.model is not None]
        for stage in stages:
            if stage.adapter is not None:
                adapters[stage.adapter_name] = stage.adapter
        return cls(
            path,
            {stage.name: stage.metrics for stage in stages},
            adapters,
            models[-1] if models else None,
            stages,
        )

    @classmethod
    def open(cls, path: str | Path) -> RunResult:
        """Return the result that lies in a run directory."""
        directory = Path(path)
        stages = tuple(read_stages(directory))
        if not stages:
            raise RunError(
                f"{directory}: holds no finished stage of a run; give the directory that "
                "`.run(...)` or `tunesmith run --out` wrote"
            )
        return cls.from_stages(directory, stages)

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> str:
        """Return the model's answer to a prompt, or to a list of chat messages.

        The model is used as it stands after the last step. `temperature=0` takes the
        likeliest token each time. The model is loaded at the first call and kept.
        """
        if not self._loaded:
            self._loaded.update(self._load())
        from tunesmith.engine.generation import generate

        return generate(
            self._loaded["model"],
            self._loaded["tokenizer"],
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )

    def _load(self) -> dict[str, Any]:
        from tunesmith.engine.generation import load_for_generation

        model, tokenizer = load_for_generation(self.path, self.stages)
        return {"model": model, "tokenizer": tokenizer}
