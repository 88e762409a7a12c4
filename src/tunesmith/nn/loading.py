"""4-bit layers while transformers loads: its reader, its renames, its tied weights.

`from_pretrained(..., quantization_config=NF4LoadConfig())` reads one tensor at a time; the moment
a linear layer's weight arrives it is quantized and the 16-bit tensor is let go, so the whole model
is never held in 16 bits. See docs/adr/0003-quantized-loading-through-transformers.md.

With `NF4LoadConfig(stored=True)` the checkpoint is one that holds 4-bit weights already, from
bitsandbytes or from `save_pretrained` of a model that was loaded here. They are taken as they are.
See docs/adr/0004-bitsandbytes-layout.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tunesmith.errors import ModelError, TunesmithError
from tunesmith.nn.checkpoint import stored_formats
from tunesmith.nn.interchange import SUFFIXES, from_tensors
from tunesmith.nn.nf4_experts import NF4Experts, quantize_experts
from tunesmith.nn.nf4_linear import NF4Linear
from tunesmith.nn.quantizable import Split, is_linear, split, tell

__all__ = ["NF4LoadConfig", "bitsandbytes_config", "own_errors", "trim_heap"]

METHOD = "tunesmith_nf4"

# so much may lie freed in malloc's heap before it is handed back: pages that were handed back cost
# time when they are needed again
_TRIM_NBYTES = 8 << 20


@register_quantization_config(METHOD)
class NF4LoadConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How `from_pretrained` shall quantize; block size in weights, `skip` names modules.

    `stored` says that the checkpoint holds 4-bit weights; then the other settings are not used.
    """

    def __init__(
        self,
        blocksize: int = 64,
        nested: bool = True,
        skip: tuple[str, ...] = (),
        quant_type: str = "nf4",
        stored: bool = False,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.blocksize = blocksize
        self.nested = nested
        self.skip = tuple(skip)
        self.quant_type = quant_type
        self.stored = stored


class _StoppedError(BaseException):
    """What went wrong with a weight; no Exception, of which transformers would make a report."""

    def __init__(self, error: TunesmithError) -> None:
        self.error = error


@contextlib.contextmanager
def own_errors() -> Iterator[None]:
    """Raise what goes wrong with a weight at once and as it is, not as transformers sums it up."""
    try:
        yield
    except _StoppedError as stopped:
        raise stopped.error from stopped.error.__cause__


def bitsandbytes_config(model: nn.Module) -> BitsAndBytesConfig:
    """Return the `quantization_config` by which stock transformers opens a model's state dict.

    It is that of bitsandbytes' own 4-bit layers; every linear layer that is not stored so is named
    as skipped, since a list that is given takes the place of transformers' defaults.
    """
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=layers[0].quant_type,
        bnb_4bit_use_double_quant=layers[0].nf4.nested,
        bnb_4bit_compute_dtype=layers[0].compute_dtype,
        llm_int8_skip_modules=[
            name
            for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D))
            and (not isinstance(module, NF4Linear) or module.stored_dense)
        ],
    )


