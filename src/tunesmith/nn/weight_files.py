"""A model's weight files, looked at before anything loads them: which, where, and their headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tunesmith.errors import ModelError
from tunesmith.nn.reading import AGAIN, read_object, reason

__all__ = ["check_weight_files", "headers", "weight_files"]

MOST_TENSORS = 100_000
"""More than any file of a model holds, experts one by one included."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.distcp")


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that transformers would load from a directory.

    Errors: `ModelError` for an index that is damaged, or that names files elsewhere.
    """
    whole = directory / "model.safetensors"
    if whole.is_file():
        return [whole]
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return []
    weight_map = read_object(index, 1 << 28).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: has no 'weight_map' that says which file holds what; {AGAIN}")
    for key, name in weight_map.items():
        # a link in the hub's cache leads elsewhere; a name never does
        plain = isinstance(name, str) and Path(name).name == name and "\\" not in name
        if not plain or name in ("", ".."):
            raise ModelError(
                f"{index}: puts {key} into {name!r}; expected the name of a file in the same "
                f"directory; {AGAIN}"
            )
    return [directory / name for name in sorted(set(weight_map.values()))]


def check_weight_files(directory: Path) -> list[Path]:
    """Return a model's weight files after a look at each header.

    Errors: `ModelError` if there are none, if they are pickles, for a shard that is gone, and for a
    header that does not fit its file.
    """
    if (directory / "adapter_config.json").is_file():
        raise ModelError(
            f"model {directory}: holds an adapter (adapter_config.json) beside the model, which "
            "transformers would put on it unasked; move the adapter to a directory of its own"
        )
    if any(directory.glob("shard-*-model-*.safetensors")):
        raise ModelError(
            f"model {directory}: holds a distributed checkpoint (shard-*-model-*); write it as "
            "plain safetensors with save_pretrained first"
        )
    files = weight_files(directory)
    if not files:
        pickles = sorted({file.name for kind in PICKLES for file in directory.glob(kind)})
        if pickles:
            raise ModelError(
                f"model {directory}: its weights are pickled ({', '.join(pickles[:3])}), and "
                "opening a pickle can run any code; convert them where you trust them, with "
                "transformers: AutoModelForCausalLM.from_pretrained(it).save_pretrained(new) "
                "writes model.safetensors"
            )
        raise ModelError(
            f"model {directory}: holds no weights (no model.safetensors and no "
            "model.safetensors.index.json); take them from the model's source"
        )
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file}: is not there, and the index names it; {AGAIN}")
        _header(file)
    return files


def headers(directory: Path) -> dict[str, Any]:
    """Return tensors on the meta device, as a model's weight files describe them.

    Errors: those of `check_weight_files`.
    """
    found: dict[str, Any] = {}
    for file in check_weight_files(directory):
        found.update(_header(file))
    return found


def _header(file: Path) -> dict[str, Any]:
    """Return the tensors of a file on the meta device; the reader checks the header."""
    import torch
    from transformers.modeling_utils import str_to_torch_dtype

    tensors: dict[str, Any] = {}
    try:
        # not for torch, which would ask for memory for all of it
        with safe_open(file, framework="numpy") as opened:
            keys = opened.keys()
            if len(keys) > MOST_TENSORS:
                raise ValueError(f"it counts {len(keys):,} tensors")
            for key in keys:
                part = opened.get_slice(key)
                dtype = str_to_torch_dtype.get(part.get_dtype())
                if dtype is None:
                    raise ValueError(f"{key} is of the unknown dtype {part.get_dtype()}")
                tensors[key] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        size = file.stat().st_size
        raise ModelError(
            f"{file}: is no whole safetensors file ({reason(error)}; it has {size:,} bytes); it "
            f"was cut off or damaged: {AGAIN}"
        ) from error
    return tensors
