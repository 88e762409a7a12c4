"""merge: add the adapter into the dequantized base and save a plain model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunesmith.errors import ModelError
from tunesmith.plugin.exporters import Exporter
from tunesmith.plugin.options import more_than, one_of

if TYPE_CHECKING:
    import torch

    from tunesmith.plugin.session import Session

__all__ = ["Merge", "MergeConfig"]


@attrs.frozen(kw_only=True)
class MergeConfig:
    """Options of `.merge()`."""

    dtype: str = attrs.field(default="auto", validator=one_of("auto", "fp32", "bf16", "fp16"))
    """Dtype of the saved weights; auto takes the run's compute dtype."""
    shard_gb: float = attrs.field(default=2.0, validator=more_than(0))
    """Size of a .safetensors file in GiB; one shard and one tensor are in memory at a time."""


class Merge(Exporter[MergeConfig]):
    """Writes safetensors, config, generation config, tokenizer and chat template.

    Each weight is dequantized to fp32, the adapter's update added in fp32, and the sum rounded once
    to the saved dtype. The result opens with stock transformers and nothing else.
    """

    def export(self, session: Session, directory: Path) -> Path:
        """Write the merged model and return its directory."""
        from tunesmith.nn.checkpoint import ShardWriter

        model = session.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        dtype = self._dtype(session)
        config = _saved_config(session, base, dtype)
        tied = _tied_names(base)
        retied = _adapted_ties(base, tied)
        if retied:  # an adapter on one of two tied weights makes two weights of them
            config.tie_word_embeddings = False
        weights = _merged_weights(base, session)
        if getattr(base, "_weight_conversions", None):
            from transformers.core_model_loading import revert_weight_conversion

            held = dict(weights)
            weights = iter(revert_weight_conversion(base, held).items())
        writer = ShardWriter(directory, int(self.config.shard_gb * 1024**3))
        for name, weight in weights:
            if name in tied and name not in retied:
                continue
            writer.add(name, weight.to(dtype) if weight.is_floating_point() else weight)
        writer.close()
        config.save_pretrained(directory)
        _save_generation_config(session, directory)
        session.tokenizer.save_pretrained(directory)
        return directory

    def _dtype(self, session: Session) -> torch.dtype:
        import torch

        names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return names.get(self.config.dtype, session.dtype)


def _merged_weights(base: Any, session: Session) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every weight of the plain model under its checkpoint name, one at a time."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
    from torch import nn

    done: list[str] = []
    for name, module in base.named_modules():
        if any(name.startswith(f"{prefix}.") for prefix in done):
            continue
        prefix = f"{name}." if name else ""
        if isinstance(module, BaseTunerLayer):
            done.append(name)
            merged = _merged_layer(name, module, session)
            for key, value in merged.state_dict().items():
                yield prefix + key, value
        elif isinstance(module, AuxiliaryTrainingWrapper):
            done.append(name)
            for key, value in _active_module(name, module).state_dict().items():
                yield prefix + key, value
        elif isinstance(module, nn.Linear):
            yield f"{prefix}weight", session.quantizer.dense_weight(module)
            if module.bias is not None:
                yield f"{prefix}bias", module.bias
        else:
            for key, value in module.named_parameters(recurse=False, remove_duplicate=False):
                yield prefix + key, value
            for key, value in module.named_buffers(recurse=False):
                if key not in module._non_persistent_buffers_set:
                    yield prefix + key, value


def _merged_layer(name: str, layer: Any, session: Session) -> torch.nn.Module:
    """Return a plain module in fp32 that computes what base layer and adapter compute together."""
    import torch
    from torch import nn

    original = layer.get_base_layer()
    if isinstance(original, nn.Linear):
        plain: nn.Module = nn.Linear(
            original.in_features,
            original.out_features,
            bias=original.bias is not None,
            device="meta",
        )
        plain.weight = nn.Parameter(session.quantizer.dense_weight(original), requires_grad=False)
        if original.bias is not None:
            plain.bias = nn.Parameter(original.bias.detach().float(), requires_grad=False)
    else:
        plain = copy.deepcopy(original).float()
    with torch.no_grad():
        if type(layer).__module__.endswith(".bnb"):
            # PEFT's bitsandbytes layers merge by quantizing again; take their update instead
            if any(getattr(layer, "use_dora", {}).values()):
                raise ModelError(
                    f"{name}: merging DoRA on a bitsandbytes base is not exact; "
                    'use quantize("nf4") to merge it'
                )
            for adapter in layer.active_adapters:
                plain.weight += layer.get_delta_weight(adapter).float()
            return plain
        layer.base_layer = plain
        try:
            layer.merge(safe_merge=True)
            merged: nn.Module = layer.get_base_layer()
        finally:
            layer.merged_adapters.clear()
            layer.base_layer = original
    return merged


def _active_module(name: str, wrapper: Any) -> torch.nn.Module:
    """Return what a PEFT wrapper of a fully trained module has trained."""
    trained = getattr(wrapper, "modules_to_save", None)
    if not trained:
        raise ModelError(
            f"{name}: {type(wrapper).__name__} cannot be merged; merge it with PEFT's own "
            "merge_and_unload() from the saved adapter"
        )
    active: torch.nn.Module = trained[wrapper.active_adapters[0]]
    return active


def _saved_config(session: Session, base: Any, dtype: torch.dtype) -> Any:
    """Return the config as the base directory has it, not as training has changed it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(session.base, local_files_only=True)
    config.dtype = dtype
    config.architectures = [type(base).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _save_generation_config(session: Session, directory: Path) -> None:
    from transformers import GenerationConfig

    if (session.base / "generation_config.json").exists():
        GenerationConfig.from_pretrained(session.base, local_files_only=True).save_pretrained(
            directory
        )


def _tied_names(base: Any) -> set[str]:
    """Return the checkpoint names of weights that are another weight's twin."""
    if not getattr(base.config, "tie_word_embeddings", False):
        return set()
    keys = getattr(base, "all_tied_weights_keys", None) or base._tied_weights_keys or {}
    return set(keys)


def _adapted_ties(base: Any, tied: set[str]) -> set[str]:
    """Return the tied names whose module, or whose twin's, carries an adapter of its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrapped = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    embeddings = (base.get_input_embeddings(), base.get_output_embeddings())
    holders = [
        module
        for module in base.modules()
        if isinstance(module, wrapped) and (module in embeddings or _holds(module, embeddings))
    ]
    return tied if holders else set()


def _holds(wrapper: Any, modules: tuple[Any, ...]) -> bool:
    return any(child is module for child in wrapper.modules() for module in modules if module)