@register_quantizer(METHOD)
class _NF4Loader(HfQuantizer):  # type: ignore[misc]
    """Tells transformers' loader which weights to hand over, and puts NF4Linear in their place."""

    requires_calibration = False
    # what the loader sets aside on a GPU before it loads: without it, room for 16 bits a weight
    quantized_element_size = 0.5
    serialized_names: ClassVar[dict[str, list[str]]] = {
        "weight": ["weight", *(f"weight{suffix}" for suffix in SUFFIXES)]
    }

    def __init__(self, quantization_config: NF4LoadConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # decides whether the loader quantizes what it reads or puts it together
        self.pre_quantized = quantization_config.stored
        self.targets: dict[str, str] = {}
        self.found: Split | None = None
        self.quantize = _Quantize(quantization_config)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if self.pre_quantized:
            files = [Path(file) for file in checkpoint_files or ()]
            stored = stored_formats(file for file in files if file.suffix == ".safetensors")
            if not stored:
                raise ModelError(
                    "config.json says that this model is stored in 4 bits, and no weight in its "
                    "safetensors files is; remove quantization_config from it, or take the model "
                    "from its source again"
                )
            self.targets = {f"{name}.weight": name for name in stored}
            return
        found = split(model, self.quantization_config.skip)
        self.found = found
        self.targets = {name: name.rpartition(".")[0] for name in found.targets}
        self.quantize.targets = frozenset(self.targets)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        return param_name in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return self.quantize

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": _TakeStored}

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype) -> torch.dtype | None:
        for op in getattr(converter, "operations", ()):
            if isinstance(op, _TakeStored):
                # which tensors make up a 4-bit weight is known once they are all there: until then
                # nothing may be cast
                op.plain_dtype = dtype
                return None
        cast: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return cast

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, (NF4Linear, NF4Experts))}
        made = [name for name, layer in layers.items() if isinstance(layer, NF4Linear)]
        held = {
            f"{name}.{own}"
            for name, layer in layers.items()
            for own in (("weight",) if isinstance(layer, NF4Linear) else layer.stacks)
        }
        left = sorted(self.targets.keys() - held)
        # a stored weight may come by another name than the layer that it is renamed to
        if left and not (self.pre_quantized and len(held) >= len(self.targets)):
            left = [name.removesuffix(".weight") for name in left]
            more = f" and {len(left) - 1} more layers" if len(left) > 1 else ""
            if self.pre_quantized:
                raise ModelError(
                    f"the checkpoint holds 4-bit weights for {left[0]}{more}, and "
                    f"{type(model).__name__} has no such linear layer; it is of another model, or "
                    "this transformers holds those weights in another form: start from the "
                    "unquantized checkpoint"
                )
            raise ModelError(
                f"the checkpoint holds no weight for {left[0]}{more}; it is incomplete or of "
                "another model"
            )
        if self.quantize.freed_nbytes:
            trim_heap()
        # an NF4Linear is a plain frozen module to everyone: nothing downstream shall treat the
        # model as transformers treats the quantization formats it knows by name
        for attribute in ("quantization_method", "hf_quantizer", "is_quantized"):
            if attribute in model.__dict__:
                delattr(model, attribute)
        if self.found is not None:
            nbytes = sum(
                each.nbytes for layer in layers.values() for each in layer.buffers(recurse=False)
            )
            tell(self.found, nbytes, model.dtype)
        # what is left is for save_pretrained: the config that fits the layers' state dict
        if all(isinstance(each, NF4Experts) or each.stored_dense for each in layers.values()):
            del model.config.quantization_config
        else:
            model.config.quantization_config = bitsandbytes_config(model)
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or ()
            if not _touches(conversion, made)
        ]
        return model

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        return self._process_model_after_weight_loading(model, **kwargs)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _PutInPlace(ConversionOps):  # type: ignore[misc]
    """Leaves an NF4Linear in a module's place, and ends the loading with the first error."""

    config: NF4LoadConfig

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, torch.Tensor]:
        tensors = {
            key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()
        }
        try:
            return self._convert(tensors, **kwargs)
        except TunesmithError as error:
            raise _StoppedError(error) from error

    def _convert(self, tensors: dict[str, torch.Tensor], **_: Any) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def _put(
        self,
        model: nn.Module,
        key: str,
        linear: nn.Module,
        layer: NF4Linear,
        missing_keys: set[str] | None,
    ) -> None:
        # what stock transformers puts a 4-bit layer in the place of
        layer.stored_dense = type(linear) not in (nn.Linear, Conv1D)
        # the bias may still be on the meta device; the loader fills it when it comes to it
        layer.register_parameter("bias", linear._parameters["bias"])
        layer._is_hf_initialized = True
        model.set_submodule(key.removesuffix(".weight"), layer)
        if missing_keys is not None:
            missing_keys.discard(key)


