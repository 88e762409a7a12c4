"""Answers from the model of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.data import templates
from tunesmith.data.render import Renderer
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

    recipe = Recipe.from_yaml(run / "recipe.yaml")
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
    import torch
    from transformers import set_seed

    from tunesmith.data.pack import padding_id
    from tunesmith.nn import decoder

    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    text = templates.render(tokenizer, messages, answer=True)
    encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p}
    if seed is not None:
        set_seed(seed)
    # a template may end turns with a token that is not the tokenizer's eos
    stop = list(Renderer(tokenizer, max_length=8).stop_ids)
    with torch.no_grad():
        output = decoder.generate(
            model,
            **encoded,
            max_new_tokens=max_new_tokens,
            eos_token_id=stop,
            pad_token_id=padding_id(tokenizer),
            use_cache=True,
            **options,
        )
    new_tokens = output[0, encoded["input_ids"].shape[1] :]
    answer: str = tokenizer.decode(new_tokens, skip_special_tokens=True)
    return answer.strip()
