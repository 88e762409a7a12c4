"""Answers from the model of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.engine.alone import alone
from tunesmith.engine.models import find_model, local_directory
from tunesmith.engine.quiet import quiet_libraries
from tunesmith.engine.session import open_session
from tunesmith.engine.steps import fold
from tunesmith.engine.store import Stage, read_lock
from tunesmith.errors import RunError
from tunesmith.nn.pretrained import trusting
from tunesmith.plugin.registry import registry
from tunesmith.recipe import Recipe

__all__ = ["generate", "load_for_generation"]


def load_for_generation(run: Path, stages: Sequence[Stage]) -> tuple[Any, Any]:
    """Return (model, tokenizer) as they stand after the last stage of a run: base and adapter."""
    import torch

    # a run may be somebody else's, whose recipe gets no variable of this machine
    recipe = Recipe.from_yaml(run / "recipe.yaml", variables={})
    lock = read_lock(run)
    device = lock["device"] if torch.cuda.is_available() or lock["device"] == "cpu" else "cpu"
    if not any(stage.model or stage.adapter for stage in stages):
        raise RunError(f"{run}: holds no model and no adapter to generate with")
    models = [stage.model for stage in stages if stage.model is not None]
    base = models[-1] if models else local_directory(find_model(recipe.model))
    with trusting(recipe.trust_remote_code), quiet_libraries():
        session = open_session(recipe, base, device, lock["precision"])
        session = fold(recipe, session, {stage.name: stage for stage in stages}, registry())
    from tunesmith.nn import fused_layers

    with (
        alone(f"loading the model of {run} to generate with", brief=True),
        trusting(recipe.trust_remote_code),
        quiet_libraries(),
    ):
        model = session.model
    model.eval()
    fused_layers.use(model)
    return model, session.tokenizer


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> str:
    """Return the answer as text, without special tokens."""
    from tunesmith.nn.rollout import Sampling
    from tunesmith.plugin.rollouts import ask

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        # what its makers found a model to need in a chat; the rest of it is as asked here
        repetition_penalty=getattr(model.generation_config, "repetition_penalty", None) or 1.0,
    )
    return ask(model, tokenizer, [prompt], sampling, seed=seed).texts[0]
