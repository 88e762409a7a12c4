"""LoraLinear: PEFT's LoRA layer with base product and adapter in one pass.

y = x Wᵀ + b + scaling dropout(x) Aᵀ Bᵀ (LoRA, arXiv:2106.09685) over a frozen W, in 4 bits or
plain. This is the one place where an adapter and a 4-bit base meet; importing it imports PEFT.

The parameters, their names and their files are PEFT's: an adapter goes back and forth between this
layer and PEFT's own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tunesmith.errors import ModelError, OpError
from tunesmith.nn import lora_experts
from tunesmith.nn.nf4_experts import NF4Experts
from tunesmith.nn.nf4_linear import NF4Linear, as_frozen, autocast
from tunesmith.ops import FrozenLinear, frozen_linear, quantize_4bit
from tunesmith.ops.dtypes import DTYPES

__all__ = ["LoraLinear", "hooked", "register"]

_Adapter = tuple[tuple[Tensor, Tensor, float], float]
"""A, B and scaling, and the dropout of x."""

_PARTS = ("lora_A", "lora_B", "lora_dropout")

# PEFT's initializations that put another weight into the base layer
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def register(config: LoraConfig) -> LoraConfig:
    """Make PEFT build a LoraLinear wherever this config adapts a linear layer; returns the config.

    Experts in 4 bits get a LoraExperts. Layers of other kinds, and those of quantization libraries,
    stay with PEFT's own classes. The config is saved as before.
    """
    # a key is matched by isinstance; the function behind it declines what is not ours
    config._register_custom_module({nn.Linear: _build, NF4Experts: lora_experts.build})
    return config


class LoraLinear(lora.Linear):  # type: ignore[misc]
    """A LoRA layer over an `NF4Linear` or an nn.Linear.

    Forward and backward are one pass each while exactly one plain adapter is active and the base is
    frozen; in all other cases (DoRA and other variants, several adapters at once, merged ones,
    hooks on the inner layers, ...) they are PEFT's own, with the same result.

    Merging into an `NF4Linear` quantizes the sum again, and warns that this rounds. Raises OpError
    if the merged weight is not finite; nothing is merged then.
    """

    base_layer: Any

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; refuse an initialization that would change a 4-bit base weight."""
        config = kwargs.get("config")
        init = getattr(config, "init_lora_weights", None)
        if isinstance(self.get_base_layer(), NF4Linear) and (
            (isinstance(init, str) and init.lower().startswith(_REWRITES_BASE))
            or getattr(config, "kasa_config", None) is not None
        ):
            what = repr(init) if isinstance(init, str) else "KaSA"
            raise ModelError(
                f"got the initialization {what}, which rewrites the base weight; a base in 4 bits "
                f"stays as it is; use init_lora_weights=True, or leave the base unquantized"
            )
        super().update_layer(adapter_name, *args, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus the active adapters', [..., out_features]."""
        if not args and not kwargs:
            name = self._single_adapter()
            if name is not None:
                cast = autocast(x)
                adapter = self._adapter(name, x, cast)
                if adapter is not None:
                    lora, dropout = adapter
                    return frozen_linear(cast, as_frozen(self.base_layer).with_lora(lora), dropout)
        result: Tensor = super().forward(x, *args, **kwargs)
        return result

    def _single_adapter(self) -> str | None:
        """Return the name of the active adapter, if it is only one and a plain LoRA."""
        if self.disable_adapters or self.merged_adapters or self.fan_in_fan_out:
            return None
        held = self._modules["lora_A"]._modules
        names = [name for name in self.active_adapters if name in held]
        if len(names) != 1:
            return None
        name: str = names[0]
        plain = name not in self.lora_variant and not self.lora_bias[name]
        return name if plain else None

    def _adapter(self, name: str, x: Tensor, cast: Tensor) -> _Adapter | None:
        """Return the adapter if the fused pass can do what PEFT would do with x, else None.

        `cast` is x as autocast leaves it.
        """
        # past nn.Module's look-up, which takes longer than all that is asked here
        held = self._modules
        a, b, dropout = (held[kind]._modules[name] for kind in _PARTS)
        base: Any = held["base_layer"]
        if type(base) is NF4Linear:
            weight: Any = base._buffers["packed"]
            frozen = True
        elif type(base) is nn.Linear:
            weight = base.weight
            # without autocast, x in another dtype is an error, and torch's to raise
            frozen = (
                type(weight) is nn.Parameter
                and not weight.requires_grad
                and weight.dtype in DTYPES
                and (weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type))
            )
        else:
            return None
        if not (type(a) is type(b) is nn.Linear and type(dropout) in (nn.Identity, nn.Dropout)):
            return None
        lora_a: Any = a._parameters["weight"]
        lora_b: Any = b._parameters["weight"]
        fits = (
            frozen
            and type(x) in (Tensor, nn.Parameter)
            and x.layout == torch.strided
            and cast.dtype in DTYPES
            and type(lora_a) is type(lora_b) is nn.Parameter
            and lora_a.dtype == lora_b.dtype
            and lora_a.dtype in DTYPES
            and x.device == weight.device == lora_a.device == lora_b.device
            and getattr(self, "cast_input_dtype_enabled", True)
            and not any(map(_intercepted, (base, a, b, dropout)))
        )
        if not fits:
            return None
        p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        return (lora_a, lora_b, self.scaling[name]), p

    def _only_adapter(self, x: Tensor, cast: Tensor) -> _Adapter | None:
        """Return the single active adapter if the fused pass can do what PEFT would, else None."""
        name = self._single_adapter()
        return None if name is None else self._adapter(name, x, cast)

    def call_with(self, x: Tensor, cast: Tensor) -> FrozenLinear | None:
        """Return the layer as the ops take it for x, or None.

        None where it is not one plain adapter without dropout. `cast` is x as autocast leaves it.
        """
        adapter = self._only_adapter(x, cast)
        if adapter is None or adapter[1]:
            return None
        return as_frozen(self.base_layer).with_lora(adapter[0])

    def as_frozen(self) -> FrozenLinear | None:
        """Return the layer as the ops take it, without dropout, or None.

        None where one call of an op is not all that this layer does.
        """
        base = self.base_layer
        if not isinstance(base, NF4Linear) and type(base) is not nn.Linear:
            return None
        if self.merged_adapters and not self.disable_adapters:
            return as_frozen(base)
        dtype = base.compute_dtype if isinstance(base, NF4Linear) else base.weight.dtype
        x = torch.empty((0, base.in_features), dtype=dtype)
        adapter = self._only_adapter(x, x)
        return None if adapter is None else as_frozen(base).with_lora(adapter[0])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the named adapters (by default the active ones) into the base weight.

        Into a 4-bit weight they are added in fp32, and the sum is quantized again.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        pending = any(name in self.lora_A and name not in self.merged_adapters for name in names)
        if pending and isinstance(self.get_base_layer(), NF4Linear):
            # into a copy, which is looked at before it is taken: safe as it is
            with self._dense_base("merging into"):
                super().merge(safe_merge=False, adapter_names=adapter_names)
        else:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight; a 4-bit one is rounded once more."""
        pending = any(name in self.lora_A for name in self.merged_adapters)
        if pending and isinstance(self.get_base_layer(), NF4Linear):
            with self._dense_base("unmerging from"):
                super().unmerge()
        else:
            super().unmerge()

    @contextmanager
    def _dense_base(self, doing: str) -> Iterator[None]:
        """Put a dense fp32 layer in a 4-bit base's place, and quantize what becomes of it."""
        original, base = self.base_layer, self.get_base_layer()
        warnings.warn(
            f"{doing} a 4-bit weight rounds it to 4 bits again, so outputs change a little; the "
            "Tuner's .merge() merges in 16 or 32 bits",
            stacklevel=4,
        )
        merged = list(self.merged_adapters)
        dense = base.dense(torch.float32)
        self.base_layer = dense
        try:
            yield
            _requantize(base, dense)
        except BaseException:
            self.merged_adapters[:] = merged
            raise
        finally:
            self.base_layer = original


