"""RunResult: what a run hands back or has left in its directory, and how its model is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import attrs

from tunesmith.engine.standing import Standing, check_is_run, standing_of
from tunesmith.engine.store import Stage, read_stages

if TYPE_CHECKING:
    from tunesmith.engine.generation import Opened

__all__ = ["RunResult"]


class _Held:
    """The session that was opened for a result, if one was."""

    opened: Opened | None = None


@attrs.frozen
class RunResult:
    """What a run has made, finished or not."""

    path: Path
    """The run directory."""
    metrics: Mapping[str, Mapping[str, float]]
    """Metrics of each finished stage by its name, such as "03-sft"."""
    adapters: Mapping[str, Path]
    """Directory of each trained adapter by its name: that given to it, or its step's label."""
    model_path: Path | None
    """Directory of the last full model: merged, or fully fine-tuned; None if there is none."""
    stages: tuple[Stage, ...]
    """The finished stages, in order."""
    standing: Standing = attrs.field(factory=Standing)
    """How far the run has come: `standing.ahead` is empty for one that is finished."""
    _held: _Held = attrs.field(factory=_Held, repr=False, eq=False, init=False)

    @classmethod
    def from_stages(
        cls, path: Path, stages: tuple[Stage, ...], standing: Standing | None = None
    ) -> RunResult:
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
            standing or Standing(),
        )

    @classmethod
    def open(cls, path: str | Path) -> RunResult:
        """Return what lies in a run directory, of a run that is finished or was stopped.

        The files of each finished stage are compared with what was written. Nothing is loaded.
        Errors: `RunError` that says what is there if it is no run, or what of it is damaged.
        """
        directory = Path(path).expanduser()
        check_is_run(directory)
        stages = tuple(read_stages(directory))
        standing = standing_of(directory, [stage.name for stage in stages])
        return cls.from_stages(directory, stages, standing)

    def __repr__(self) -> str:
        from tunesmith.engine.cells import result_text

        return result_text(self)

    def _repr_html_(self) -> str:
        from tunesmith.engine.cells import result_html

        return result_html(self)

    @property
    def artefacts(self) -> Mapping[str, Mapping[str, Path]]:
        """What each finished stage has made, by name: paths by artefact name, by stage name."""
        return {stage.name: stage.paths for stage in self.stages}

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with the run's chat template. No weights are read for it."""
        return self._opened().tokenizer

    @property
    def model(self) -> Any:
        """The model as it stands after the last finished step, in eval mode on the run's device.

        It is transformers' model, quantized if the run is, or PEFT's with the trained adapter on
        it. Loaded when first asked for and kept until `unload()`.
        """
        return self._opened().model

    def unload(self) -> None:
        """Let the model go; it is loaded again when next asked for.

        Its memory is free as soon as nobody else holds it.
        """
        if self._held.opened is not None:
            self._held.opened.unload()

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a sequence of str, too
        self,
        prompt: str | Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int = ...,
        stop: str | Sequence[str] = ...,
        seed: int | None = ...,
        batch_size: int = ...,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompt: Sequence[str | Sequence[Mapping[str, Any]]],
        *,
        max_new_tokens: int = ...,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int = ...,
        stop: str | Sequence[str] = ...,
        seed: int | None = ...,
        batch_size: int = ...,
    ) -> list[str]: ...

    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        stop: str | Sequence[str] = (),
        seed: int | None = None,
        batch_size: int = 64,
    ) -> str | list[str]:
        """Return the model's answer to a prompt: a text, or a conversation as a list of messages.

        To a list of prompts a list of answers is returned, in their order; `batch_size` of them go
        through the model together. The model is used as it stands after the last finished step.
        `temperature=0` takes the likeliest token each time; else `top_p` and `top_k` (0 is all)
        say what is chosen from, and with a `seed` each prompt has its answer whatever stands beside
        it. An answer ends before the first of the strings `stop`. Errors: `OptionError`, `OpError`
        and `DataError` for what cannot be asked, `RunError` for a run without a model that writes.
        """
        from tunesmith.engine.generation import answers, prompts_of

        prompts, several = prompts_of(prompt)
        if not prompts:
            return []
        opened = self._opened()
        said = answers(
            opened.writer,
            opened.tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            stop=stop,
            seed=seed,
            batch_size=batch_size,
        )
        return said if several else said[0]

    def _opened(self) -> Opened:
        if self._held.opened is None:
            from tunesmith.engine.generation import open_session_of

            self._held.opened = open_session_of(self.path, self.stages)
        return self._held.opened
