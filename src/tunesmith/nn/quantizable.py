"""Which weights of a model can be held in 4 bits, and why the others are not.

A layer is known by what it does, not by its class: a linear layer is one whose `forward` gives what
`torch.nn.functional.linear` gives, tried on small made-up weights, and so it is with the experts of
a mixture. This needs no weights of the model: its skeleton on the meta device will do.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from tunesmith.errors import ModelError
from tunesmith.nn.checkpoint import within
from tunesmith.nn.nf4_experts import experts_in
from tunesmith.nn.tasks import task_of
from tunesmith.units import byte_size

__all__ = ["ENDS", "Kept", "Split", "described", "is_linear", "split", "tell"]

_OUT, _IN = 6, 10
# names of a setting that says how many experts a mixture has
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_REST = ("norms, biases and the like", "they are small")
ENDS = "embeddings and head"
_ENDS = (ENDS, "as QLoRA leaves them")
_ROUTERS = ("routers", "they decide which expert a token goes to, and are small")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@attrs.frozen
class Kept:
    """Weights that stay in the compute dtype."""

    what: str
    """Such as "experts"."""
    parameters: int
    why: str


@attrs.frozen
class Split:
    """What of a model is held in 4 bits."""

    targets: dict[str, tuple[int, ...]]
    """Shape of each parameter that is, by its name."""
    kept: tuple[Kept, ...]
    """The others, the largest first."""

    @property
    def quantized(self) -> int:
        """How many weights are held in 4 bits."""
        return sum(math.prod(shape) for shape in self.targets.values())

    @property
    def plain(self) -> int:
        """How many weights are not."""
        return sum(each.parameters for each in self.kept)

    @property
    def unexpected(self) -> int:
        """How many are not, besides the embeddings, the head and what is small."""
        ends = {_REST[0], _ENDS[0], _ROUTERS[0]}
        return sum(each.parameters for each in self.kept if each.what not in ends)


def split(model: Any, skip: Iterable[str] = (), *, plain_only: bool = False) -> Split:
    """Return which parameters of a model, or of its skeleton, are to be held in 4 bits.

    `skip` names modules to leave as they are; with `plain_only` so are all but layers of just the
    classes nn.Linear and Conv1D, as bitsandbytes' are. Raises ModelError for a name that no such
    layer has, and for a model of which nothing can be held so.
    """
    skip = tuple(skip)
    targets: dict[str, tuple[int, ...]] = {}
    kept: dict[tuple[str, str], int] = defaultdict(int)
    reasons = _Reasons(model, skip, plain_only)
    seen: set[int] = set()
    for name, module in model.named_modules():
        reasons.enter(name, module)
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full = f"{name}.{own}" if name else own
            why = reasons.why_kept(name, module, own, parameter)
            if why is None:
                targets[full] = tuple(parameter.shape)
            else:
                kept[why] += parameter.numel()
    known = {*reasons.linears, *reasons.experts}
    unknown = [each for each in skip if not any(within(n, each) for n in known)]
    if unknown:
        endings = sorted({name.rpartition(".")[2] for name in known})
        raise ModelError(
            f"quantize: 'skip' names {', '.join(unknown)}, which is no linear layer of this "
            f"model; its layers end in: {', '.join(endings)}"
        )
    found = Split(
        targets,
        tuple(
            Kept(what, count, why)
            for (what, why), count in sorted(kept.items(), key=lambda item: -item[1])
        ),
    )
    if not targets:
        others = [f"{each.what} ({each.why})" for each in found.kept if each.what != _REST[0]]
        raise ModelError(
            f"quantize: {type(model).__name__} has no weight that can be held in 4 bits, only "
            f"{', '.join(others) or 'small ones'}; leave the quantize step out"
        )
    return found


def described(found: Split, held: int, itemsize: int, precision: str) -> list[str]:
    """Return as sentences what is held in how few bytes, and what is not and why.

    `held` is how many bytes that takes; `itemsize` and `precision` are those of the compute dtype.
    """
    plain = found.plain * itemsize
    share = plain / max(1, held + plain)
    lines = [
        f"{_short(found.quantized)} weights in {byte_size(held)}; {_short(found.plain)} stay in "
        f"{precision}, {byte_size(plain)}, {share:.0%} of the bytes:"
    ]
    return lines + [
        f"{_short(each.parameters)} {each.what} ({each.why})"
        for each in found.kept
        if each.parameters >= _TOLD * found.plain
    ]


# what is a smaller share of all that stays as it is would only make a plan longer
_TOLD = 0.02
# of the bytes, when what nobody expects to stay as it is takes more
_WARNED = 0.25


def tell(found: Split, held: int, dtype: torch.dtype) -> None:
    """Log what `described` says, as a warning if much stays in `dtype` that one would not expect.

    Embeddings, the head and what is small are expected to.
    """
    lines = described(found, held, dtype.itemsize, str(dtype).removeprefix("torch."))
    all_bytes = held + found.plain * dtype.itemsize
    much = found.unexpected * dtype.itemsize > _WARNED * all_bytes
    level = logging.WARNING if much else logging.INFO
    logging.getLogger("tunesmith").log(level, "quantized: %s %s", lines[0], "; ".join(lines[1:]))


def _short(count: int) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return str(count)


class _Reasons:
    """What is known of a model as a whole."""

    def __init__(self, model: Any, skip: tuple[str, ...], plain_only: bool) -> None:
        self._plain_only = plain_only
        self.linears = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
        }
        self.experts = {
            name
            for name, module in model.named_modules()
            if any(p.dim() == 3 for p in module.parameters(recurse=False))
            and "expert" in f"{name}.{type(module).__name__}".lower()
        }
        self._skip = skip
        self._ends = get_keys_to_not_convert(model)
        if task_of(model).labels:  # a classifier's head is all that is not its body
            heads = {name.partition(".")[0] for name, _ in model.named_parameters()}
            self._ends += sorted(heads - {model.base_model_prefix})
        self._in_fp32 = [
            *(getattr(model, "_keep_in_fp32_modules", None) or ()),
            *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
        ]
        config = model.config.get_text_config()
        counts = (getattr(config, name, None) for name in _COUNTS)
        self._experts = {count for count in counts if isinstance(count, int) and count > 1}
        self._attentions = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
        ]

    def enter(self, name: str, module: nn.Module) -> None:
        """Look at a module before its parameters are asked for."""
        self._in_4_bits: tuple[str, ...] = ()
        self._why_experts = ""
        if not any(p.dim() == 3 for p in module.parameters(recurse=False)):
            return
        if self._plain_only:
            self._why_experts = f"a {type(module).__name__} is none of the classes replaced"
        elif any(within(name, keep) for keep in self._skip):
            self._why_experts = "'skip' names them"
        elif any(within(name, keep) for keep in self._in_fp32):
            self._why_experts = "the model computes them in fp32"
        else:
            found = experts_in(module)
            if isinstance(found, str):
                self._why_experts = found
            else:
                self._in_4_bits = found

    def why_kept(
        self, name: str, module: nn.Module, own: str, parameter: Tensor
    ) -> tuple[str, str] | None:
        """Return what a parameter is and why it stays as it is; None if it goes into 4 bits."""
        if isinstance(module, nn.Embedding):
            return _ENDS
        if name in self.linears:
            return _REST if own != "weight" else self._why_kept_linear(name, module)
        what = type(module).__name__
        if parameter.dim() >= 2 and "expert" in f"{name}.{own}.{what}".lower():
            if own in self._in_4_bits:
                return None
            if self._in_4_bits:
                return _REST
            return "experts", self._why_experts or f"{own} of a {what} holds all of them"
        if parameter.dim() >= 3 and not isinstance(module, _CONVOLUTIONS):
            return f"{own} of {what}", "it is no linear layer's"
        return _REST

    def _why_kept_linear(self, name: str, module: Any) -> tuple[str, str] | None:
        if any(within(name, keep) for keep in self._ends):
            return _ENDS
        last = name.rpartition(".")[2]
        if any(within(name, keep) for keep in self._skip):
            return last, "'skip' names it"
        if any(within(name, keep) for keep in self._in_fp32):
            return last, "the model computes it in fp32"
        if self._routes(name, module) and not self._plain_only:
            return _ROUTERS
        if any(within(name, attention) for attention in self._attentions):
            return last, "torch's MultiheadAttention reads its weight past the layer"
        what = type(module).__name__
        if self._plain_only and type(module) not in (nn.Linear, Conv1D):
            return f"{last} ({what})", f"a {what} is none of the classes that are replaced"
        if not is_linear(module):
            return f"{last} ({what})", f"a {what} computes something else than a linear layer"
        return None

    def _routes(self, name: str, module: Any) -> bool:
        """Whether a linear layer gives one number for each expert, or for the shared one."""
        outputs = module.nf if isinstance(module, Conv1D) else module.out_features
        named = re.search(r"gate|router|routing", ".".join(name.split(".")[-2:]))
        return bool(self._experts) and bool(named) and outputs in {1, *self._experts}


def is_linear(module: nn.Module) -> bool:
    """Whether a module of nn.Linear's or a subclass does what `F.linear` does, or a Conv1D.

    A subclass is tried, with small weights of its own, in training and in eval mode and with large
    numbers: what bounds, rounds or scales its input or output is none.
    """
    if type(module) in (nn.Linear, Conv1D):
        return True
    if not isinstance(module, nn.Linear):
        return False
    held = dict(module.named_parameters()).keys() | dict(module.named_buffers()).keys()
    if held - {"weight", "bias"} or any(module.children()) or hooked(module):
        return False
    wanted = [
        each
        for each in inspect.signature(type(module).forward).parameters.values()
        if each.default is each.empty
    ]
    if len(wanted) != 2:  # self and the input
        return False
    # a model that is being loaded is made on the meta device
    with torch.no_grad(), torch.device("cpu"):
        return all(
            _multiplies(module, training, scale)
            for training in (True, False)
            for scale in (1e-3, 1.0, 1e4)
        )


def _multiplies(module: nn.Linear, training: bool, scale: float) -> bool:
    """Whether a linear layer's forward gives what F.linear gives for numbers of about `scale`."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_OUT, _IN, generator=generator)
    bias = None if module.bias is None else torch.randn(_OUT, generator=generator)
    x = scale * torch.randn(2, 3, _IN, generator=generator)
    trial = copy.copy(module)
    trial._parameters = {
        "weight": nn.Parameter(weight, requires_grad=False),
        "bias": None if bias is None else nn.Parameter(bias, requires_grad=False),
    }
    trial.in_features, trial.out_features, trial.training = _IN, _OUT, training
    try:
        own = type(module).forward(trial, x)
    except Exception:  # whatever a stranger's code raises at made-up input
        return False
    ours = F.linear(x, weight, bias)
    return (
        isinstance(own, Tensor)
        and own.shape == ours.shape
        and torch.allclose(own, ours, rtol=1e-5, atol=1e-5 * scale)
    )


def hooked(module: nn.Module) -> bool:
    """Whether a hook listens to this module, or somebody has replaced its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
