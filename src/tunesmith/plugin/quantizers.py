"""Interface of a quantizer: how base weights are loaded, held and read back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tunesmith.errors import ModelError
from tunesmith.nn.tasks import CAUSAL_LM, Task
from tunesmith.plugin.conditions import Resolved

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from tunesmith.nn.quantizable import Split

__all__ = ["Quantizer", "stored_method"]

C = TypeVar("C")


class Quantizer(Resolved, Generic[C]):
    """Decides how the base model's weights are loaded.

    The class itself loads them unquantized, which is what a recipe without a quantize step does;
    a quantizer overrides what it does otherwise.
    """

    own_error: float = 0.0
    """By how much the quantized layers' own arithmetic differs from that with `dense_weight`, as a
    share of the logits; a merge is allowed that much more. 0 where they compute with those values;
    not so for a quantizer that rounds activations too."""

    def __init__(self, config: C) -> None:
        self.config = config

    def load(
        self,
        directory: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        task: Task = CAUSAL_LM,
    ) -> PreTrainedModel:
        """Return the model in a Hugging Face directory, computing in `dtype` on `device`.

        `task` says what its head is for: pass it on to `from_pretrained`.
        """
        from tunesmith.nn.checkpoint import stored_quantization

        stored = stored_quantization(directory)
        if stored is not None:
            self.check_stored(stored, directory)
        return self.from_pretrained(directory, dtype=dtype, device=device, task=task)

    def check_stored(self, stored: Mapping[str, Any], directory: Path | None) -> str:
        """Say in a few words how a model that is stored quantized will be taken.

        A plan asks for it, and only for such a model: `stored` is the `quantization_config` of its
        config.json, `directory` where it lies, or None if it is not here yet. Raises `ModelError`
        for one that cannot be used. Unless overridden, that is one of bitsandbytes, whose weights
        `dense_weight` does not read; others are left to transformers, if what it reads them with is
        there.
        """
        method = stored_method(stored)
        if method.startswith("bitsandbytes"):
            # a plan names the step that this is the answer to, which may be none
            reader = "bitsandbytes" if method.endswith("8-bit") else "nf4"
            raise ModelError(
                f"got a model that is stored quantized with {method}; its weights are read by "
                f'.quantize("{reader}"): put that at the start'
            )
        _check_reader(stored, method)
        return f"{method}: taken as it is, by transformers"

    def split(self, model: Any) -> Split | None:
        """Say which of a model's weights will be held quantized, and why the others will not.

        A plan asks for it: `model` is a skeleton on the meta device. Raises `ModelError` for a
        model of which nothing can be quantized. Unless overridden, it is not known (None), and a
        plan predicts memory as if all linear layers but the head were.
        """
        return None

    def dense_weight(self, module: torch.nn.Module) -> torch.Tensor:
        """Return a linear module's weight [out_features, in_features] in fp32, dequantized."""
        import torch

        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        return weight.detach().to(torch.float32)

    def dense_names(self, module: torch.nn.Module) -> tuple[str, ...]:
        """Return the names that a module's own weights have where the model is not quantized.

        Unless overridden these are its parameters and the buffers that are saved. A quantizer that
        holds weights in another form (codes and scales, stacked experts in 4 bits) names the
        weights they stand for, each of which `dense_parameter` then returns. A linear layer's is
        "weight", and its "bias" if it has one.
        """
        from torch import nn

        if isinstance(module, nn.Linear):
            return ("weight",) if module.bias is None else ("weight", "bias")
        parameters = [name for name, _ in module.named_parameters(recurse=False)]
        buffers = [name for name, _ in module.named_buffers(recurse=False)]
        return (*parameters, *(b for b in buffers if b not in module._non_persistent_buffers_set))

    def dense_parameter(self, module: torch.nn.Module, name: str) -> torch.Tensor:
        """Return one of `dense_names`, dequantized: fp32 if it is of floating point.

        A linear layer's weight comes from `dense_weight`. Another module's has the shape it has
        in the unquantized model, such as [experts, out_features, in_features].
        """
        import torch
        from torch import nn

        if name == "weight" and isinstance(module, nn.Linear):
            return self.dense_weight(module)
        tensor: torch.Tensor = getattr(module, name).detach()
        return tensor.to(torch.float32) if tensor.is_floating_point() else tensor

    def nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Return the bytes that a linear weight of this shape takes once loaded.

        `itemsize` is that of the compute dtype in bytes; used to predict memory.
        """
        count = itemsize
        for size in shape:
            count *= size
        return count

    def from_pretrained(
        self, directory: Path, *, dtype: torch.dtype, device: torch.device, **options: Any
    ) -> PreTrainedModel:
        """Return the model in a directory: of the `task` in `options`, if there is one.

        The other `options` go to transformers' `from_pretrained`. It has every weight that its
        config needs and no other: `ModelError` names what does not fit.
        """
        from tunesmith.nn.pretrained import load_model

        return load_model(directory, dtype=dtype, device=device, **options)


def _check_reader(stored: Mapping[str, Any], method: str) -> None:
    """Raise `ModelError` unless transformers has what it reads this quantization with."""
    import torch
    from transformers.quantizers.auto import AutoHfQuantizer

    from tunesmith.nn.reading import model_errors

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with model_errors(
        f"got a model that is stored quantized with {method}, which cannot be read here",
        "install what it needs, or start from the unquantized checkpoint",
    ):
        quantizer = AutoHfQuantizer.from_config(dict(stored), pre_quantized=True)
        quantizer.validate_environment(dtype=torch.float32, device_map={"": device})


def stored_method(stored: Mapping[str, Any]) -> str:
    """Return what a `quantization_config` is called: "gptq", "bitsandbytes 4-bit", ..."""
    method = str(stored.get("quant_method") or "bitsandbytes")
    if method != "bitsandbytes":
        return method
    return f"{method} 8-bit" if stored.get("load_in_8bit") else f"{method} 4-bit"
