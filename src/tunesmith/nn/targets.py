"""Which weights an adapter is put on: names a user gives, matched against the model's own.

Everything is decided on the model as it is without a quantizer, which may be on the meta device,
and handed to PEFT by full names: what a plan says is what is wrapped, and a name that matches
nothing is an error, never ignored.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ModelError, close_matches
from tunesmith.nn.quantizable import is_linear

__all__ = ["ALL_LINEAR", "Targets", "find_targets", "last_names"]

ALL_LINEAR = "all-linear"
"""Every linear layer that can be adapted without harm, stacked experts included."""

_ROUTERS = re.compile(r"(^|[._])(gate|router|gating|shared_expert_gate)(\.|$)|router")
_OTHER_SENSES = re.compile(
    r"(^|\.)(vision\w*|visual\w*|image\w*|video\w*|audio\w*|speech\w*|multi_modal\w*|embed_vision|"
    r"embed_audio)\."
)
_REGEX = set("*+?[](){}|^$\\")


@attrs.frozen
class Targets:
    """What an adapter is put on, by full names."""

    modules: tuple[str, ...]
    """Linear layers, convolutions and embeddings."""
    parameters: tuple[str, ...] = ()
    """Weights that belong to no layer of their own, such as stacked experts."""
    left_out: tuple[tuple[str, str], ...] = ()
    """Linear layers that "all-linear" does not mean, and why not."""

    def __str__(self) -> str:
        parts = []
        if self.modules:
            parts.append(f"{len(self.modules)} layers ({_endings(self.modules)})")
        if self.parameters:
            what = "stacked expert weights" if "expert" in self.parameters[0] else "weights"
            parts.append(f"{len(self.parameters)} {what} ({_endings(self.parameters)})")
        text = " and ".join(parts) or "nothing"
        reasons: dict[str, list[str]] = {}
        for name, why in self.left_out:
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            text += f"; not {_endings(names)}: {why}"
        return text


def last_names(targets: Targets) -> list[str]:
    """Return the last part of each name, once and in order, such as ["down_proj", "gate_proj"]."""
    return sorted({name.rpartition(".")[2] for name in (*targets.modules, *targets.parameters)})


def find_targets(
    model: Any, wanted: str | Sequence[str], *, experts: bool = True, stackable: str = ""
) -> Targets:
    """Return the layers and weights that names refer to.

    `wanted` is "all-linear", one name, a regular expression that whole names match, or several
    names; a name is the end of a module's or a parameter's full name, from a dot on. `experts`
    says whether "all-linear" takes stacked experts in; `stackable`, if not empty, why the method
    cannot adapt them. A model in memory is looked at as it is without quantizer and adapters.
    Errors: `ModelError` for a name that matches nothing, with near ones, or something that cannot
    be adapted.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if model.device.type != "meta":
        from tunesmith.nn.merging import skeleton_of

        model = skeleton_of(model)
    if wanted == ALL_LINEAR:
        found = _all_linear(model, experts, stackable)
    else:
        names = [wanted] if isinstance(wanted, str) else list(wanted)
        if ALL_LINEAR in names:
            raise ModelError(
                f'targets: got "{ALL_LINEAR}" among other names; it stands alone, or the names do'
            )
        if not names:
            raise ModelError(f'targets: got no name; give names of layers, or "{ALL_LINEAR}"')
        found = _named(model, names)
    if stackable and found.parameters:
        raise ModelError(
            f"targets: {found.parameters[0]} is no layer of its own, and {stackable}; set "
            "experts=False, or name other targets, or leave that option out"
        )
    if not found.modules and not found.parameters:
        raise ModelError(
            f"targets: {type(model).__name__} has no linear layer besides its head; name what "
            f"shall be adapted: {_some(_leaves(model))}"
        )
    return found


def _all_linear(model: Any, experts: bool, stackable: str) -> Targets:
    head = model.get_output_embeddings()
    fused = _fused(model)
    modules, left_out = [], []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        leaf = name.rpartition(".")[2]
        if module is head:
            left_out.append((name, "the head; name it in targets to adapt it"))
        elif _OTHER_SENSES.search(name):
            left_out.append((name, "text does not reach it"))
        elif _is_router(model, name, module):
            left_out.append((name, "a router"))
        elif leaf in fused:
            left_out.append((name, "PEFT takes that name for the stacked experts of this model"))
        elif why := _refused(model, name):
            left_out.append((name, why))
        elif not is_linear(module):
            left_out.append((name, f"a {type(module).__name__} computes something else"))
        else:
            modules.append(name)
    stacks = _stacks(model)
    if not experts or stackable:
        why = stackable or "experts=False"
        left_out += [(name, why) for name in stacks]
        if not experts:
            stacks = []
    return Targets(tuple(modules), tuple(stacks), tuple(left_out))


