"""Opens the session of a recipe: tokenizer, chat template, device and dtype; no weights."""

from __future__ import annotations

from pathlib import Path

from tunesmith.data.render import set_chat_template
from tunesmith.plugin.session import Session
from tunesmith.recipe import Recipe

__all__ = ["open_session"]

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def open_session(recipe: Recipe, base: Path, device: str, precision: str) -> Session:
    """Return a session on a model directory; `precision` is "fp32", "bf16" or "fp16".

    Errors: `DataError` for a chat template that is missing or cannot be read; `ModelError` for a
    tokenizer that is missing or cannot be loaded.
    """
    import torch

    from tunesmith.nn.pretrained import load_tokenizer

    tokenizer = load_tokenizer(base)
    set_chat_template(tokenizer, recipe.chat_template)
    return Session(
        base=base,
        tokenizer=tokenizer,
        device=torch.device(device),
        dtype=getattr(torch, DTYPES[precision]),
        seed=recipe.seed,
    )
