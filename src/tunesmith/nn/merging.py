"""Merging: the weights of a plain model that computes what a base and its adapters compute.

Every weight of the result is one entry, made when it is asked for: the base weight dequantized to
fp32, and the updates of all adapter layers on it, one upon the other, added in fp32 by PEFT's own
arithmetic. Entries and adapter tensors are counted before the first is made, so nothing of an
adapter can be left behind.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import attrs
import torch
from peft.tuners.lora.layer import Linear as LoraLayer
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from peft.utils.other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError

__all__ = ["Adapted", "Dense", "Merging", "merging", "skeleton_of"]


class Dense(Protocol):
    """Reads base weights back: a `tunesmith.plugin.quantizers.Quantizer`."""

    def dense_names(self, module: nn.Module) -> tuple[str, ...]:
        """Return the names of a module's own weights."""
        ...

    def dense_parameter(self, module: nn.Module, name: str) -> torch.Tensor:
        """Return one of them in fp32."""
        ...


@attrs.frozen(eq=False)
class Adapted:
    """A weight with adapters on it: who changes it, and what it is without them."""

    name: str
    """Its name within `module`, such as "weight"."""
    layers: tuple[Any, ...]
    """PEFT's layers around the module, the outermost first."""
    module: nn.Module
    """The base model's own module."""
    plain: nn.Module
    """What stands there in the unquantized model, on the meta device."""

    @property
    def own(self) -> tuple[Any, ...]:
        """The layers that change this weight: one that adapts a parameter changes only that."""
        return tuple(
            layer
            for layer in self.layers
            if getattr(layer, "parameter_name", self.name) == self.name
        )

    @property
    def transposed(self) -> bool:
        """Whether the base holds it as [out, in] and the plain model as [in, out]."""
        return (
            self.name == "weight"
            and isinstance(self.plain, Conv1D)
            and isinstance(self.module, nn.Linear)
        )


@attrs.frozen(eq=False)
class Merging:
    """What merging will write."""

    weights: Mapping[str, Callable[[], torch.Tensor]]
    """Each weight of the plain model by its name in it; made when called."""
    adapted: Mapping[str, Adapted]
    """Those with adapters on them."""
    tied: bool
    """Whether weights that are one in the base are one in the result."""


def skeleton_of(base: Any) -> Any:
    """Return the plain model of a loaded one's class and config, on the meta device."""
    config = copy.deepcopy(base.config)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with torch.device("meta"):
        return type(base)(config)


