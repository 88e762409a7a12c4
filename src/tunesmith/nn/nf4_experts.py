"""The experts of a mixture in 4 bits: transformers' own module, whose stacked weights are NF4.

transformers holds all experts of a layer in two parameters, `gate_up_proj` [experts, 2 x inner,
hidden] and `down_proj` [experts, hidden, inner] (or their transposes). Here each expert is a 4-bit
weight of its own, dequantized for its product if a token goes to it. Gradients flow to the input
and to adapters, never into the weights.

The module stays what it was to everybody who looks: its class is a subclass of its own class, and
`gate_up_proj` reads as the dense tensor, dequantized anew at each access. Among its parameters that
name stands for an empty tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.errors import OpError
from tunesmith.nn.nf4_linear import autocast
from tunesmith.ops import (
    KINDS,
    FrozenLinear,
    Weight4Bit,
    dequantize_4bit,
    frozen_linear,
    quantize_4bit,
)
from tunesmith.ops.dtypes import DTYPES

__all__ = ["Lora", "NF4Experts", "experts_in", "quantize_experts"]

_PARTS = ("packed", "absmax", "nested_absmax", "nested_offset")

Lora = tuple[Tensor, Tensor, float]
"""A [experts, r, in_features], B [experts, out_features, r] and scaling."""

Product = Callable[[str, int, Tensor], Tensor]
"""product(name, expert, x): x [tokens, in_features] times that expert's weight, transposed."""


@attrs.frozen
class _Stack:
    """How the experts of one parameter are held."""

    shape: tuple[int, int]
    """[out_features, in_features] of an expert."""
    blocksize: int
    quant_type: str


