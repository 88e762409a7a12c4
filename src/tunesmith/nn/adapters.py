"""Adapters are counted: each trained tensor is in the file, each tensor of a file in the model.

PEFT saves what it finds by name and only warns of what it does not find on loading. Here a saved
adapter is opened again and compared with the model, and so is a loaded one, by names, shapes and
values.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.nn.merging import adapter_tensors

__all__ = ["check_loaded", "check_saved", "open_adapter"]


def open_adapter(
    model: PreTrainedModel,
    directory: Path,
    config: PeftConfig | None = None,
    *,
    trainable: bool = True,
) -> PeftModel:
    """Return the model with the adapter saved in `directory`, to be trained on if `trainable`.

    `config` is used in place of the one in the directory. An adapter with the model's own names is
    loaded under them: PEFT changes names as transformers does those of old checkpoints, and some of
    its patterns (Laguna's `mlp.shared_expert.`) meet names that are right already.
    """
    if config is None:
        config = PeftConfig.from_pretrained(directory, local_files_only=True)
    prompts = config.is_prompt_learning
    wrapped: PeftModel = PeftModel.from_pretrained(
        model,
        directory,
        is_trainable=trainable and not prompts,  # PEFT does not do that
        config=config,
        local_files_only=True,
    )
    if not trainable:
        wrapped.requires_grad_(False)
    elif prompts:
        _thaw_prompts(wrapped, directory)
    path = directory / SAFETENSORS_WEIGHTS_NAME
    if path.is_file():
        held = adapter_tensors(wrapped)
        with safe_open(path, framework="pt") as file, torch.no_grad():
            if set(file.keys()) == set(held):
                for name, tensor in held.items():
                    stored = file.get_tensor(name)
                    if tensor.shape == stored.shape and not _same(tensor, stored):
                        tensor.copy_(stored)
    return wrapped


def check_saved(model: Any, directory: Path) -> None:
    """Compare an adapter that was just saved with the model it was saved from.

    Errors: `ModelError` naming trained tensors that the file does not hold as they are.
    """
    if not hasattr(model, "peft_config"):
        return
    held = adapter_tensors(model)
    kept = {id(tensor) for tensor in held.values()} | _prompts_kept(model, held)
    lost = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in kept
    ]
    if lost:
        raise ModelError(
            f"{directory}: {_some(lost)} {'was' if len(lost) == 1 else 'were'} trained and "
            "would not be kept: PEFT does not count them to the adapter; train only what its "
            "method adapts"
        )
    problem = _differences(model, held, directory)
    if problem:
        raise ModelError(
            f"{directory}: the adapter that was written is not the one that was trained: {problem}"
        )


def check_loaded(model: Any, directory: Path) -> None:
    """Compare a model that an adapter was loaded into with the adapter's file.

    Errors: `ModelError` naming tensors that are missing, unknown to the model, or others.
    """
    if not hasattr(model, "peft_config"):
        return
    problem = _differences(model, adapter_tensors(model), directory)
    if problem:
        raise ModelError(
            f"adapter {directory}: does not fit the model: {problem}; it was trained on another "
            "base or with other options, or its file is broken: train it anew, or give its base"
        )


def _thaw_prompts(model: PeftModel, directory: Path) -> None:
    """Let a learned prompt be trained further, where its file holds all there is to train."""
    for name, encoder in model.prompt_encoder.items():
        own = [each for each, _ in encoder.named_parameters()]
        if own != ["embedding.weight"]:
            raise ModelError(
                f"adapter {directory}: cannot be trained further: of the weights that make its "
                f"prompt ({_some(own)}) PEFT keeps what they make, and not them; train it in one "
                "step"
            )
        encoder.requires_grad_(True)
        model.peft_config[name].inference_mode = False


def _prompts_kept(model: Any, held: Mapping[str, torch.Tensor]) -> set[int]:
    """Return the identities of learned prompts that PEFT writes as they are, under another name.

    Of an encoder that makes a prompt of other weights PEFT writes what it makes, not the weights.
    """
    kept = set()
    for encoder in getattr(model, "prompt_encoder", {}).values():
        own = dict(encoder.named_parameters())
        written = held.get("prompt_embeddings")
        if written is not None and own.keys() == {"embedding.weight"}:
            weight = own["embedding.weight"]
            if _same(weight, written):
                kept.add(id(weight))
    return kept


def _differences(model: Any, held: Mapping[str, torch.Tensor], directory: Path) -> str:
    """Say how the tensors of a model and of an adapter's file differ; "" if they do not."""
    path = directory / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        return f"there is no {SAFETENSORS_WEIGHTS_NAME}"
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names == set(held):
                return _compared(held, {name: file.get_tensor(name) for name in held})
            stored = {name: file.get_tensor(name) for name in sorted(names)}
    except Exception as error:  # safetensors has errors of its own
        return f"{SAFETENSORS_WEIGHTS_NAME} cannot be read: {error}"
    if not names >= set(held):
        stored = _as_this_transformers_names_them(model, stored)
    # weights of the base beside the adapter, as PEFT keeps of an embedding that is adapted
    base = model.state_dict()
    stored = {
        name: tensor
        for name, tensor in stored.items()
        if name in held or name not in base or not _same(base[name], tensor)
    }
    return _compared(held, stored)


def _compared(held: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> str:
    shapes = [
        f"{name} ({list(stored[name].shape)} in the file, {list(held[name].shape)} in the model)"
        for name in sorted(held.keys() & stored.keys())
        if stored[name].shape != held[name].shape
    ]
    found = {
        "missing in the file": sorted(held.keys() - stored.keys()),
        "not in the model": sorted(stored.keys() - held.keys()),
        "of another shape": shapes,
    }
    if not any(found.values()):
        found["of other values"] = [
            name for name in sorted(held) if not _same(held[name], stored[name])
        ]
    return "; ".join(f"{_some(names)} {what}" for what, names in found.items() if names)


def _same(held: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether two tensors are equal in the file's dtype; NaN is equal to itself."""
    if held.shape != stored.shape:
        return False
    ours = held.detach().to("cpu", stored.dtype)
    return bool(ours.equal(stored) or torch.allclose(ours, stored, 0, 0, equal_nan=True))


def _as_this_transformers_names_them(
    model: Any, stored: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors as PEFT loads them: from before experts were stacked, as well."""
    from peft.utils.transformers_weight_conversion import (
        convert_peft_adapter_state_dict_for_transformers as convert,
    )

    name = model.active_adapters[0]
    try:
        converted: dict[str, torch.Tensor] = convert(
            model, model.peft_config[name], dict(stored), adapter_name=name
        )
    except Exception:  # then PEFT has not loaded it either, and the names are compared as they are
        return stored
    return converted


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
