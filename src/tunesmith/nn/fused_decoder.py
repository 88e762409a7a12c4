"""A decoder layer as one node of autograd's graph: norm, attention, norm, gated MLP, two sums.

Between the products of a layer lies a lot of Python: modules, autograd's nodes, PEFT's questions,
some 5 ms a layer both ways, whatever the number of tokens. Here the layer's kernels follow each
other directly, and a sum with the residual is made where the product before it is written.

Which layers these are is not known by name: a layer's parts are looked at, and it is run both ways
on made-up input. What it is called with decides anew each time; where it is not for the kernels
(dropout in an adapter, a cache, somebody's hook, more tokens than our products are good for) the
layer runs as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tunesmith.errors import OpError
from tunesmith.modes import in_mode
from tunesmith.nn import fused_layers, varlen_attention
from tunesmith.nn.eval_mode import CHECKPOINTS
from tunesmith.nn.lora_linear import LoraLinear, hooked
from tunesmith.nn.nf4_linear import NF4Linear, as_frozen
from tunesmith.nn.prompt import disagreement
from tunesmith.ops import FrozenLinear, native_status
from tunesmith.ops.dispatch import seen_by_torch_alone
from tunesmith.ops.dtypes import DTYPES
from tunesmith.ops.layers import (
    DecoderLayer,
    NormArguments,
    Positions,
    multiplies_all,
)

__all__ = ["described", "find", "use"]

_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("q_norm", "k_norm")
_IN_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_IN_MLP = ("gate_proj", "up_proj", "down_proj")
# what a layer may be called with
_KNOWN = {
    "attention_mask",
    "cache_position",
    "is_causal",
    "position_embeddings",
    "position_ids",
}
# what changes large numbers, and so may not show in made-up ones: a part of a setting's name
_BOUNDS = ("softcap", "clip", "clamp")
_TRIAL_TOKENS = 24
_FAR = 10**7


def use(model: nn.Module) -> int | str:
    """Let a model's decoder layers run as one node each; return how many do, or why none does."""
    layers = _candidates(model, next(model.parameters()).device.type)
    if isinstance(layers, str):
        return layers
    reasons = []
    for layer in layers:
        reason = layer.disagreement()
        if reason is None:
            layer.module.forward = layer
        else:
            reasons.append(reason)
    return len(layers) - len(reasons) or reasons[0]


def find(model: nn.Module, device: str) -> int | str:
    """Return how many layers of a model, or of its skeleton, look as if they could; or why none."""
    layers = _candidates(model, device)
    return layers if isinstance(layers, str) else len(layers)


def _candidates(model: nn.Module, device: str) -> list[_DecoderLayer] | str:
    """Return what could stand in for layers of a model, one at least, or why nothing does."""
    if device != "cpu":
        return "it is the CPU that gains by it"
    why = native_status().why_slow_on(device)
    if why is not None:
        return why
    seen = [_DecoderLayer.recognise(module) for module in model.modules()]
    layers = [each for each in seen if isinstance(each, _DecoderLayer)]
    reasons = [each for each in seen if isinstance(each, str)]
    return layers or (reasons[0] if reasons else "none is a norm, attention, a norm and an MLP")


def described(found: int | str) -> str:
    """Return as a sentence what `find` and `use` return."""
    if isinstance(found, str):
        return f"decoder layers: as the model has them ({found})"
    return f"decoder layers: {found} in one pass each"