def merging(model: Any, dense: Dense, skeleton: Any | None = None) -> Merging:
    """Return the weights of the plain model that `model`, with its active adapters, stands for.

    Errors: `ModelError` naming every adapter tensor that would not be merged exactly once, every
    weight that the plain model has and this one has not, or of another shape, and a layer that
    cannot be merged.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain = skeleton_of(base) if skeleton is None else skeleton
    walk = _Walk(dense, plain)
    walk.visit(base, "")
    tied = _tied(base, walk)
    left_out = set(base._keys_to_ignore_on_save or ()) | set(tied or ())
    weights = {name: make for name, make in walk.weights.items() if name not in left_out}
    _check_names(weights, plain, left_out)
    _check_used(model, walk, weights)
    adapted = {name: each for name, each in walk.adapted.items() if name in weights}
    return Merging(weights, adapted, tied is not None)


class _Walk:
    """Goes through a model once, past adapter layers, and notes what each weight is made of."""

    def __init__(self, dense: Dense, skeleton: Any) -> None:
        self.dense = dense
        self.skeleton = skeleton
        self.weights: dict[str, Callable[[], torch.Tensor]] = {}
        self.adapted: dict[str, Adapted] = {}
        self.sources: dict[str, tuple[Any, ...]] = {}
        """The trained tensors that go into each weight."""
        self.owners: dict[str, int] = {}

    def visit(self, module: nn.Module, path: str) -> None:
        outer, layers = module, []
        while True:
            if isinstance(module, TrainableTokensWrapper):
                if module.active_adapters:
                    layers.append(module.token_adapter)
                module = module.original_module
            elif isinstance(module, ModulesToSaveWrapper):
                module = _trained_module(path, module)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                raise _not_mergeable(path, module)
            elif isinstance(module, BaseTunerLayer):
                layers.append(module)
                module = module.base_layer
            else:
                break
        names = self.dense.dense_names(module)
        plain = self._plain(path) if names else nn.Module()
        for layer in layers:
            if isinstance(layer, MultiheadAttention):
                raise _not_mergeable(path, layer)
            if layer.merged_adapters:
                raise ModelError(
                    f"{path}: the adapter is merged into its base already; unmerge it first"
                )
            target = getattr(layer, "parameter_name", None)
            if target is not None and target not in names:
                raise ModelError(
                    f"{path}: the adapter is on its {target}, and it has only "
                    f"{', '.join(names) or 'no weight'}; the adapter belongs to another model"
                )
        prefix = f"{path}." if path else ""
        for name in names:
            self._note(prefix + name, Adapted(name, tuple(layers), module, plain), outer)
        for name, child in module.named_children():
            self.visit(child, prefix + name)

    def _plain(self, path: str) -> nn.Module:
        try:
            plain: nn.Module = self.skeleton.get_submodule(path)
        except AttributeError:
            raise ModelError(
                f"{path}: {type(self.skeleton).__name__} has no such module; the model was changed "
                "after it was loaded, and cannot be written as a plain one"
            ) from None
        return plain

    def _note(self, full: str, each: Adapted, outer: nn.Module) -> None:
        own = each.own
        self.owners[full] = id(outer)
        sources = [p for layer in own for p in _active_tensors(layer)]
        # not by its name: what a 4-bit layer calls its weight is dequantized for whoever asks
        held = each.module._parameters.get(each.name, each.module._buffers.get(each.name))
        self.sources[full] = (*sources, held) if isinstance(held, torch.Tensor) else tuple(sources)

        def make() -> torch.Tensor:
            value = self.dense.dense_parameter(each.module, each.name)
            if own:
                value = merged_weight(each, value, self.dense)
            return value.T if each.transposed else value

        self.weights[full] = make
        if own:
            self.adapted[full] = each


def merged_weight(each: Adapted, value: torch.Tensor, dense: Dense) -> torch.Tensor:
    """Return a base weight [as the base holds it, fp32] with every update on it added."""
    with torch.no_grad():
        shell = dense_shell(each, value, dense)
        with standing_in(each, shell):
            for layer in reversed(each.own):
                _merge(layer)
        merged: torch.Tensor = getattr(shell, each.name).detach()
    if not merged.isfinite().all():
        raise ModelError(
            f"the merged {each.name} of {type(each.module).__name__} holds NaN or Inf; merging "
            "needs finite numbers; check the adapter: its training seems to have diverged"
        )
    return merged


def dense_shell(each: Adapted, value: torch.Tensor, dense: Dense) -> nn.Module:
    """Return a module that stands in for an adapter's base, with this weight in fp32."""
    module = each.module
    if any(hasattr(layer, "parameter_name") for layer in each.own):
        shell = nn.Module()
    elif isinstance(module, nn.Linear):
        shell = nn.Linear(
            module.in_features, module.out_features, module.bias is not None, device="meta"
        )
    else:
        shell = copy.copy(module)
        shell._parameters = dict(module._parameters)
        shell._buffers = dict(module._buffers)
    for name in dense.dense_names(module):
        if name in shell._parameters:
            part = value if name == each.name else dense.dense_parameter(module, name)
            # a copy: merging adds into it, and in fp32 the base's own is what is read back
            shell._parameters[name] = nn.Parameter(part.clone(), requires_grad=False)
    if each.name not in shell._parameters:
        shell.register_parameter(each.name, nn.Parameter(value.clone(), requires_grad=False))
    return shell


@contextmanager
def standing_in(each: Adapted, shell: nn.Module) -> Iterator[None]:
    """Put a module in the base's place for an adapter's layers, and the base back."""
    each.layers[-1].base_layer = shell
    try:
        yield
    finally:
        for layer in each.layers:
            layer.merged_adapters.clear()
        each.layers[-1].base_layer = each.module


def _merge(layer: Any) -> None:
    if type(layer).__module__.endswith(".bnb"):
        # PEFT's bitsandbytes layers merge by quantizing again; the base standing in is plain
        LoraLayer.merge(layer, safe_merge=False)
    else:
        layer.merge(safe_merge=False)


