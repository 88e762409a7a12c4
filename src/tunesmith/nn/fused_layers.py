"""What stands between a model's linear layers, each in one pass instead of several.

RMSNorm modules, gated feed-forward blocks and the rotary embedding are recognised by what they do:
each is called with random numbers beside the fused op, and taken over only if both give the same.
So this is for every model that is made of them, whatever it is called; all else stays as it is.
What a module is called with decides anew each time: on a device that has no kernels or with a
trained norm weight it runs its own code.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.ops import native_status
from tunesmith.ops.dtypes import DTYPES
from tunesmith.ops.elementwise import ACTIVATIONS, gated, rms_norm, rotary

__all__ = ["Fused", "described", "find", "gated_mlp", "norm", "use"]

_FEATURES = 48
_FAST = {device for device in ("cpu", "cuda") if native_status().why_slow_on(device) is None}
_COUNTED = {"norms": "norms", "gated": "gated MLPs"}


def use(model: nn.Module) -> dict[str, int] | str:
    """Let a model's layers run fused where they can; return what `find` returns."""
    why = native_status().why_slow_on(next(model.parameters()).device.type)
    if why is not None:
        return why
    fused, files = _fusable(model)
    for module, forward in fused.items():
        module.forward = forward  # type: ignore[assignment]  # it is called alike
    for file in files:
        _fuse_rotary(file)
    return _counts(fused, files, sum(norm.trained for norm in _norms(fused)))


def find(model: nn.Module, device: str, *, trained: bool = False) -> dict[str, int] | str:
    """Return what of a model, or of its skeleton, can run fused on a device of that type.

    That is how many norms, gated MLPs and files of models with a rotary embedding, by the names
    "norms", "gated" and "rotary"; or why there are none. With `trained` norms run their own code,
    as they do where their weights are trained, and are counted as "trained".
    """
    why = native_status().why_slow_on(device)
    if why is not None:
        return why
    fused, files = _fusable(model)
    return _counts(fused, files, len(_norms(fused)) if trained else 0)


def described(found: dict[str, int] | str) -> str:
    """Return as a sentence what `find` and `use` return."""
    if isinstance(found, str):
        return f"norms, gated MLPs, rotary embedding: as the model has them ({found})"
    parts = [f"{found[name]} {what}" for name, what in _COUNTED.items() if found[name]]
    parts += ["the rotary embedding"] if found["rotary"] else []
    if found["trained"]:
        parts.append(f"but not {found['trained']} norms, whose weights are trained")
    return f"in one pass each: {', '.join(parts)}"


def _fusable(model: nn.Module) -> tuple[dict[nn.Module, Fused], list[types.ModuleType]]:
    """Return what runs or could run in the place of modules, and model files to patch."""
    fused = {module: found for module in model.modules() if (found := Fused.of(module))}
    names = {type(module).__module__ for module in model.modules()}
    files = [file for name in names if (file := sys.modules.get(name)) and _has_rotary(file)]
    return fused, files


def _norms(fused: dict[nn.Module, Fused]) -> list[_Norm]:
    return [each for each in fused.values() if isinstance(each, _Norm)]


def _counts(
    fused: dict[nn.Module, Fused], files: list[types.ModuleType], trained: int
) -> dict[str, int] | str:
    norms = len(_norms(fused))
    found = {"norms": norms - trained, "gated": len(fused) - norms, "rotary": len(files)}
    if any(found.values()):
        return {**found, "trained": trained}
    if trained:
        return "there are norms only, and their weights are trained"
    return "nothing in it is a norm, a gated MLP or a rotary embedding that is known here"


def norm(module: nn.Module) -> tuple[float, bool] | None:
    """Return eps of an RMSNorm and whether its weight counts from one; None if it is none."""
    found = Fused.of(module)
    return (found.eps, found.from_one) if isinstance(found, _Norm) else None


def gated_mlp(module: nn.Module) -> str | None:
    """Return the activation of a gated MLP, a key of `ACTIVATIONS`; None if it is none."""
    found = Fused.of(module)
    return found.activation if isinstance(found, _Gated) else None


class Fused:
    """What a module's `forward` is replaced by; copies and pickles with the module."""

    module: Any

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @staticmethod
    def of(module: nn.Module) -> Fused | None:
        """Return what runs in a module's place, or could; None if there is nothing."""
        present = module.__dict__.get("forward")
        if isinstance(present, Fused):
            return present
        if present is not None:  # someone else's
            return None
        return _Norm.recognise(module) or _Gated.recognise(module)

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module's own forward."""
        return type(self.module).forward(self.module, *args, **kwargs)


class _Norm(Fused):
    def __init__(self, module: nn.Module, eps: float, from_one: bool) -> None:
        super().__init__(module)
        self.eps, self.from_one = eps, from_one

    @property
    def trained(self) -> bool:
        """Whether the module's own code has to run for its weight to get a gradient."""
        return bool(self.module.weight.requires_grad)

    @classmethod
    def recognise(cls, module: nn.Module) -> _Norm | None:
        parameters = dict(module.named_parameters())
        weight = parameters.get("weight")
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if (
            list(parameters) != ["weight"]
            or weight is None
            or weight.dim() != 1
            or not isinstance(eps, float)
            or any(module.children())
            or any(module.buffers())
        ):
            return None
        from_one = _weight_of_norm(module, eps)
        return None if from_one is None else cls(module, eps, from_one)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        weight = self.module.weight
        if args or kwargs or self.trained or not _suits(x, weight):
            return self.stock(x, *args, **kwargs)
        return rms_norm(x, weight, self.eps, self.from_one)


