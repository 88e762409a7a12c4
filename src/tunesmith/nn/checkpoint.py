"""Writing a Hugging Face checkpoint tensor by tensor, with one shard in memory at a time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["ShardWriter"]

SHARD_BYTES = 2 * 1024**3


class ShardWriter:
    """Collects tensors and writes `model-0000k.safetensors` whenever a shard is full.

    `close()` writes the last one and names the files as transformers expects: one file
    `model.safetensors`, or numbered shards with `model.safetensors.index.json`.
    """

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self.directory = directory
        self.shard_bytes = shard_bytes
        self.total_bytes = 0
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add one tensor under its checkpoint name; it is copied to the CPU."""
        kept = tensor.detach().to("cpu").contiguous()
        size = kept.numel() * kept.element_size()
        if self._pending and self._pending_bytes + size > self.shard_bytes:
            self._flush()
        self._pending[name] = kept
        self._pending_bytes += size
        self.total_bytes += size

    def close(self) -> None:
        """Write what is left, and the index if there is more than one shard."""
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
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self.directory / f"shard-{len(self._shards) + 1:05d}.safetensors"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._shards.append((path, list(self._pending)))
        self._pending = {}
        self._pending_bytes = 0