class _Quantize(_PutInPlace):
    """Quantizes weights as they arrive; one serves the whole model."""

    def __init__(self, config: NF4LoadConfig) -> None:
        self.config = config
        self.targets: frozenset[str] = frozenset()
        # since the heap was last trimmed
        self.freed_nbytes = 0

    def _convert(
        self,
        tensors: dict[str, torch.Tensor],
        *,
        model: nn.Module | None = None,
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        assert model is not None
        others = {}
        for key, weight in tensors.items():
            if key not in self.targets:  # a conversion may make several weights of one
                others[key] = weight
                continue
            if key.endswith(".weight"):
                self._quantize_linear(model, key, weight, missing_keys)
            else:
                self._quantize_experts(model, key, weight, missing_keys)
            # pages of a file cannot be resized; what can is the copy that a cast has made
            if weight.untyped_storage().resizable():
                self.freed_nbytes += weight.nbytes
        if self.freed_nbytes >= _TRIM_NBYTES:
            # each copy leaves a hole in the heap; what stays of the next weights splits it, so that
            # the copies after those would need new memory
            trim_heap()
            self.freed_nbytes = 0
        return others

    def _quantize_linear(
        self, model: nn.Module, key: str, weight: torch.Tensor, missing_keys: set[str] | None
    ) -> None:
        linear = _linear(model, key, weight.shape)
        layer = NF4Linear.from_weight(
            weight.T.contiguous() if isinstance(linear, Conv1D) else weight,
            blocksize=self.config.blocksize,
            nested=self.config.nested,
            dtype=linear.weight.dtype,
            name=key,
            quant_type=self.config.quant_type,
        )
        self._put(model, key, linear, layer, missing_keys)

    def _quantize_experts(
        self, model: nn.Module, key: str, weight: torch.Tensor, missing_keys: set[str] | None
    ) -> None:
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        parameter = module._parameters[name]
        assert parameter is not None
        _check_shape(key, weight.shape, parameter.shape)
        names = tuple(each for each in module._parameters if f"{path}.{each}" in self.targets)
        experts = quantize_experts(module, names, parameter.dtype)
        config = self.config
        experts.quantize(name, weight, config.blocksize, config.nested, config.quant_type, key)
        if missing_keys is not None:
            missing_keys.discard(key)


class _TakeStored(_PutInPlace):
    """Puts the tensors of a stored 4-bit weight together; a plain weight passes through."""

    plain_dtype: torch.dtype | None = None

    def __init__(self, hf_quantizer: _NF4Loader) -> None:
        self.hf_quantizer = hf_quantizer
        self.config = hf_quantizer.quantization_config

    def __deepcopy__(self, memo: dict[int, Any]) -> _TakeStored:
        # the loader copies an operation for every weight; they report to one quantizer
        return type(self)(self.hf_quantizer)

    def _convert(
        self,
        tensors: dict[str, torch.Tensor],
        *,
        model: nn.Module | None = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **_: Any,
    ) -> dict[str, torch.Tensor]:
        assert model is not None
        plain = tensors.get("weight")
        if len(tensors) == 1 and plain is not None and plain.is_floating_point():
            return {"weight": plain.to(self.plain_dtype)}
        w = from_tensors(tensors, name=full_layer_name)
        linear = _linear(model, full_layer_name, w.shape, stored=True)
        layer = NF4Linear(w, dtype=linear.weight.dtype)
        self._put(model, full_layer_name, linear, layer, missing_keys)
        return {}


def trim_heap() -> None:
    """Hand the pages that malloc holds freed back to the system, where the C library can."""
    if trim := _malloc_trim():
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    # glibc has it, musl has not
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def _linear(model: nn.Module, key: str, shape: torch.Size, *, stored: bool = False) -> Any:
    """Return the linear layer that a weight of this name and shape is for.

    A Conv1D's weight is [in_features, out_features]; `stored` in 4 bits it is the other way round.
    """
    linear = model.get_submodule(key.removesuffix(".weight"))
    if not is_linear(linear):
        raise ModelError(
            f"{key}: is stored in 4 bits, and the model has a {type(linear).__name__} there; only "
            "linear layers can be held so: start from the unquantized checkpoint"
        )
    weight: Any = linear.weight
    expected = weight.shape
    if stored and isinstance(linear, Conv1D):
        expected = torch.Size(reversed(expected))
    _check_shape(key, shape, expected)
    return linear


def _check_shape(key: str, shape: torch.Size, expected: torch.Size) -> None:
    if shape != expected:
        raise ModelError(
            f"{key}: the checkpoint's shape is {list(shape)}, the model's {list(expected)}; it "
            "belongs to another config"
        )


def _touches(conversion: Any, layers: list[str]) -> bool:
    """Whether undoing a conversion on saving would rearrange 4-bit weights, which it cannot."""
    if not isinstance(conversion, WeightConverter):
        return False  # a renaming holds for every tensor of a weight
    if any(isinstance(op, _TakeStored) for op in conversion.operations):
        return True
    try:
        undone = conversion.reverse_transform()
    except NotImplementedError:
        return False  # transformers will say so, should someone save the model
    return any(undone.rename_source_key(f"{name}.weight")[1] is not None for name in layers)
