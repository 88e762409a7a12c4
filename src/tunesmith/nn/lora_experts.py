"""LoraExperts: PEFT's LoRA on a mixture's experts, over experts that are held in 4 bits.

Where the base is dense PEFT adds B A to the stacked parameter by a parametrization, which needs the
whole stack in 16 bits. Here each expert's A and B go along with its product. Parameters, names and
files are PEFT's.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.nn.nf4_experts import Lora, NF4Experts

__all__ = ["LoraExperts", "build"]


class LoraExperts(ParamWrapper):  # type: ignore[misc]
    """An adapter on one parameter of `NF4Experts`.

    Merging into it quantizes the sum again, and warns that this rounds; the Tuner's `.merge()` does
    so in 16 or 32 bits.
    """

    def get_param(self) -> Tensor:
        """Return what stands for the parameter: its shape, dtype and device, without its values."""
        base = self.get_base_layer()
        if not isinstance(base, NF4Experts):  # a plain module that stands in
            found: Tensor = super().get_param()
            return found
        out_features, in_features = base.stacks[self.parameter_name].shape
        shape = (out_features, in_features)
        if getattr(base, "is_transposed", False):
            shape = (in_features, out_features)
        some = base.get_buffer(f"{self.parameter_name}_packed")
        one = torch.zeros((), dtype=base.compute_dtype, device=some.device)
        return one.expand(base.num_experts, *shape)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; refuse an initialization that reads or changes the base weight."""
        init = getattr(kwargs.get("config"), "init_lora_weights", None)
        if isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal"):
            raise ModelError(
                f"got the initialization {init!r}, which works on the base weight; experts in 4 "
                "bits stay as they are; use init_lora_weights=True, or leave the base unquantized"
            )
        super().update_layer(adapter_name, *args, **kwargs)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        base = self.get_base_layer()
        with ExitStack() as stack:
            if isinstance(base, NF4Experts):
                factors = tuple(
                    self._factors(name) for name in active_adapters if name in self.lora_A
                )
                stack.enter_context(base.adapted(self.parameter_name, factors))
            else:
                stack.enter_context(super()._activate_lora(active_adapters))
            yield

    def _factors(self, name: str) -> Lora:
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        experts = self.num_experts
        lora_a = a.reshape(experts, -1, a.shape[-1])  # [experts, r, in_features]
        # [out_features, r x experts], the experts within: PEFT's order
        lora_b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1).contiguous()
        return lora_a, lora_b, float(self.scaling[name])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the named adapters (by default the active ones) into the base weight."""
        with self._dense_base("merging into"):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight, which is rounded once more."""
        with self._dense_base("unmerging from"):
            super().unmerge()

    @contextmanager
    def _dense_base(self, doing: str) -> Iterator[None]:
        """Put a plain fp32 module in the place of experts in 4 bits, and quantize what it becomes.

        A base that is plain already is left as it is.
        """
        base, name = self.get_base_layer(), self.parameter_name
        if not isinstance(base, NF4Experts):
            yield
            return
        warnings.warn(
            f"{doing} experts in 4 bits rounds them to 4 bits again, so outputs change a little; "
            "the Tuner's .merge() merges in 16 or 32 bits",
            stacklevel=4,
        )
        shell: Any = nn.Module()
        shell.register_parameter(name, nn.Parameter(base.dense(name, torch.float32), False))
        holder: Any = self
        while isinstance(holder.base_layer, BaseTunerLayer):
            holder = holder.base_layer
        stack = base.stacks[name]
        nested = base.get_buffer(f"{name}_absmax").dtype == torch.uint8
        merged = list(self.merged_adapters)
        holder.base_layer = shell
        try:
            yield
            weight = getattr(shell, name).data
            base.quantize(name, weight, stack.blocksize, nested, stack.quant_type, name)
        except BaseException:
            self.merged_adapters[:] = merged
            raise
        finally:
            holder.base_layer = base


def build(target: nn.Module, adapter_name: str, **kwargs: Any) -> LoraExperts | None:
    """Return a LoraExperts around `target`, or None to leave it to PEFT."""
    if kwargs.get("parameter_name") is None:
        return None
    return LoraExperts(target, adapter_name, **kwargs)


# by this name PEFT knows a layer that another one may be put around, for the other parameter
LoraExperts.__name__ = ParamWrapper.__name__
