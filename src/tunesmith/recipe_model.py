"""ModelObject: a model in memory in the place of a model's name, held and not looked into.

It is told by the names of its classes, so that nobody imports torch to find out; whoever has such
an object has imported it.
"""

from __future__ import annotations

import os
from typing import Any

import attrs

from tunesmith.errors import ModelError

__all__ = ["ModelObject", "model_of"]

_TAKEN = (
    "expected a hub id, a local Hugging Face directory, a .gguf file, or a transformers model "
    "(or PEFT's around one) with its tokenizer: Tuner(model, tokenizer=tokenizer)"
)


@attrs.frozen(repr=False)
class ModelObject:
    """A transformers model, or PEFT's around one, and its tokenizer; equal if they are the same."""

    model: Any = attrs.field(eq=id, hash=False)
    tokenizer: Any = attrs.field(eq=id, hash=False)

    @property
    def is_peft(self) -> bool:
        """Whether adapters of PEFT are on it."""
        return _is(self.model, "peft.peft_model", "PeftModel")

    def __str__(self) -> str:
        if not self.is_peft:
            return f"{type(self.model).__name__} in memory"
        name = type(self.model.get_base_model()).__name__
        adapters = " and ".join(f"'{each}'" for each in self.model.active_adapters)
        return f"{name} in memory with the adapter {adapters} merged into it"

    def __repr__(self) -> str:
        return f"<{self}>"


def model_of(model: Any, tokenizer: Any = None) -> str | ModelObject:
    """Return what a recipe holds of a model: a name, or the object with its tokenizer.

    Errors: `ModelError` that says what was got and what is taken.
    """
    if isinstance(model, (str, os.PathLike)):
        if tokenizer is not None:
            raise ModelError(
                f"tokenizer: got a {type(tokenizer).__name__} beside the name of a model, whose "
                "own tokenizer is read; leave it out, or save the one that is meant into the "
                "model's directory"
            )
        return os.fsdecode(model)
    if _is(model, "peft.peft_model", "PeftModel") or _is(
        model, "transformers.modeling_utils", "PreTrainedModel"
    ):
        return ModelObject(model, _tokenizer_for(model, tokenizer))
    what = f"model: got {_shown(model)}"
    for attribute in ("_orig_mod", "module", "model"):
        inner = getattr(model, attribute, None) if not isinstance(model, type) else None
        if _is(inner, "transformers.modeling_utils", "PreTrainedModel") or _is(
            inner, "peft.peft_model", "PeftModel"
        ):
            raise ModelError(
                f"{what} around a {type(inner).__name__}; give that: it is its .{attribute}"
            )
    if _is(model, "torch.nn.modules.module", "Module"):
        raise ModelError(
            f"{what}, a torch module that is no transformers model, of which no config tells how "
            f"it is built; {_TAKEN}"
        )
    raise ModelError(f"{what}; {_TAKEN}")


def _tokenizer_for(model: Any, tokenizer: Any) -> Any:
    if _is(tokenizer, "transformers.tokenization_utils_base", "PreTrainedTokenizerBase"):
        return tokenizer
    if tokenizer is None:
        name = getattr(getattr(model, "config", None), "_name_or_path", "") or "org/model"
        raise ModelError(
            f"model: got a {type(model).__name__} without its tokenizer; pass it along, such as "
            f"tokenizer=AutoTokenizer.from_pretrained({name!r})"
        )
    inner = getattr(tokenizer, "tokenizer", None)
    if _is(inner, "transformers.tokenization_utils_base", "PreTrainedTokenizerBase"):
        raise ModelError(
            f"tokenizer: got {_shown(tokenizer)} around a tokenizer; give its .tokenizer"
        )
    raise ModelError(
        f"tokenizer: got {_shown(tokenizer)}; expected a tokenizer of transformers, as "
        "AutoTokenizer.from_pretrained returns it"
    )


def _is(value: Any, module: str, name: str) -> bool:
    """Return whether a value is of a class, which need not be imported for it."""
    return any(
        each.__module__ == module and each.__name__ == name
        for each in getattr(type(value), "__mro__", ())
    )


def _shown(value: Any) -> str:
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"a {type(value).__name__}"
