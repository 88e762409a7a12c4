"""The model of a run, opened again, and its answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from tunesmith.engine.alone import alone
from tunesmith.engine.models import find_model, local_directory
from tunesmith.engine.quiet import quiet_libraries
from tunesmith.engine.session import open_session
from tunesmith.engine.steps import fold
from tunesmith.engine.store import Stage, read_lock
from tunesmith.errors import OptionError, RunError
from tunesmith.nn.pretrained import trusting
from tunesmith.nn.tasks import CAUSAL_LM, Task
from tunesmith.plugin.registry import registry
from tunesmith.plugin.session import Session
from tunesmith.recipe import Recipe

__all__ = ["Opened", "Prompt", "answers", "open_session_of", "prompts_of"]

Prompt: TypeAlias = "str | Sequence[Mapping[str, Any]]"
"""What a user says, or all messages so far."""


@attrs.frozen(eq=False)
class Opened:
    """The session that a run has ended with."""

    run: Path
    recipe: Recipe
    session: Session
    task: Task
    """What the model is for."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, with the recipe's chat template."""
        return self.session.tokenizer

    @property
    def model(self) -> Any:
        """The model in eval mode: loaded when first asked for, and kept."""
        if self.session.loaded:
            return self.session.model_for(task=self.task)
        from tunesmith.nn import fused_layers

        with (
            alone(f"loading the model of {self.run} to generate with", brief=True),
            trusting(self.recipe.trust_remote_code),
            quiet_libraries(),
        ):
            model = self.session.model_for(task=self.task)
        model.eval()
        fused_layers.use(model)
        return model

    @property
    def writer(self) -> Any:
        """The model, if it is one that writes; `RunError` if not."""
        if self.task != CAUSAL_LM:
            raise RunError(
                f"{self.run}: its model is for {self.task}, and does not write; call "
                "`result.model` with ids of `result.tokenizer`"
            )
        return self.model

    def unload(self) -> None:
        """Let the model go."""
        import torch

        self.session.unload()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def open_session_of(run: Path, stages: Sequence[Stage]) -> Opened:
    """Return the session after the last finished stage of a run; no weight is read.

    Errors: `RunError` if the run has made neither a model nor an adapter.
    """
    import torch

    if not any(stage.model or stage.adapter for stage in stages):
        raise RunError(
            f"{run}: holds no model and no adapter to generate with; there is one when a training "
            "or a merge is finished"
        )
    # a run may be somebody else's, whose recipe gets no variable of this machine
    recipe = Recipe.from_yaml(run / "recipe.yaml", variables={})
    lock = read_lock(run)
    device = lock["device"] if torch.cuda.is_available() or lock["device"] == "cpu" else "cpu"
    models = [stage.model for stage in stages if stage.model is not None]
    base = models[-1] if models else local_directory(find_model(recipe.model))
    with trusting(recipe.trust_remote_code), quiet_libraries():
        session = open_session(recipe, base, device, lock["precision"])
        session = fold(recipe, session, {stage.name: stage for stage in stages}, registry())
    return Opened(run, recipe, session, _task(session, stages))


def _task(session: Session, stages: Sequence[Stage]) -> Task:
    """Return what the model at the end of a run is for."""
    if session.current is not None:
        return session.adapters[session.current].task
    for stage in reversed(stages):
        if stage.model is not None:
            if stage.verb != "train":
                return CAUSAL_LM
            task: Task = registry().find("trainers", stage.plugin).load().task
            return task
    return CAUSAL_LM


def prompts_of(prompt: Any) -> tuple[list[Prompt], bool]:
    """Return prompts as a list, and whether there were several: a conversation is one.

    Errors: `OptionError` for what is neither.
    """
    if isinstance(prompt, str):
        return [prompt], False
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        each: list[Any] = list(prompt)
        if each and all(isinstance(one, Mapping) for one in each):
            return [each], False
        if all(isinstance(one, str) or _is_conversation(one) for one in each):
            return each, True
    raise OptionError(
        [
            f"prompt: got {_shown(prompt)}; expected a text, a conversation such as "
            '[{"role": "user", "content": "..."}], or a list of these'
        ]
    )


def _is_conversation(value: Any) -> bool:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or not value:
        return False
    return all(isinstance(one, Mapping) for one in value)


def _shown(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        kinds = sorted({type(one).__name__ for one in value})
        return f"a {type(value).__name__} of {' and '.join(kinds) or 'nothing'}"
    return f"a {type(value).__name__}"


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: str | Sequence[str] = (),
    seed: int | None = None,
    batch_size: int = 64,
) -> list[str]:
    """Return the answer to each prompt as text; errors are those of `plugin.rollouts.ask`."""
    from tunesmith.nn.rollout import Sampling
    from tunesmith.plugin.rollouts import ask

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        # what its makers found a model to need in a chat; the rest of it is as asked here
        repetition_penalty=getattr(model.generation_config, "repetition_penalty", None) or 1.0,
    )
    ends = [stop] if isinstance(stop, str) else list(stop)
    said = ask(model, tokenizer, prompts, sampling, seed=seed, stop=ends, batch_size=batch_size)
    return list(said.texts)
