"""NF4: 4-bit NormalFloat with double quantization (Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from tunesmith.errors import ModelError
from tunesmith.nn.tasks import CAUSAL_LM, Task
from tunesmith.plugin.conditions import Conditions
from tunesmith.plugin.options import one_of
from tunesmith.plugin.quantizers import Quantizer, stored_method

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from tunesmith.nn.interchange import Format
    from tunesmith.nn.quantizable import Split

__all__ = ["NF4", "NF4Config"]


@attrs.frozen(kw_only=True)
class NF4Config:
    """Options of `.quantize("nf4")`.

    A model that is stored in 4 bits is taken as it is, so what is left out is as it is stored.
    """

    blocksize: int | None = attrs.field(
        default=None,
        validator=attrs.validators.optional(one_of(64, 128, 256, 512, 1024, 2048, 4096)),
    )
    """Weights that share one scale; 64, as QLoRA, unless the model is stored in 4 bits already."""
    nested: bool | None = None
    """Quantize the scales to 8 bits as well (QLoRA's double quantization, blocks of 256): yes,
    unless the model is stored in 4 bits already."""
    skip: tuple[str, ...] = ()
    """Names of modules to leave in the compute dtype, besides the head and the embeddings."""


class NF4(Quantizer[NF4Config]):
    """Holds every linear layer but the head as a `tunesmith.nn.nf4_linear.NF4Linear`.

    A model that bitsandbytes, or `save_pretrained` after this, has stored in 4 bits is not
    quantized again: its weights are taken byte for byte.
    """

    quant_type: ClassVar[str] = "nf4"

    def __init__(self, config: NF4Config) -> None:
        super().__init__(config)
        self.blocksize = config.blocksize or 64
        self.nested = config.nested is not False

    def load(
        self,
        directory: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        task: Task = CAUSAL_LM,
    ) -> PreTrainedModel:
        """Quantize while loading: one tensor at a time is read, quantized and let go."""
        from tunesmith.nn.checkpoint import stored_quantization
        from tunesmith.nn.loading import NF4LoadConfig, own_errors

        options: dict[str, Any] = {}
        stored = stored_quantization(directory)
        if stored is not None:
            self.check_stored(stored, directory)
            options["config"] = _config_without_quantization(directory)
        config = NF4LoadConfig(
            blocksize=self.blocksize,
            nested=self.nested,
            skip=self.config.skip,
            quant_type=self.quant_type,
            stored=stored is not None,
        )
        with own_errors():
            return self.from_pretrained(
                directory,
                dtype=dtype,
                device=device,
                task=task,
                quantization_config=config,
                **options,
            )

    def effective(self, conditions: Conditions) -> Mapping[str, Any]:
        """Return the options as they will act, or as the model is stored, and the table's name."""
        return {
            **super().effective(conditions),
            "blocksize": self.blocksize,
            "nested": self.nested,
            "quant_type": self.quant_type,
        }

    def split(self, model: Any) -> Split:
        """Say which weights go into 4 bits, and why the others do not."""
        from tunesmith.nn.quantizable import split

        return split(model, self.config.skip)

    def check_stored(self, stored: Mapping[str, Any], directory: Path | None) -> str:
        """Take bitsandbytes' 4-bit weights, if they are what the options ask for."""
        from tunesmith.nn.checkpoint import within

        method = stored_method(stored)
        if method != "bitsandbytes 4-bit":
            raise ModelError(
                f"got a model that is stored quantized with {method}; {self.quant_type} takes one "
                "in 16 or 32 bits, or one that bitsandbytes stored in 4 bits; start from the "
                "unquantized checkpoint"
            )
        layers = _formats(directory) if directory is not None else {}
        if not layers:  # not here yet: what config.json tells has to do
            quant_type = str(stored.get("bnb_4bit_quant_type", "fp4"))
            self._check("quant_type", quant_type, self.quant_type)
            scales = bool(stored.get("bnb_4bit_use_double_quant", False))
            self._check("nested", scales, self.config.nested)
            self.nested = scales
            return f"{quant_type} by bitsandbytes: taken as it is, not quantized again"
        for name, layer in layers.items():
            self._check("quant_type", layer.quant_type, self.quant_type, name)
            self._check("blocksize", layer.blocksize, self.config.blocksize, name)
            self._check("nested", layer.nested, self.config.nested, name)
            for skipped in self.config.skip:
                if within(name, skipped):
                    raise ModelError(
                        f"got skip={skipped!r}, and {name} is stored in 4 bits; such weights are "
                        "taken as they are: leave it out, or start from the unquantized checkpoint"
                    )
        # a model's layers are all of one kind in practice; the prediction of memory goes by it
        some = next(iter(layers.values()))
        self.blocksize, self.nested = some.blocksize, some.nested
        kinds = " and ".join(sorted({str(layer) for layer in layers.values()}))
        return f"{kinds}: {len(layers)} layers taken as they are, not quantized again"

    def _check(self, option: str, got: Any, asked: Any, name: str = "the model") -> None:
        """Refuse what is stored otherwise than it was asked for; None asks for nothing."""
        if asked is None or asked == got:
            return
        if option == "quant_type":
            step = f'use .quantize("{got}")'
        else:
            step = f"pass {option}={got!r} or leave it out"
        raise ModelError(
            f"got {option}={asked!r}, and {name} is stored in 4 bits with {option}={got!r}; such "
            f"weights are taken as they are: {step}, or start from the unquantized checkpoint"
        )

    def dense_weight(self, module: torch.nn.Module) -> torch.Tensor:
        """Return the weight as the codes and scales say, not rounded to the compute dtype first."""
        import torch

        from tunesmith.nn.nf4_linear import NF4Linear
        from tunesmith.ops import dequantize_4bit

        if isinstance(module, NF4Linear):
            return dequantize_4bit(module.nf4, torch.float32)
        return super().dense_weight(module)

    def dense_names(self, module: torch.nn.Module) -> tuple[str, ...]:
        """Return the names of a module's own weights, not those of codes and scales."""
        from tunesmith.nn.nf4_experts import NF4Experts

        if not isinstance(module, NF4Experts):
            return super().dense_names(module)
        return tuple(name for name, _ in module.named_parameters(recurse=False))

    def dense_parameter(self, module: torch.nn.Module, name: str) -> torch.Tensor:
        """Return one of `dense_names` in fp32, experts as codes and scales say."""
        import torch

        from tunesmith.nn.nf4_experts import NF4Experts

        if isinstance(module, NF4Experts) and name in module.stacks:
            return module.dense(name, torch.float32)
        return super().dense_parameter(module, name)

    def nbytes(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Return half a byte a weight and the scales; `itemsize` plays no part.

        Each [out_features, in_features] of a longer shape has scales of its own.
        """
        *stacked, out_features, in_features = shape
        return math.prod(stacked) * self._nbytes_of_matrix(out_features * in_features)

    def _nbytes_of_matrix(self, count: int) -> int:
        blocks = -(-count // self.blocksize)
        scales = blocks + 4 * -(-blocks // 256) + 4 if self.nested else 4 * blocks
        return -(-count // 2) + scales


def _formats(directory: Path) -> Mapping[str, Format]:
    from tunesmith.nn.checkpoint import stored_formats
    from tunesmith.nn.weight_files import weight_files

    return stored_formats(weight_files(directory))


def _config_without_quantization(directory: Path) -> Any:
    """Return a model's config as it was before it was quantized: transformers goes by that."""
    from tunesmith.nn.pretrained import load_config

    config = load_config(directory)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config
