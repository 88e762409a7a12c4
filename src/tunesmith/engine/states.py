"""States of optimizers, schedulers and generators as JSON and safetensors: nothing is unpickled.

Scalars and lists are themselves in JSON; what JSON has no form for is an object with one key:
{"dict": [[key, value], ...]}, {"tuple": [...]}, {"tensor": name}, {"array": name}.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.engine.durable import created

if TYPE_CHECKING:
    import torch

__all__ = ["StateError", "decode", "encode", "read_tensors", "tensor_bytes", "write_tensors"]

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}
"""What safetensors calls each dtype of torch."""


class StateError(Exception):
    """A value that cannot be kept without pickling it, or a record of one that is not whole."""


def encode(value: Any, tensors: dict[str, torch.Tensor], path: str = "") -> Any:
    """Return a value as JSON can hold it; its tensors go into `tensors` under their paths.

    Errors: `StateError` names the place of a value of a kind that has no form here.
    """
    import numpy as np
    import torch

    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)) and type(value).__module__ != "torch":
        return value if type(value) in (int, float) else _plain_number(value)
    if isinstance(value, torch.Tensor):
        return {"tensor": _stored(value, tensors, path)}
    if isinstance(value, np.ndarray):
        return {"array": _stored(torch.from_numpy(np.ascontiguousarray(value)), tensors, path)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {
            "dict": [
                [encode(key, tensors), encode(item, tensors, f"{path}/{key}" if path else str(key))]
                for key, item in value.items()
            ]
        }
    if isinstance(value, (list, tuple, deque)):
        items = [encode(item, tensors, f"{path}/{at}") for at, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    raise StateError(f"{path or 'the state'} is a {type(value).__module__}.{type(value).__name__}")


def decode(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return the value that `encode` was given."""
    if isinstance(tree, list):
        return [decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) != 1:
        raise StateError(f"an object with the keys {', '.join(map(str, tree))} is no state")
    [(kind, held)] = tree.items()
    if kind == "dict":
        return {_key(decode(key, tensors)): decode(item, tensors) for key, item in held}
    if kind == "tuple":
        return tuple(decode(item, tensors) for item in held)
    if kind == "tensor":
        return tensors[held].clone()
    if kind == "array":
        return tensors[held].numpy().copy()
    raise StateError(f"an object of the kind {kind!r} is no state")


def tensor_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the bytes that tensors take in a file."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Write a safetensors file, synced; return its size and hash.

    One tensor at a time is copied to the CPU, and none is held twice: a state may take most of the
    memory there is. A failed write is an `OSError`.
    """
    # aligned as the library writes them: the widest numbers first
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    start = 0
    for name in order:
        tensor = tensors[name]
        dtype = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise StateError(f"{name} holds {tensor.dtype}, which safetensors has no name for")
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, start + size],
        }
        start += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with created(path) as stream:
        for part in (len(head).to_bytes(8, "little"), head):
            stream.write(part)
            digest.update(part)
        for name in order:
            data = _raw(tensors[name])
            stream.write(data)
            digest.update(data)
    return {"bytes": 8 + len(head) + start, "sha256": digest.hexdigest()}


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, on the CPU."""
    from safetensors.torch import load_file

    loaded: dict[str, torch.Tensor] = load_file(path)
    return loaded


def _stored(tensor: torch.Tensor, tensors: dict[str, torch.Tensor], path: str) -> str:
    name = path or "state"
    while name in tensors:
        name += "'"
    tensors[name] = tensor.detach()
    return name


def _raw(tensor: torch.Tensor) -> memoryview:
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    data: Any = flat.view(torch.uint8).numpy()
    return memoryview(data) if flat.numel() else memoryview(b"")


def _plain_number(value: Any) -> Any:
    return int(value) if isinstance(value, int) else float(value)


def _key(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        raise StateError(f"{value!r} cannot be a key") from None
    return value
