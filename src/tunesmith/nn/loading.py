"""Quantizing to NF4 while transformers loads: its reader, its renames, its tied weights.

`from_pretrained(..., quantization_config=NF4LoadConfig())` reads one tensor at a time; the moment
a linear layer's weight arrives it is quantized and the 16-bit tensor is let go, so the whole model
is never held in 16 bits. See docs/adr/0003-quantized-loading-through-transformers.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.utils.quantization_config import QuantizationConfigMixin

from tunesmith.errors import ModelError
from tunesmith.nn.nf4_linear import NF4Linear

__all__ = ["NF4LoadConfig"]

METHOD = "tunesmith_nf4"


@register_quantization_config(METHOD)
class NF4LoadConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How `from_pretrained` shall quantize; block size in weights, `skip` names modules."""

    def __init__(
        self, blocksize: int = 64, nested: bool = True, skip: tuple[str, ...] = (), **_: Any
    ) -> None:
        self.quant_method = METHOD
        self.blocksize = blocksize
        self.nested = nested
        self.skip = tuple(skip)


@register_quantizer(METHOD)
class _NF4Loader(HfQuantizer):  # type: ignore[misc]
    """Tells transformers' loader which weights to hand over, and puts NF4Linear in their place."""

    requires_calibration = False

    def __init__(self, quantization_config: NF4LoadConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = False
        self.targets: dict[str, str] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        kept = [*get_keys_to_not_convert(model), *self.quantization_config.skip]
        linears = {
            name: module for name, module in model.named_modules() if type(module) is nn.Linear
        }
        unknown = [
            name
            for name in self.quantization_config.skip
            if not any(_within(n, name) for n in linears)
        ]
        if unknown:
            endings = sorted({name.rpartition(".")[2] for name in linears})
            raise ModelError(
                f"quantize: 'skip' names {', '.join(unknown)}, which is no linear layer of this "
                f"model; its layers end in: {', '.join(endings)}"
            )
        self.targets = {
            f"{name}.weight": name
            for name in linears
            if not any(_within(name, keep) for keep in kept)
        }
        if not self.targets:
            raise ModelError(
                f"quantize: {type(model).__name__} has no linear layer besides its head, so there "
                "is nothing to quantize; leave the quantize step out"
            )

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        return param_name in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self.quantization_config)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        missing = [
            name for name in self.targets.values() if type(model.get_submodule(name)) is nn.Linear
        ]
        if missing:
            raise ModelError(
                f"the checkpoint holds no weight for {missing[0]}"
                + (f" and {len(missing) - 1} more layers" if len(missing) > 1 else "")
                + "; it is incomplete or of another model"
            )
        # an NF4Linear is a plain frozen module to everyone: nothing downstream shall treat the
        # model as transformers treats the quantization formats it knows by name
        for attribute in ("quantization_method", "hf_quantizer", "is_quantized"):
            if attribute in model.__dict__:
                delattr(model, attribute)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        return model

    def postprocess_model(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return self._process_model_after_weight_loading(model, **kwargs)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Quantize(ConversionOps):  # type: ignore[misc]
    """Takes a weight as it arrives and leaves an NF4Linear in its module's place."""

    def __init__(self, config: NF4LoadConfig) -> None:
        self.config = config

    def convert(
        self,
        input_dict: dict[str, Any],
        *,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        loading_info: Any = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        for key, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            name = key.removesuffix(".weight")
            linear: Any = model.get_submodule(name)
            if weight.shape != linear.weight.shape:
                raise ModelError(
                    f"{key}: the checkpoint's shape is {list(weight.shape)}, the model's "
                    f"{list(linear.weight.shape)}; it belongs to another config"
                )
            layer = NF4Linear.from_weight(
                weight,
                blocksize=self.config.blocksize,
                nested=self.config.nested,
                dtype=linear.weight.dtype,
                name=key,
            )
            # the bias may still be on the meta device; the loader fills it when it comes to it
            layer.register_parameter("bias", linear.bias)
            layer._is_hf_initialized = True
            model.set_submodule(name, layer)
            for missing in (missing_keys, getattr(loading_info, "missing_keys", None)):
                if missing is not None:
                    missing.discard(key)
        return {}


def _within(name: str, keep: str) -> bool:
    """Whether a module is, or lies in, a module that is called `keep`."""
    return f".{keep}." in f".{name}."
