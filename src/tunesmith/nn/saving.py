"""A model written as a Hugging Face directory: the weights first, then what describes them.

What ends up on the disk depends on as little as possible: weights go through `ShardWriter`, config
and generation config are the base's own files with what has changed changed in them, so that a
setting which transformers reads but refuses to write (a temperature without sampling, as in many
a chat model) costs nobody a training.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
)

from tunesmith.errors import ModelError, TunesmithError
from tunesmith.nn.checkpoint import SHARD_BYTES, ShardWriter

__all__ = [
    "Weights",
    "checkpoint_names",
    "in_fp32",
    "not_opened",
    "plain_weights",
    "save_description",
    "save_model",
]

Weights = Mapping[str, Callable[[], torch.Tensor]]
"""The weights of a model by their names in it; a tensor is made when its function is called."""

# what belongs to a model besides its weights and its tokenizer, and is not changed by training
_COMPANIONS = (
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)


def save_model(
    model: Any,
    tokenizer: Any,
    directory: Path,
    *,
    base: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model with plain weights, and its tokenizer, as a Hugging Face directory.

    `base` is the directory that the model was loaded from: config and generation config are taken
    from there. Errors: `ModelError` naming the directory if something besides the weights cannot be
    written, or transformers would not take all of what was; the weights are there then.
    """
    weights = plain_weights(model)
    writer = ShardWriter(directory, shard_bytes)
    try:
        for name, tensor in checkpoint_names(model, weights):
            writer.add(name, tensor)
    except ModelError:
        # the model's own names open as well; a training is not lost over the names of its weights
        writer.discard()
        writer = ShardWriter(directory, shard_bytes)
        for name, made in weights.items():
            writer.add(name, made())
    writer.close()
    dtype = next(
        (p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype()
    )
    tied = any(name not in weights for name in _tied_keys(model))
    save_description(model, tokenizer, directory, dtype=dtype, tied=tied, base=base)
    if problem := not_opened(type(model), directory):
        raise ModelError(f"the weights are whole, in {directory}, but do not open: {problem}")


def not_opened(cls: Any, directory: Path) -> str:
    """Return what stock transformers would miss, not know or reject in a model directory.

    Names and shapes are compared on the meta device: no weight is read. "" if all is well.
    """
    try:
        _, info = cls.from_pretrained(
            directory,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the info names them then
            local_files_only=True,
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    found = {
        "missing": sorted(map(str, info["missing_keys"])),
        "not known": sorted(map(str, info["unexpected_keys"])),
        "of another shape": sorted(str(key[0]) for key in info["mismatched_keys"]),
        "rejected": list(map(str, info.get("error_msgs") or ())),
    }
    return "; ".join(
        f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in found.items()
        if names
    )


def save_description(
    model: Any,
    tokenizer: Any,
    directory: Path,
    *,
    dtype: torch.dtype,
    tied: bool,
    base: Path | None = None,
) -> None:
    """Write all that a directory of weights needs to be opened: configs, tokenizer and template.

    `tied` says whether the head is left to be the embedding. Errors: `ModelError` that says what
    could not be written, and where the weights are.
    """
    failed = []
    for what, write in (
        ("config.json", lambda: _save_config(model, directory, dtype, tied, base)),
        ("generation_config.json", lambda: _save_companions(model, directory, base)),
        ("the tokenizer", lambda: tokenizer.save_pretrained(directory)),
    ):
        try:
            write()
        except Exception as error:
            failed.append((what, error))
    if failed:
        reasons = "; ".join(f"{what}: {type(e).__name__}: {e}" for what, e in failed)
        source = base or "the base model"
        raise ModelError(
            f"the weights are whole, in {directory}; not written beside them: {reasons}; copy "
            f"what is missing from {source} to use them"
        ) from failed[0][1]


def in_fp32(model: Any, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the names of modules that transformers loads in fp32 when it loads in `dtype`.

    Rounded to 16 bits they would be other weights: such as what decides between experts.
    """
    names = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        names += getattr(model, "_keep_in_fp32_modules", None) or ()
    return tuple(names)


def plain_weights(model: Any) -> dict[str, Callable[[], torch.Tensor]]:
    """Return a plain model's weights, each of several that are one and the same only once."""
    state = dict(model.state_dict(keep_vars=True))
    for name, source in _tied_keys(model).items():
        if name in state and state.get(source) is state[name]:
            del state[name]
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)

    def lazily(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        return lambda: tensor

    return {name: lazily(tensor) for name, tensor in state.items()}


def checkpoint_names(model: Any, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights as the checkpoint that a model was loaded from names and divides them.

    This is transformers' `revert_weight_conversion`, which wants all weights at once, one
    conversion at a time: stacked experts become one tensor an expert again, and one stack is in
    memory. Errors: `ModelError` if a conversion cannot be undone.
    """
    renamings, converters = _undoing(model)
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    work: dict[str, Any] = {}
    for name in sorted(weights, key=dot_natural_key):
        renamed, pattern = apply_converters(name, converters)
        if pattern is not None:
            mapping = work.setdefault(renamed, copy.deepcopy(by_pattern[pattern]))
        else:
            renamed, pattern = apply_renamings(name, renamings), name
            mapping = work.setdefault(renamed, WeightRenaming(name, renamed))
        mapping.add_tensor(renamed, name, pattern, weights[name])
    written: set[str] = set()
    for first in list(work):
        mapping = work.pop(first)
        try:
            made = mapping.convert(first, model=model, config=model.config)
        except TunesmithError:
            raise
        except Exception as error:
            raise ModelError(
                f"{first}: transformers cannot write this weight as its checkpoint has it: "
                f"{type(error).__name__}: {error}"
            ) from error
        for name, tensor in made.items():
            if isinstance(mapping, WeightConverter):
                name = apply_renamings(name, renamings)
            if name in written:
                raise ModelError(f"{name}: two weights of the model would be written by this name")
            written.add(name)
            yield name, tensor[0] if isinstance(tensor, list) else tensor


def _undoing(model: Any) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """Return what turns a model's names and shapes into its checkpoint's."""
    undoing = []
    for conversion in reversed(getattr(model, "_weight_conversions", None) or ()):
        try:
            undoing.append(conversion.reverse_transform())
        except (NotImplementedError, ValueError):
            continue  # how a library's own layers are read; a plain model has none of them
    return (
        [each for each in undoing if isinstance(each, WeightRenaming)],
        [each for each in undoing if isinstance(each, WeightConverter)],
    )


def _tied_keys(model: Any) -> dict[str, str]:
    """Return the names of weights that are another weight's twin, and whose."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _save_config(
    model: Any, directory: Path, dtype: torch.dtype, tied: bool, base: Path | None
) -> None:
    """Write the base's config.json with what differs for these weights."""
    config: dict[str, Any] = model.config.to_diff_dict()
    if base is not None and (base / "config.json").is_file():
        stored = json.loads((base / "config.json").read_text(encoding="utf-8"))
        if stored.get("model_type") == config.get("model_type"):
            config = stored  # else the model is a part of a larger one, such as one with images
    config["architectures"] = [type(model).__name__]
    text = config.get("text_config")
    for part in (config, text) if isinstance(text, dict) else (config,):
        part.pop("quantization_config", None)
        # written by models saved before transformers 4.56; the newer name wins where both stand
        part.pop("torch_dtype", None)
        part["dtype"] = str(dtype).removeprefix("torch.")
        if not tied and _tied_keys(model):
            part["tie_word_embeddings"] = False
        part.pop("transformers_weights", None)
    text_config = model.config.get_text_config()
    if (rows := getattr(text_config, "vocab_size", None)) is not None:
        holder = text if isinstance(text, dict) and "vocab_size" in text else config
        if holder.get("vocab_size", rows) != rows:
            holder["vocab_size"] = rows
    written = json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"
    (directory / "config.json").write_text(written, encoding="utf-8")


def _save_companions(model: Any, directory: Path, base: Path | None) -> None:
    """Copy the base's files byte for byte, or write what the model says of itself."""
    if base is not None:
        for name in _COMPANIONS:
            if (base / name).is_file():
                shutil.copyfile(base / name, directory / name)
        return
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        path = directory / "generation_config.json"
        path.write_text(generation.to_json_string(use_diff=True), encoding="utf-8")