def _weight_of_norm(module: Any, eps: float) -> bool | None:
    """Return whether a norm counts its weight from one; None if it is no RMSNorm."""
    features = len(module.weight)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*s, generator=generator) for s in ((3, features), (features,)))
    trial = copy.copy(module)  # its own code, with a weight that hides nothing
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            # small enough for eps to count
            scaled, of_trial = (x * eps**0.5).to(dtype), weight.to(dtype)
            trial._parameters = {"weight": nn.Parameter(of_trial, requires_grad=False)}
            own = _tried(type(module).forward, trial, scaled)
            fits = [
                from_one
                for from_one in (False, True)
                if _same(own, rms_norm(scaled, of_trial, eps, from_one))
            ]
            if len(fits) != 1:
                return None
    return fits[0]


class _Gated(Fused):
    def __init__(self, module: nn.Module, activation: str) -> None:
        super().__init__(module)
        self.activation = activation

    @classmethod
    def recognise(cls, module: nn.Module) -> _Gated | None:
        children = dict(module.named_children())
        act = getattr(module, "act_fn", None)
        if {"gate_proj", "up_proj", "down_proj"} - children.keys() or not callable(act):
            return None
        activation = _activation_of(module, act)
        return None if activation is None else cls(module, activation)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return self.stock(x, *args, **kwargs)
        module = self.module
        gate, up = module.gate_proj(x), module.up_proj(x)
        if gate.shape == up.shape and _suits(gate, up):
            return module.down_proj(gated(gate, up, self.activation))
        return module.down_proj(module.act_fn(gate) * up)


def _activation_of(module: Any, act: Callable[[Tensor], Tensor]) -> str | None:
    """Return the activation if a block is down_proj(activation(gate_proj(x)) * up_proj(x))."""
    generator = torch.Generator().manual_seed(0)
    x, gate, up = (torch.randn(2, _FEATURES, generator=generator) * 2 for _ in range(3))
    # the block's own code, its projections replaced: they may be large, wrapped or random
    trial = copy.copy(module)
    trial._modules = dict(module._modules)
    for name, value in (("gate_proj", gate), ("up_proj", up)):
        trial._modules[name] = _Gives(value)
    trial._modules["down_proj"] = nn.Identity()
    with torch.no_grad():
        own = _tried(type(module).forward, trial, x)
        if own is None:
            return None
        for name in ACTIVATIONS:
            if _same(own, gated(gate, up, name)) and _same(
                _tried(act, gate), ACTIVATIONS[name](gate)
            ):
                return name
    return None


class _Gives(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: Tensor) -> Tensor:
        return self.value


_ROTARY = "apply_rotary_pos_emb"


def _has_rotary(module: types.ModuleType) -> bool:
    """Whether a model file's rotary embedding is the fused one, or does the same bit for bit."""
    own = getattr(module, _ROTARY, None)
    return isinstance(own, types.FunctionType) and (hasattr(own, "_tunesmith") or _is_rotary(own))


def _fuse_rotary(module: types.ModuleType) -> None:
    """Put the fused rotary embedding in the place of a model file's own, and leave it there."""
    own = getattr(module, _ROTARY)
    if not hasattr(own, "_tunesmith"):
        setattr(module, _ROTARY, _fused_rotary(own))


def _fused_rotary(own: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def apply(*args: Any, **kwargs: Any) -> Any:
        # a file may call its own with less, such as only queries, or with names
        if kwargs or len(args) != 4 or not all(isinstance(each, Tensor) for each in args):
            return own(*args, **kwargs)
        q, k, cos, sin = args
        if not _suits(q, k, cos, sin) or not _fits_rotary(q, k, cos, sin):
            return own(q, k, cos, sin)
        # [rows, tokens, heads, head size] is how they lie in memory
        return tuple(rotary(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in (q, k))

    apply._tunesmith = True  # type: ignore[attr-defined]  # found when it is looked for again
    return apply


def _fits_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.requires_grad or sin.requires_grad:
        return False
    rows, _, tokens, size = q.shape
    return (
        size % 2 == 0
        and k.shape[0] == rows
        and k.shape[2:] == (tokens, size)
        and cos.shape == sin.shape
        and cos.shape in ((rows, tokens, size), (1, tokens, size))
    )


def _is_rotary(own: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    size = _FEATURES // 3
    shapes = ((2, 5, 4, size), (2, 5, 2, size), (2, 5, size), (2, 5, size))
    for dtype in (torch.float32, torch.bfloat16):
        q, k, cos, sin = (torch.randn(*s, generator=generator).to(dtype) for s in shapes)
        with torch.no_grad():
            theirs = _tried(own, q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            if not isinstance(theirs, tuple) or len(theirs) != 2:
                return False
            for x, their in zip((q, k), theirs, strict=True):
                if not torch.equal(rotary(x, cos, sin).transpose(1, 2), their):
                    return False
    return True


def _suits(x: Tensor, *others: Tensor) -> bool:
    """Whether there are kernels for these tensors."""
    return (
        x.device.type in _FAST
        and x.dtype in DTYPES
        and all(t.dtype == x.dtype and t.device == x.device for t in others)
    )


def _same(own: Any, ours: Tensor) -> bool:
    """Whether both are the same but for the order of sums."""
    if not isinstance(own, Tensor) or own.shape != ours.shape or own.dtype != ours.dtype:
        return False
    limit = 2 * torch.finfo(ours.dtype).eps if ours.dtype != torch.float32 else 1e-5
    return torch.allclose(own, ours, rtol=limit, atol=1e-6)


def _tried(call: Callable[..., Any], *args: Any) -> Any:
    """Return what a stranger's code gives for made-up input, or None where it does not take it."""
    try:
        return call(*args)
    except Exception:
        return None