class _DecoderLayer(fused_layers.Fused):
    """Stands in for the `forward` of a decoder layer."""

    def __init__(
        self, module: nn.Module, norms: list[tuple[float, bool] | None], activation: str
    ) -> None:
        super().__init__(module)
        self._norms, self._activation = norms, activation
        self._last: DecoderLayer | None = None  # the layer as it was last run

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of: that which points into memory is not."""
        return {**self.__dict__, "_last": None}

    @classmethod
    def recognise(cls, module: nn.Module) -> _DecoderLayer | str | None:
        """Return what would stand in for a module; why nothing does, or None if it is no layer."""
        present = module.__dict__.get("forward")
        if isinstance(present, cls):
            return present
        attention, mlp = (module._modules.get(name) for name in ("self_attn", "mlp"))
        if attention is None or mlp is None:
            return None
        name = type(module).__name__
        odd = module._modules.keys() ^ {*_NORMS, "self_attn", "mlp"}
        odd |= attention._modules.keys() - {*_IN_ATTENTION, *_HEAD_NORMS}
        odd |= set(_IN_ATTENTION) - attention._modules.keys()
        if odd or not hasattr(attention, "head_dim") or not hasattr(attention, "scaling"):
            return f"a {name} is made otherwise ({', '.join(sorted(odd)) or 'its attention'})"
        if (bound := _bound(getattr(attention, "config", None))) is not None:
            return f"its config has {bound}"
        activation = fused_layers.gated_mlp(mlp)
        if activation is None:
            return f"a {type(mlp).__name__} is no gated MLP"
        norms = []
        for norm in _norms_of(module):
            found = None if norm is None else fused_layers.norm(norm)
            if norm is not None and found is None:
                return f"a {type(norm).__name__} is no RMSNorm"
            norms.append(found)
        if present is not None:
            return f"somebody has replaced the forward of a {name}"
        return cls(module, norms, activation)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = "an argument by position" if args else self._given(hidden_states, kwargs)
        if isinstance(given, str):
            self._last = None  # it would hold what the layer has perhaps let go
            return self.stock(hidden_states, *args, **kwargs)
        layer, positions = given
        if not torch.is_grad_enabled():
            return layer.forward(hidden_states, positions)[0]
        again = _checkpoints(self.module)
        return _Node.apply(hidden_states, layer, positions, again, *layer.adapters)  # type: ignore[no-untyped-call]

    def disagreement(self) -> str | None:
        """Return why the layer itself does something else; None if it does the same."""
        try:
            # in training, so that dropout that a layer does by itself shows
            with in_mode(self.module, training=True), torch.no_grad(), torch.random.fork_rng([]):
                torch.manual_seed(0)
                return self._disagreement()
        except Exception as error:  # whatever a stranger's code raises at made-up input
            return f"a {type(self.module).__name__} does not take made-up input: {error}"

    def _disagreement(self) -> str | None:
        attention, name = self.module.self_attn, type(self.module).__name__
        weight = self.module.input_layernorm.weight

        def made_up(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=weight.dtype)

        x = 0.05 * made_up(2, _TRIAL_TOKENS, len(weight))  # less than what is added to it
        angles = 3 * made_up(1, _TRIAL_TOKENS, attention.head_dim // 2).float().repeat(1, 1, 2)
        kwargs = {
            "attention_mask": None,
            # far out, where a layer that scales by position shows
            "position_ids": _FAR + torch.arange(_TRIAL_TOKENS)[None],
            "position_embeddings": (angles.cos().to(x), angles.sin().to(x)),
        }
        given = self._given(x, kwargs)
        if isinstance(given, str):
            return given
        layer, positions = given
        own, ours = self.stock(x, **kwargs), layer.forward(x, positions)[0]
        if not isinstance(own, Tensor) or own.shape != ours.shape or own.dtype != ours.dtype:
            return f"a {name} returns something else than its output"
        return disagreement(ours, own, x.dtype, f"outputs of a {name}")

    def _given(self, x: Tensor, kwargs: dict[str, Any]) -> tuple[DecoderLayer, Positions] | str:
        """Return the layer that is to be run on x, and where x's tokens stand; or why it cannot."""
        module = self.module
        # past nn.Module's look-up here and below: it takes longer than all that is asked
        attention, mlp = module._modules["self_attn"], module._modules["mlp"]
        for name, value in kwargs.items():
            if value is not None and value is not False and name not in _KNOWN:
                return f"it is called with {name}"
        norms = _norms_of(module)
        linears = [
            *(attention._modules[name] for name in _IN_ATTENTION),
            *(mlp._modules[name] for name in _IN_MLP),
        ]
        for each in (attention, mlp, *norms, *linears):
            if each is not None and _watched(each):
                return f"something hooks into a {type(each).__name__}"
        if attention.training and getattr(attention, "attention_dropout", 0.0):
            return "its attention has dropout"
        if attention.config._attn_implementation != varlen_attention.NAME:
            return "its attention is not the one that goes by samples"
        if (
            type(x) is not Tensor
            or x.device.type != "cpu"
            or x.dim() != 3
            or x.dtype not in DTYPES
            or not x.numel()
            or torch.is_autocast_enabled("cpu")
            or not seen_by_torch_alone((x,))
        ):
            return "its input is not plain numbers on the CPU, or autocast is on"
        taken: list[NormArguments | None] = []
        for norm, found in zip(norms, self._norms, strict=True):
            if norm is None or found is None:
                taken.append(None)
                continue
            weight: Any = norm._parameters.get("weight")
            if (
                weight is None
                or weight.requires_grad
                or weight.dtype != x.dtype
                or weight.device != x.device
            ):
                return f"a {type(norm).__name__} is trained, or not in the dtype of its input"
            taken.append((weight, *found))
        frozen = [each for linear in linears if (each := _frozen(linear, x)) is not None]
        if len(frozen) < len(linears):
            return "a projection is neither in 4 bits nor has one plain adapter without dropout"
        if not multiplies_all(x, frozen):
            return "there are too many tokens, or a projection is trained or not in 4 bits"
        rotary = _rotary_of(kwargs, x, attention.head_dim)
        if rotary is None:
            return "it has no rotary embedding of its whole heads"
        segments = varlen_attention.segments_for(attention, len(x), x.shape[1], kwargs)
        if segments is None:
            return "its mask is not one of samples"
        last = self._last
        if last is None or not last.is_made_of(x.dtype, taken, frozen):
            try:
                last = DecoderLayer(
                    x.dtype, taken, frozen, self._activation, attention.head_dim, attention.scaling
                )
            except OpError as error:  # such as a projection that gives a gate along with queries
                return f"its parts do not fit together: {error}"
            self._last = last
        return last, (*rotary, segments)