def _named(model: Any, names: Sequence[str]) -> Targets:
    layers = {name: module for name, module in model.named_modules() if name}
    weights = dict(model.named_parameters(remove_duplicate=False))
    modules: dict[str, None] = {}
    parameters: dict[str, None] = {}
    problems = []
    fused = _fused(model)
    for wanted in names:
        matches = _matching(wanted, layers)
        adaptable = [name for name in matches if _adaptable(layers[name])]
        stacks = [
            name
            for name in _matching(wanted, weights)
            if weights[name].dim() in (2, 3) and not _adaptable(layers[name.rpartition(".")[0]])
        ]
        if wanted in fused and not stacks:
            missing = sorted(set(fused[wanted].together) - set(names))
            if missing:
                problems.append(
                    f"'{wanted}' is one weight with {' and '.join(missing)} in this model; name "
                    f"them all, or the weight: {fused[wanted].weight}"
                )
                continue
            stacks = _matching(fused[wanted].weight, weights)
            adaptable = []
        refused = {why for name in adaptable if (why := _refused(model, name))}
        if refused:
            problems.append(f"'{wanted}': {refused.pop()}; leave it out")
        elif adaptable or stacks:
            modules.update(dict.fromkeys(adaptable))
            parameters.update(dict.fromkeys(stacks))
        elif matches:
            within = [n for n in layers if n.startswith(f"{matches[0]}.") and _adaptable(layers[n])]
            hint = f"; in it there are {_some(_ends(within))}" if within else ""
            problems.append(
                f"'{wanted}' is a {type(layers[matches[0]]).__name__}, and an adapter goes on "
                f"linear layers, convolutions, embeddings and stacked experts{hint}"
            )
        else:
            known = [*_leaves(model), *(name for name in layers if _adaptable(layers[name]))]
            problems.append(
                f"'{wanted}' matches no layer and no weight of {type(model).__name__}"
                + (close_matches(wanted, known) or f"; it has {_some(_leaves(model))}")
            )
    if problems:
        raise ModelError("targets: " + "; ".join(problems))
    return Targets(tuple(modules), tuple(parameters))


def _matching(wanted: str, known: Iterable[str]) -> list[str]:
    found = [name for name in known if name == wanted or name.endswith(f".{wanted}")]
    if found or not _REGEX & set(wanted):
        return found
    try:
        pattern = re.compile(wanted)
    except re.error as error:
        raise ModelError(
            f"targets: got '{wanted}', which is no name and no regular expression: {error}"
        ) from None
    return [name for name in known if pattern.fullmatch(name)]


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, nn.Embedding, _ConvNd)) and (
        not isinstance(module, (nn.Linear, Conv1D)) or is_linear(module)
    )


def _is_router(model: Any, name: str, module: Any) -> bool:
    """Whether a linear layer decides which experts a token goes to."""
    if not _ROUTERS.search(name):
        return False
    parent = model.get_submodule(name.rpartition(".")[0])
    if any("expert" in child for child, _ in parent.named_modules()) or "router" in name:
        return True
    out = module.nf if isinstance(module, Conv1D) else module.out_features
    return out == 1 or out in _expert_counts(model)


def _expert_counts(model: Any) -> set[int]:
    text = model.config.get_text_config()
    return {
        value
        for config in (model.config, text)
        for key, value in vars(config).items()
        if "expert" in key and type(value) is int and value > 1
    }


def _stacks(model: Any) -> list[str]:
    """Return the weights [experts, ..., ...] of all experts of a layer."""
    counts = _expert_counts(model)
    owners = dict(model.named_modules())
    return [
        name
        for name, weight in model.named_parameters()
        if weight.dim() == 3
        and weight.shape[0] in counts
        and "expert"
        in name.rpartition(".")[0] + type(owners[name.rpartition(".")[0]]).__name__.lower()
        and not isinstance(owners[name.rpartition(".")[0]], _ConvNd)
        and not _OTHER_SENSES.search(name)
    ]


@attrs.frozen
class _Fused:
    weight: str
    """Name of the stacked weight that a layer of this name is a part of."""
    together: tuple[str, ...]
    """The names that are one weight with it."""


def _fused(model: Any) -> dict[str, _Fused]:
    """Return the names that PEFT takes for stacked experts, where a model has such.

    They are the layers' names in transformers 4. PEFT rewrites targets that end in one of them,
    whatever else of that name the model has, so that no other layer can bear it.
    """
    from peft.utils import transformers_weight_conversion as conversion

    kind = conversion._MODEL_TO_CONVERSION_PATTERN.get(getattr(model.config, "model_type", None))
    mapping = conversion._MOE_TARGET_MODULE_MAPPING.get(kind or "", {})
    fused = conversion._MOE_FUSED_TARGETS.get(kind or "", {})
    if not fused:
        return {}
    return {old: _Fused(new, tuple(fused.get(new, (old,)))) for old, new in mapping.items()}


def _refused(model: Any, name: str) -> str:
    """Return why an adapter on a layer would not act, or PEFT puts none there; "" if it does.

    PEFT knows some such layers by name. Others show in the source of the module they are in: it
    takes their weight and passes them by, as state space models hand it to a kernel.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    owner, _, leaf = name.rpartition(".")
    why = "the module it is in reads its weight past the layer, so an adapter would not act"
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, leaf)
    except ValueError:
        return why
    holder: Any = type(model.get_submodule(owner))
    source = _source(holder)
    return why if re.search(rf"\bself\.{re.escape(leaf)}\.weight\b{_OF_NO_VALUE}", source) else ""


_OF_NO_VALUE = r"(?!\s*\.\s*(dtype|device|shape|ndim|size|dim|numel|requires_grad|is_\w+)\b)"
"""What may be asked of a weight without reading it."""


@functools.cache
def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def _leaves(model: Any) -> list[str]:
    """Return the endings of what can be adapted."""
    names = [name for name, module in model.named_modules() if name and _adaptable(module)]
    return _ends([*names, *_stacks(model)])


def _ends(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _some(names: Sequence[str], count: int = 12) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def _endings(names: Iterable[str]) -> str:
    """Return the last parts of names with two where one says too little, sorted."""
    short = set()
    for name in names:
        *_, owner, leaf = ("", *name.split("."))
        short.add(f"{owner}.{leaf}" if leaf in ("weight",) or leaf.isdigit() else leaf)
    return _some(sorted(short))
