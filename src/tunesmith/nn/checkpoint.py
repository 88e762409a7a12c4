"""Hugging Face checkpoints: writing one tensor by tensor, and saying how one is quantized.

Writing holds one shard in memory at a time; the questions read config.json, the headers of the
safetensors files and no weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tunesmith.errors import ModelError
from tunesmith.nn.interchange import Format, format_key, read_format
from tunesmith.nn.reading import AGAIN

__all__ = ["ShardWriter", "stored_formats", "stored_quantization", "within"]

SHARD_BYTES = 2 * 1024**3


class ShardWriter:
    """Collects tensors and writes a shard whenever one is full.

    `close()` writes the last one and names the files as transformers expects: one file
    `model.safetensors`, or numbered shards with `model.safetensors.index.json`. Until then they
    have names that nothing opens, so a directory that was left half written holds no model.
    """

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.directory = directory
        self.shard_bytes = shard_bytes
        self.total_bytes = 0
        self._names: set[str] = set()
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add one tensor under its checkpoint name; it is copied to the CPU.

        Errors: `ModelError` for a name that was added before.
        """
        if name in self._names:
            raise ModelError(f"{name}: is written twice; each weight of a model has its own name")
        self._names.add(name)
        kept = tensor.detach().to("cpu").contiguous()
        if any(_same_memory(kept, other) for other in self._pending.values()):
            kept = kept.clone()  # safetensors takes no two tensors that share memory
        size = kept.numel() * kept.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = kept
        self._pending_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        """Write what is left, and the index if there is more than one shard."""
        if self._pending or not self._shards:
            self._flush()
        if len(self._shards) == 1:
            self._shards[0][0].replace(self.directory / "model.safetensors")
            return
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._shards, 1):
            final = f"model-{number:05d}-of-{count:05d}.safetensors"
            path.replace(self.directory / final)
            weight_map.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        # last, and whole or not at all: transformers goes by it
        partial = self.directory / ".model.safetensors.index.json.partial"
        partial.write_text(json.dumps(index, indent=2), encoding="utf-8")
        partial.replace(self.directory / "model.safetensors.index.json")

    def discard(self) -> None:
        """Remove what was written before `close()`."""
        for path, _ in self._shards:
            path.unlink(missing_ok=True)
        self._shards, self._pending, self._pending_bytes = [], {}, 0

    def _flush(self) -> None:
        path = self.directory / f".model-{len(self._shards) + 1:05d}.safetensors.partial"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._shards.append((path, list(self._pending)))
        self._pending = {}
        self._pending_bytes = 0


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numel() > 0 and a.data_ptr() == b.data_ptr()


def stored_quantization(directory: Path) -> dict[str, Any] | None:
    """Return the `quantization_config` of a model directory's config.json; None if it has none."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # transformers says better what is wrong with it
    text = config.get("text_config") if isinstance(config, dict) else None
    for part in (config, text):
        found = part.get("quantization_config") if isinstance(part, dict) else None
        if isinstance(found, dict) and found:
            return found
        if found:
            raise ModelError(
                f"{directory / 'config.json'}: 'quantization_config' is {found!r}; expected an "
                f"object with settings; {AGAIN}"
            )
    return None


def stored_formats(files: Iterable[Path]) -> dict[str, Format]:
    """Return how each 4-bit weight in safetensors files is stored, by the name of its layer.

    Only the headers and the few bytes of each `quant_state` are read. Errors: `OpError` for a
    weight of a kind that tunesmith does not know.
    """
    found: dict[str, Format] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # no mapping
                weight = key.partition(".quant_state.")[0]
                if weight != key and format_key([key], weight) is not None:
                    state = file.get_tensor(key)
                    found[weight.removesuffix(".weight")] = read_format(state, weight)
    return found


def within(name: str, keep: str) -> bool:
    """Return whether a module is, or lies in, a module that is called `keep`."""
    return f".{keep}." in f".{name}."