class _Node(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: DecoderLayer,
        positions: Positions,
        checkpointing: bool,
        *adapters: Tensor,
    ) -> Tensor:
        out, activations = layer.forward(x, positions)
        ctx.layer, ctx.positions = layer, positions
        # the layer holds the adapters; saved they are watched for whether somebody writes into them
        ctx.save_for_backward(x, None if checkpointing else activations, *adapters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layer: DecoderLayer = ctx.layer
        x, activations, *_ = ctx.saved_tensors
        if activations is None:
            activations = layer.recompute(x, ctx.positions)
        need_x, _, _, _, *needs = ctx.needs_input_grad
        grad_x, of_adapters = layer.backward(grad, x, activations, ctx.positions, need_x, needs)
        return grad_x, None, None, None, *of_adapters


def _bound(config: Any) -> str | None:
    """Return the name of a setting by which numbers are bounded, or None if there is none."""
    settings: dict[str, Any] = vars(config) if config is not None else {}
    for name, value in settings.items():
        if any(part in name for part in _BOUNDS) and isinstance(value, (int, float)) and value:
            return name
    return None


def _norms_of(layer: Any) -> list[nn.Module | None]:
    """Return a layer's norms in the order in which they are run; those of heads may be None."""
    parts, in_attention = layer._modules, layer._modules["self_attn"]._modules
    before, after = (parts[name] for name in _NORMS)
    return [before, *(in_attention.get(name) for name in _HEAD_NORMS), after]


def _frozen(linear: nn.Module, x: Tensor) -> FrozenLinear | None:
    if isinstance(linear, LoraLinear):
        return linear.call_with(x, x)
    return as_frozen(linear) if type(linear) is NF4Linear else None


def _rotary_of(kwargs: dict[str, Any], x: Tensor, size: int) -> tuple[Tensor, Tensor] | None:
    """Return cos and sin that a layer is called with, if the kernels take them."""
    embedding = kwargs.get("position_embeddings")
    if not isinstance(embedding, tuple) or len(embedding) != 2 or size % 2:
        return None
    cos, sin = embedding
    shapes = ((len(x), x.shape[1], size), (1, x.shape[1], size))
    for each in embedding:
        if not isinstance(each, Tensor) or each.requires_grad or each.shape not in shapes:
            return None
        if each.dtype != x.dtype or each.device != x.device:
            return None
    return (cos, sin) if cos.shape == sin.shape else None


def _checkpoints(layer: Any) -> bool:
    """Whether a layer's own forward would be computed again in the backward pass.

    Earlier releases of transformers do that around the forward that this stands in for.
    """
    asked = getattr(layer, "gradient_checkpointing", False) and layer.training
    asked = asked or CHECKPOINTS in vars(layer)
    return asked and type(layer).__call__ is nn.Module.__call__


def _watched(module: nn.Module) -> bool:
    """Whether something relies on this module being called."""
    override = module.__dict__.get("forward")
    return hooked(module) or not (override is None or isinstance(override, fused_layers.Fused))
