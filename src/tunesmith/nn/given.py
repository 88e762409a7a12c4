"""A model that somebody has in memory, as what a directory would hold of it.

A directory keeps config and weights; it opens as the class that its config names. So what is more
to a model than these two is found here and refused: hooks, forwards of somebody's own, other
modules. The model is read and not touched. See docs/adr/0025-a-model-in-memory.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import attrs
import torch
from torch import nn

from tunesmith.errors import ModelError
from tunesmith.nn import pretrained
from tunesmith.nn.saving import Weights

__all__ = ["Given", "given"]

_OURS = ("transformers", "peft", "accelerate", "bitsandbytes", "tunesmith")
"""Whose hooks and forwards leave what a model computes as it is."""
_FOUR_BIT = ("tunesmith.nn.nf4_linear", "tunesmith.nn.nf4_experts", "bitsandbytes.nn.modules")
"""Where the classes are of what holds weights in 4 bits in the place of a plain module."""
_SAVE = "save it by its own save_pretrained(), and give the directory"


class _Dense(Protocol):
    def dense_names(self, module: nn.Module) -> tuple[str, ...]: ...

    def dense_parameter(self, module: nn.Module, name: str) -> torch.Tensor: ...


@attrs.frozen(eq=False)
class Given:
    """What is to be written of a model in memory."""

    base: Any
    """The transformers model, without PEFT's around it."""
    weights: Weights
    """Its weights, adapters merged into them, each of several that are one only once."""
    tied: bool
    """Whether the head is left to be the embedding."""
    stored: dict[str, Any] | None
    """How its weights are quantized, as config.json has it; None if they are not."""
    nbytes: int
    """What its parameters and buffers take."""

    @property
    def dtype(self) -> torch.dtype:
        """What config.json names: that of the first weight of floating point."""
        kinds = (p.dtype for p in self.base.parameters() if p.is_floating_point())
        return next(kinds, torch.get_default_dtype())


def given(model: Any, dense: _Dense, directory: Path) -> Given:
    """Return what is to be written of a transformers model, or PEFT's around one.

    `dense` reads plain weights back (a `Quantizer` that quantizes nothing). `directory` holds the
    model's config.json: what opens of it is compared with the model. No weight is copied before it
    is asked for. Errors: `ModelError` for what a directory could not hold, or would open as another
    model.
    """
    wrapped = hasattr(model, "get_base_model")
    base = model.get_base_model() if wrapped else model
    what = f"the {type(base).__name__} that was given"
    stored = _stored(base, what)
    _check_weights(model, what)
    _check_adapters(model, base, what, stored)
    _check_class(base, what)
    skeleton = pretrained.skeleton(directory, pretrained.load_config(directory), compare=False)
    _check_same(base, skeleton, what)
    _check_foreign(model, what)
    nbytes = sum(each.nbytes for each in (*model.parameters(), *model.buffers()))
    if wrapped:
        from tunesmith.nn.merging import merging

        merged = merging(model, dense)
        rounded = {name: _rounded(base, name, make) for name, make in merged.weights.items()}
        return Given(base, rounded, merged.tied, None, nbytes)
    weights, tied = _plain(base)
    if stored is None:
        _check_names(weights, skeleton, what)
    return Given(base, weights, tied, stored, nbytes)


def _stored(base: Any, what: str) -> dict[str, Any] | None:
    """Return the quantization of a model; refuse one that only its own library can write."""
    found = getattr(base.config, "quantization_config", None)
    quantizer = getattr(base, "hf_quantizer", None)
    if found is None and quantizer is not None:
        found = quantizer.quantization_config
    if found is None:
        return None
    row: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    method = str(getattr(row.get("quant_method"), "value", row.get("quant_method")))
    if method != "bitsandbytes" or row.get("load_in_8bit"):
        name = f"{method} 8-bit" if row.get("load_in_8bit") else method
        raise ModelError(
            f"{what} is quantized with {name}; of quantized models in memory those in 4 bits of "
            f"bitsandbytes are taken: {_SAVE}, or give the unquantized model"
        )
    return {**row, "quant_method": method}


def _check_weights(model: Any, what: str) -> None:
    """Refuse weights that are not here, or here in part."""
    named = [*model.named_parameters(), *model.named_buffers()]
    away = [name for name, tensor in named if tensor.is_meta]
    if away:
        raise ModelError(
            f"{what} has {len(away)} weights on the meta device, such as {away[0]}: they have no "
            "values, as after from_config under torch.device('meta'), or are offloaded to a disk; "
            "load it whole, or give the directory that it is in"
        )
    parts = [name for name, tensor in named if type(tensor).__name__ == "DTensor"]
    if parts:
        raise ModelError(
            f"{what} is divided among processes ({parts[0]} is a part): {_SAVE}, or give it whole"
        )