class NF4Experts(nn.Module):
    """Added to the class of a mixture's experts by `quantize_experts`; never built by itself."""

    num_experts: int
    stacks: dict[str, _Stack]
    compute_dtype: torch.dtype
    adapters: dict[str, tuple[Lora, ...]]
    """The adapters on a parameter while the module is called, by its name."""

    def dense(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return a parameter as the unquantized module has it, in `dtype` or the compute dtype."""
        dtype = dtype or self.compute_dtype
        experts = [dequantize_4bit(self.expert(name, e), dtype) for e in range(self.num_experts)]
        stacked = torch.stack(experts)
        return stacked.mT.contiguous() if _transposed(self) else stacked

    def expert(self, name: str, expert: int) -> Weight4Bit:
        """Return one expert's weight [out_features, in_features] as it is held."""
        stack = self.stacks[name]
        parts: dict[str, Any] = dict(zip(_PARTS, self._parts(name, expert), strict=True))
        return KINDS[stack.quant_type](
            **parts,
            shape=torch.Size(stack.shape),
            dtype=self.compute_dtype,
            blocksize=stack.blocksize,
        )

    def quantize(
        self, name: str, weight: Tensor, blocksize: int, nested: bool, quant_type: str, label: str
    ) -> None:
        """Hold `weight`, of the shape of the unquantized parameter, in the parameter's place.

        `label` is what errors call it. Raises OpError as `ops.quantize_4bit`; nothing is changed
        then.
        """
        held = [
            quantize_4bit(
                each.mT.contiguous() if _transposed(self) else each,
                blocksize,
                nested,
                quant_type=quant_type,
                name=f"{label}[{number}]",
            )
            for number, each in enumerate(weight)
        ]
        out_features, in_features = held[0].shape
        self.stacks[name] = _Stack((out_features, in_features), blocksize, quant_type)
        # PEFT looks for what it may adapt among the parameters
        nothing = torch.empty(0, dtype=self.compute_dtype, device=held[0].device)
        self._parameters[name] = nn.Parameter(nothing, requires_grad=False)
        for part in _PARTS:
            tensors = [getattr(each, part) for each in held]
            stacked = None if tensors[0] is None else torch.stack(tensors)
            self._buffers.pop(f"{name}_{part}", None)
            self.register_buffer(f"{name}_{part}", stacked)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return what the experts make of hidden_states [tokens, hidden], summed by weight.

        `top_k_index` and `top_k_weights` [tokens, k] say which experts a token goes to, and with
        how much; an index beyond the experts goes to none.
        """
        return run_experts(self, self._product, hidden_states, top_k_index, top_k_weights)

    def _product(self, name: str, expert: int, x: Tensor) -> Tensor:
        stack = self.stacks[name]
        layer = FrozenLinear(
            *self._parts(name, expert), *stack.shape, stack.blocksize, stack.quant_type
        )
        first, *more = self.adapters.get(name, ()) or (None,)
        if first is not None:
            layer = layer.with_lora((first[0][expert], first[1][expert], first[2]))
        out = frozen_linear(autocast(x), layer)
        for a, b, scaling in more:
            out = out + (F.linear(F.linear(x.to(a.dtype), a[expert]), b[expert]) * scaling).to(
                out.dtype
            )
        return out

    def _parts(
        self, name: str, expert: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        held = [self._buffers[f"{name}_{part}"] for part in _PARTS]
        packed, *scales = (None if each is None else each[expert] for each in held)
        assert packed is not None
        return packed, scales[0], scales[1], scales[2]

    @contextmanager
    def adapted(self, name: str, adapters: tuple[Lora, ...]) -> Iterator[None]:
        """Add adapters to a parameter's products for as long as this lasts."""
        before = self.adapters.get(name, ())
        self.adapters[name] = adapters
        try:
            yield
        finally:
            self.adapters[name] = before

    def extra_repr(self) -> str:
        """Return what print(model) shows of this module."""
        each = [
            f"{name}: {self.num_experts} x {list(stack.shape)} in 4-bit {stack.quant_type.upper()}"
            for name, stack in self.stacks.items()
        ]
        return ", ".join(each)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        some = next(buffer for buffer in self._buffers.values() if buffer is not None)
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=some.device))
        parts = {id(self._buffers[f"{name}_{part}"]) for name in self.stacks for part in _PARTS} - {
            id(None)
        }

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in parts and moved.dtype != tensor.dtype:
                # a scale in 16 bits is another scale: take the move, leave the cast
                return tensor.to(moved.device)
            return moved

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]  # torch's own
        if probe.dtype in DTYPES:
            self.compute_dtype = probe.dtype
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        # dense, as stock transformers opens it: it has no layout for experts in 4 bits
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.stacks:
            for part in _PARTS:
                destination.pop(f"{prefix}{name}_{part}", None)
            destination[prefix + name] = self.dense(name)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        given = [prefix + name for name in self.stacks if prefix + name in state_dict]
        if given:
            raise OpError(
                f"{given[0]}: got a state dict for experts that are held in 4 bits, which would be "
                "rounded once more; load the model anew from its checkpoint"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def quantize_experts(module: nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> NF4Experts:
    """Turn a mixture's experts into those whose parameters `names` can be held in 4 bits.

    They are held as soon as `NF4Experts.quantize` was called for each; `dtype` is the compute
    dtype.
    """
    if isinstance(module, NF4Experts):
        return module
    module.__class__ = _in_4_bits(type(module), names)
    made: Any = module
    made.stacks, made.adapters, made.compute_dtype = {}, {}, dtype
    experts: NF4Experts = made
    return experts


_made: dict[tuple[type[nn.Module], tuple[str, ...]], type[NF4Experts]] = {}


def _in_4_bits(cls: type[nn.Module], names: tuple[str, ...]) -> type[NF4Experts]:
    """Return the one class that stands for `cls` with these parameters in 4 bits."""
    if (cls, names) in _made:
        return _made[cls, names]

    def reader(name: str) -> property:
        def read(self: Any) -> Tensor:
            dense: Tensor = self.dense(name) if name in self.stacks else self._parameters[name]
            return dense

        return property(read, doc=f"The dense {name}, dequantized anew.")

    body: dict[str, Any] = {name: reader(name) for name in names}
    body["__module__"] = cls.__module__
    made = _made[cls, names] = type(f"NF4{cls.__name__}", (NF4Experts, cls), body)
    return made


def run_experts(
    module: Any,
    product: Product,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Do what transformers' `grouped_mm_experts_forward` does, expert by expert."""
    tokens, k = top_k_index.shape
    up = _names(module)[0]
    of_expert, order = top_k_index.reshape(-1).sort(stable=True)
    counts = torch.bincount(of_expert, minlength=module.num_experts).tolist()
    made: list[Tensor] = []
    x = hidden_states[order // k]
    for expert, part in enumerate(torch.split(x, counts)):
        if not len(part):
            continue
        if expert >= module.num_experts:
            made.append(torch.zeros_like(part))
            continue
        inner = product(up, expert, part)
        if module.has_bias:
            inner = inner + getattr(module, f"{up}_bias")[expert]
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        out = product("down_proj", expert, inner)
        if module.has_bias:
            out = out + module.down_proj_bias[expert]
        if module.has_post_expert_norm:
            out = module.post_expert_norm(out)
        made.append(out.to(hidden_states.dtype))
    weights = top_k_weights.reshape(-1)[order]
    weighted = torch.cat(made) * weights[:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    # as grouped_mm sums: each token's k parts, not one added to another by index
    return weighted[back].view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)


_TOKENS, _EXPERTS, _HIDDEN, _INNER = 9, 4, 16, 12
_SETTINGS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "num_experts")


def experts_in(module: nn.Module) -> tuple[str, ...] | str:
    """Return the parameters of a mixture's experts that can be held in 4 bits, or why they cannot.

    A module is tried: its own forward and ours get the same small made-up weights and tokens.
    """
    name = type(module).__name__
    if any(not hasattr(module, each) for each in _SETTINGS) or not hasattr(module, "config"):
        return f"a {name} is not made as transformers' own experts are"
    names = _names(module)
    biases = {f"{each}_bias" for each in names} if module.has_bias else set()
    own = dict(module.named_parameters(recurse=False))
    if own.keys() != {*names, *biases} or any(own[each].dim() != 3 for each in names):
        return f"a {name} has other weights than experts have ({', '.join(sorted(own))})"
    if any(module.buffers(recurse=False)) or module._forward_hooks or module._forward_pre_hooks:
        return f"a {name} has buffers of its own, or somebody listens to it"
    with torch.no_grad(), torch.device("cpu"):
        for scale in (0.1, 30.0):
            try:
                same = _same_as_ours(module, scale)
            except Exception as error:  # whatever a stranger's code raises at made-up input
                return f"a {name} does not take made-up input: {error}"
            if not same:
                return f"a {name} computes something else with its experts"
    return names


def _same_as_ours(module: Any, scale: float) -> bool:
    generator = torch.Generator().manual_seed(0)
    trial = copy.copy(module)
    trial.config = copy.copy(module.config)
    trial.config._experts_implementation = "eager"
    for attribute, value in vars(module).items():
        if attribute in ("hidden_size", "hidden_dim"):
            setattr(trial, attribute, _HIDDEN)
        elif attribute in ("intermediate_size", "intermediate_dim", "expert_dim"):
            setattr(trial, attribute, _INNER)
        elif attribute == "num_experts" and isinstance(value, int):
            trial.num_experts = _EXPERTS
    inner = 2 * _INNER if module.has_gate else _INNER
    up = _names(module)[0]
    shapes = {up: (_EXPERTS, inner, _HIDDEN), "down_proj": (_EXPERTS, _HIDDEN, _INNER)}
    trial._parameters = {}
    for name, (experts, rows, columns) in shapes.items():
        weight = torch.randn(experts, rows, columns, generator=generator) / columns**0.5
        shown = weight.mT.contiguous() if _transposed(module) else weight
        trial._parameters[name] = nn.Parameter(shown, requires_grad=False)
        if module.has_bias:
            bias = torch.randn(experts, rows, generator=generator)
            trial._parameters[f"{name}_bias"] = nn.Parameter(bias, requires_grad=False)
    trial._modules = dict(module._modules)
    if module.has_post_expert_norm:
        trial._modules["post_expert_norm"] = nn.Tanh()  # whose own is as wide as the model
    x = scale * torch.randn(_TOKENS, _HIDDEN, generator=generator)
    # the last expert is hit by no token
    index = torch.stack([torch.randperm(_EXPERTS - 1, generator=generator)[:2] for _ in x])
    weights = torch.rand(_TOKENS, 2, generator=generator)

    def product(name: str, expert: int, part: Tensor) -> Tensor:
        weight = trial._parameters[name][expert]
        return part @ weight if _transposed(module) else F.linear(part, weight)

    own = type(module).forward(trial, x, index, weights)
    ours = run_experts(trial, product, x, index, weights)
    return (
        isinstance(own, Tensor)
        and own.shape == ours.shape
        and own.dtype == ours.dtype
        and torch.allclose(own, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))
    )


def _names(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")


def _transposed(module: Any) -> bool:
    return bool(module.is_transposed)