def _active_tensors(layer: Any) -> list[torch.Tensor]:
    """Return the tensors of a PEFT layer that belong to its active adapters, not the base's."""
    active = set(layer.active_adapters)
    found = []
    for kind in (*layer.adapter_layer_names, *layer.other_param_names):
        holder: Any = getattr(layer, kind, None)
        if not hasattr(holder, "keys"):
            continue
        for name in active.intersection(holder.keys()):
            part = holder[name]
            if isinstance(part, torch.Tensor):
                found.append(part)
            elif isinstance(part, nn.Module):
                found += [*part.parameters(), *part.buffers()]
    return found


def _trained_module(path: str, wrapper: ModulesToSaveWrapper) -> nn.Module:
    """Return what stands in the place of a module that is trained as a whole."""
    active = wrapper.active_adapters
    if not active or wrapper.disable_adapters:
        original: nn.Module = wrapper.original_module
        return original
    if len(active) > 1:
        raise ModelError(
            f"{path}: {len(active)} adapters have a module of their own here; one can be merged"
        )
    trained: nn.Module = wrapper.modules_to_save[active[0]]
    return trained


def _not_mergeable(path: str, layer: Any) -> ModelError:
    return ModelError(
        f"{path}: {type(layer).__name__} cannot be merged; use the adapter on its base, or "
        "merge it with PEFT's own merge_and_unload() from the saved adapter"
    )


def _tied(base: Any, walk: _Walk) -> set[str] | None:
    """Return the names that are another weight's twin; None if they are no longer."""
    twins = {
        name: source
        for name, source in dict(getattr(base, "all_tied_weights_keys", None) or {}).items()
        if name in walk.weights and source in walk.weights
    }
    for name, source in twins.items():
        if walk.owners[name] == walk.owners[source]:
            continue  # a module that stands in two places
        ours, theirs = ([id(tensor) for tensor in walk.sources[each]] for each in (name, source))
        if ours != theirs:
            return None  # an adapter on one of two makes two weights of them
    return set(twins)


def _check_names(weights: Mapping[str, Any], plain: Any, left_out: set[str]) -> None:
    """Compare what will be written with what the plain model has."""
    expected = set(plain.state_dict()) - left_out
    missing, unknown = sorted(expected - set(weights)), sorted(set(weights) - expected)
    if missing or unknown:
        told = [
            f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for what, names in (("missing", missing), ("not the model's own", unknown))
            if names
        ]
        raise ModelError(
            f"merging would not give the weights of {type(plain).__name__}: {'; '.join(told)}; "
            "the base is held in a form that its quantizer cannot read back"
        )


def _check_used(model: Any, walk: _Walk, weights: Mapping[str, Any]) -> None:
    """Count each tensor of the active adapters among what is merged."""
    used: Counter[int] = Counter()
    by_owner: set[tuple[int, int]] = set()
    for name in weights:
        for tensor in walk.sources[name]:
            # a layer's tensors go into weight and bias alike, by one merge; a module that stands
            # in two places is one
            if (pair := (id(tensor), walk.owners[name])) not in by_owner:
                by_owner.add(pair)
                used[id(tensor)] += 1
    wrong: list[str] = []
    for name, tensor in adapter_tensors(model).items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ModelError(
                f"{name} of the adapter holds NaN or Inf; merging needs finite numbers; its "
                "training seems to have diverged: train it again with a lower learning_rate"
            )
        times = used[id(tensor)]
        if times != 1:
            wrong.append(f"{name} ({times} times)" if times else name)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ModelError(
            f"of the adapter, {', '.join(sorted(wrong)[:5])}{more} would not be merged exactly "
            "once; use the adapter on its base, or merge it with PEFT's own merge_and_unload()"
        )


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return every tensor of a PEFT model's active adapters by its name in their file."""
    if not hasattr(model, "peft_config"):
        return {}
    state = model.state_dict(keep_vars=True)
    found: dict[str, torch.Tensor] = {}
    for adapter in model.active_adapters:
        found |= get_peft_model_state_dict(
            model, state_dict=state, adapter_name=adapter, save_embedding_layers=False
        )
    return found