def _check_adapters(model: Any, base: Any, what: str, stored: Any) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(n, m) for n, m in base.named_modules() if isinstance(m, BaseTunerLayer)]
    if model is base:
        if layers:
            raise ModelError(
                f"{what} has layers of an adapter in it ({layers[0][0]}); give the PeftModel "
                "itself, whose adapter is merged then, or the model without the adapter"
            )
        return
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise ModelError(
            f"{what} has an adapter that adds tokens to the sequence, which cannot be merged; give "
            "the model without it"
        )
    off = [name for name, layer in layers if layer.disable_adapters]
    if off:
        raise ModelError(
            f"{what} has its adapter switched off ({off[0]}), so that it is not clear which of the "
            "two is meant; call enable_adapter_layers(), or give the model without the adapter"
        )
    if stored is not None:
        raise ModelError(
            f"{what} is in 4 bits and has an adapter on it; merging would round the weights once "
            "more: merge the adapter by PEFT's merge_and_unload() if that is wanted, or give the "
            "unquantized model with the adapter"
        )


def _check_class(base: Any, what: str) -> None:
    kind = type(base)
    if kind.__module__.startswith("transformers_modules."):
        raise ModelError(
            f"{what} is built by code that came with it from a hub; {_SAVE} with "
            "trust_remote_code=True, if you trust that code"
        )


def _check_same(base: Any, skeleton: Any, what: str) -> None:
    """Refuse a model that is not put together as what its config opens as."""
    if type(base) is not type(skeleton):
        raise ModelError(
            f"{what} would open as a {type(skeleton).__name__} of transformers, which is another "
            "class and may compute something else; give a model of that class"
        )
    for path, plain in skeleton.named_modules():
        own = _own_module(base, path)
        if own is None:
            raise ModelError(f"{what} lacks {path}, which its config says it has; mend its config")
        kind = type(own)
        if kind is not type(plain) and kind.__module__ not in _FOUR_BIT:
            raise ModelError(
                f"{what} has a {kind.__name__} ({kind.__module__}) at {path or 'its top'}, where "
                f"its config makes a {type(plain).__name__}; the change would be lost: put the "
                "original in its place"
            )


def _check_foreign(model: Any, what: str) -> None:
    """Refuse what changes what a model computes and is in no file."""
    for name, module in model.named_modules():
        for how, function in _functions(module):
            home = getattr(function, "func", function)
            if str(getattr(home, "__module__", "")).partition(".")[0] not in _OURS:
                shown = getattr(home, "__qualname__", type(home).__name__)
                raise ModelError(
                    f"{what} has a {how} at {name or 'its top'}: {shown}; it may change what the "
                    "model computes, and no file holds it: remove it first"
                )


def _functions(module: nn.Module) -> Iterator[tuple[str, Any]]:
    if "forward" in vars(module):
        yield "forward of its own", vars(module)["forward"]
    for function in module._forward_pre_hooks.values():
        yield "hook before its forward", function
    for function in module._forward_hooks.values():
        yield "hook after its forward", function


def _plain(base: Any) -> tuple[Weights, bool]:
    """Return weights by their names, and whether those that are one by its config are one."""
    from tunesmith.nn.saving import plain_weights

    twins = dict(getattr(base, "all_tied_weights_keys", None) or {})
    weights = plain_weights(base)
    return weights, any(name not in weights for name in twins)


def _check_names(weights: Weights, skeleton: Any, what: str) -> None:
    from tunesmith.nn.saving import plain_weights

    expected = {
        name: tuple(tensor.shape)
        for name, tensor in skeleton.state_dict(keep_vars=True).items()
        if name not in set(skeleton._keys_to_ignore_on_save or ())
    }
    needed = plain_weights(skeleton)
    found = {name: tuple(make().shape) for name, make in weights.items()}
    problems = {
        "more than its config has": sorted(found.keys() - expected.keys()),
        "missing": sorted(needed.keys() - found.keys()),
        "of another shape than its config says": sorted(
            name for name in found.keys() & expected.keys() if found[name] != expected[name]
        ),
    }
    told = [
        f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''} {how}"
        for how, names in problems.items()
        if names
    ]
    if told:
        raise ModelError(f"{what} does not fit its config: {'; '.join(told)}; mend one of the two")


def _own_module(base: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path, past PEFT's layers on the way."""
    module: nn.Module | None = base
    for part in path.split(".") if path else ():
        module = None if module is None else getattr(_beneath(module), part, None)
    return None if module is None else _beneath(module)


def _beneath(module: nn.Module) -> nn.Module:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        inner = (
            module.original_module
            if isinstance(module, AuxiliaryTrainingWrapper)
            else module.base_layer
        )
        assert isinstance(inner, nn.Module)
        module = inner
    return module


def _rounded(base: Any, name: str, make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return what makes a merged weight in the dtype that the model holds it in."""
    path, _, own = name.rpartition(".")
    module = _own_module(base, path)
    held = getattr(module, own, None)
    dtype = held.dtype if isinstance(held, torch.Tensor) else None
    return lambda: make() if dtype is None else make().to(dtype)