def _build(target: nn.Module, adapter_name: str, **kwargs: Any) -> LoraLinear | None:
    """Return a LoraLinear around `target`, or None to leave it to PEFT."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    config = kwargs.get("config")
    ours = type(base) is NF4Linear or (
        # a quantization library may keep a tensor of its own class in a plain nn.Linear
        type(base) is nn.Linear and type(base.weight) is nn.Parameter
    )
    if (
        not ours
        or kwargs.get("parameter_name") is not None
        or getattr(config, "fan_in_fan_out", False)
    ):
        return None
    return LoraLinear(target, adapter_name, **kwargs)


def hooked(module: nn.Module) -> bool:
    """Whether a hook listens to this module being called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _intercepted(module: nn.Module) -> bool:
    """Whether something relies on this module being called."""
    return "forward" in module.__dict__ or hooked(module)


def _requantize(base: NF4Linear, dense: nn.Linear) -> None:
    """Put a dense layer's weight and bias into a 4-bit one."""
    for name, part in dense.named_parameters():
        if not part.isfinite().all():
            raise OpError(
                f"the merged {name} holds NaN or Inf; merging needs finite numbers; check the "
                f"adapter: its training seems to have diverged"
            )
    w = quantize_4bit(
        dense.weight, base.blocksize, base.nested_absmax is not None, quant_type=base.quant_type
    )
    base.packed, base.absmax = w.packed, w.absmax
    base.nested_absmax, base.nested_offset = w.nested_absmax, w.nested_offset
    if base.bias is not None:
        base.bias.data = dense.bias.detach().to(base.bias.dtype)
