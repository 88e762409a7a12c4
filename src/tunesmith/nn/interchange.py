"""4-bit weights in bitsandbytes' layout, so that either library opens what the other has saved.

The layout is that of `bitsandbytes.nn.Linear4bit`'s state dict, as transformers stores it
(`QuantState.as_dict(packed=True)`, bitsandbytes 0.50). A weight `w` is

    w                                     uint8 [ceil(numel / 2), 1], element 2i in the high nibble
    w.absmax                              fp32 [blocks], or uint8 codes [blocks] when nested
    w.quant_map                           fp32 [16], what each 4-bit code stands for
    w.nested_absmax                       fp32 [ceil(blocks / 256)]    these two only when nested
    w.nested_quant_map                    fp32 [256], what each code of absmax stands for
    w.quant_state.bitsandbytes__nf4       uint8, the bytes of a JSON object (or bitsandbytes__fp4)

The JSON object holds quant_type, blocksize, dtype and shape; when nested also nested_blocksize,
nested_dtype and nested_offset, which as a JSON number keeps every bit of its fp32 value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from tunesmith.errors import OpError
from tunesmith.ops import KINDS, Weight4Bit
from tunesmith.ops.dtypes import DTYPES, word
from tunesmith.ops.four_bit import NESTED_BLOCKSIZE
from tunesmith.ops.tables import DYNAMIC_MAP, TABLES

__all__ = ["SUFFIXES", "Format", "as_tensors", "format_key", "from_tensors", "read_format"]

STATE = ".quant_state.bitsandbytes__"
SUFFIXES = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    *(STATE + quant_type for quant_type in KINDS),
)
"""What follows a weight's name in the names of its other tensors."""

# tables that were computed elsewhere differ in the last bit; one that was cast to 16 bits does not
TABLE_RTOL = 1e-6


@attrs.frozen
class Format:
    """How a 4-bit weight is stored."""

    quant_type: str
    """Table of the 4-bit codes: "nf4" or "fp4"."""
    blocksize: int
    """How many elements share one absmax."""
    nested: bool
    """Whether absmax itself is quantized (double quantization)."""

    @classmethod
    def of(cls, w: Weight4Bit) -> Format:
        """Return how a weight is stored by `as_tensors`."""
        return cls(w.quant_type, w.blocksize, w.nested)

    def __str__(self) -> str:
        scales = "quantized, too" if self.nested else "in fp32"
        return f"{self.quant_type} in blocks of {self.blocksize}, scales {scales}"


def as_tensors(w: Weight4Bit, key: str = "weight") -> dict[str, Tensor]:
    """Return a weight as the tensors that bitsandbytes saves for it, named after `key`.

    Packed data and scales are those of `w` itself, not copies.
    """
    tensors = {
        key: w.packed.view(-1, 1),
        f"{key}.absmax": w.absmax,
        # a table of its own for each weight: safetensors refuses tensors that share memory
        f"{key}.quant_map": _table(w.quant_type).to(w.device, copy=True),
    }
    state: dict[str, Any] = {
        "quant_type": w.quant_type,
        "blocksize": w.blocksize,
        "dtype": word(w.dtype),
        "shape": list(w.shape),
    }
    if w.nested_absmax is not None and w.nested_offset is not None:
        tensors[f"{key}.nested_absmax"] = w.nested_absmax
        tensors[f"{key}.nested_quant_map"] = DYNAMIC_MAP.to(w.device, copy=True)
        state |= {
            "nested_blocksize": NESTED_BLOCKSIZE,
            "nested_dtype": "float32",
            # there are no values on the meta device, only names and shapes
            "nested_offset": 0.0 if w.nested_offset.is_meta else w.nested_offset.item(),
        }
    data = bytearray(json.dumps(state).encode())
    tensors[f"{key}{STATE}{w.quant_type}"] = torch.frombuffer(data, dtype=torch.uint8)
    return tensors


def from_tensors(
    tensors: Mapping[str, Tensor], key: str = "weight", *, name: str | None = None
) -> Weight4Bit:
    """Return the weight that bitsandbytes has saved under `key`, byte for byte.

    Other tensors in `tensors` are passed over; `name` is what errors call the weight, by default
    `key`. Raises OpError for tensors that are missing, were cast, or do not fit together.
    """
    name = name or key
    if key not in tensors:
        raise OpError(
            f"{name}: is not there, only {', '.join(tensors) or 'nothing'}; load the whole "
            "state dict"
        )
    state = _state(tensors, key, name)
    found = _format(state, name)
    packed = tensors[key]
    absmax = _part(tensors, key, name, ".absmax", torch.uint8 if found.nested else torch.float32)
    nested_absmax = nested_offset = None
    if found.nested:
        _check_nested(state, name)
        nested_absmax = _part(tensors, key, name, ".nested_absmax", torch.float32)
        offset = float(state["nested_offset"])
        nested_offset = torch.tensor(offset, dtype=torch.float32, device=packed.device)
        theirs = tensors.get(f"{key}.nested_quant_map")
        _check_table(f"{name}.nested_quant_map", theirs, DYNAMIC_MAP)
    theirs = tensors.get(f"{key}.quant_map")
    _check_table(f"{name}.quant_map", theirs, _table(found.quant_type))
    try:
        return KINDS[found.quant_type](
            # bitsandbytes may keep the same bytes in a tensor of another dtype (quant_storage)
            packed=packed.contiguous().view(-1).view(torch.uint8),
            absmax=absmax,
            nested_absmax=nested_absmax,
            nested_offset=nested_offset,
            shape=torch.Size(state["shape"]),
            dtype=_dtype(state, name),
            blocksize=found.blocksize,
        )
    except OpError as error:
        raise OpError(f"{name}: {error}") from error


def format_key(keys: Iterable[str], key: str = "weight") -> str | None:
    """Return which of `keys` says how the weight `key` is stored; None if it is no 4-bit weight."""
    prefix = key + STATE
    return next((each for each in keys if each.startswith(prefix)), None)


def read_format(tensor: Tensor, name: str) -> Format:
    """Return how a weight is stored, from the JSON object in a uint8 tensor."""
    return _format(_json(tensor, name), name)


def _state(tensors: Mapping[str, Tensor], key: str, name: str) -> dict[str, Any]:
    found = format_key(tensors, key)
    if found is None:
        kept = tensors[key]
        raise OpError(
            f"{name}: got a {word(kept.dtype)} tensor {list(kept.shape)} without the quant_state "
            "of a 4-bit weight; load a state dict of 4-bit layers, or quantize a plain weight with "
            "NF4Linear.from_weight"
        )
    return _json(tensors[found], name)


def _json(tensor: Tensor, name: str) -> dict[str, Any]:
    try:
        state = json.loads(bytes(tensor.cpu().view(-1).tolist()))
    except (ValueError, TypeError) as error:
        raise OpError(
            f"{name}.quant_state: is no JSON object in a uint8 tensor: {error}; the checkpoint is "
            "damaged or was cast; take it from its source again"
        ) from error
    required = {"quant_type": str, "blocksize": int, "dtype": str, "shape": list}
    if not isinstance(state, dict) or not all(
        isinstance(state.get(field), kind) for field, kind in required.items()
    ):
        raise OpError(
            f"{name}.quant_state: got {state!r}; expected an object with {', '.join(required)}, as "
            "bitsandbytes writes it; save the checkpoint again with a release of today"
        )
    return state


def _format(state: Mapping[str, Any], name: str) -> Format:
    if state["quant_type"] not in KINDS:
        raise OpError(
            f"{name}: got quant_type {state['quant_type']!r}; allowed are {', '.join(KINDS)}; "
            "start from the unquantized checkpoint"
        )
    return Format(state["quant_type"], state["blocksize"], "nested_blocksize" in state)


def _check_nested(state: Mapping[str, Any], name: str) -> None:
    kept = (state["nested_blocksize"], state.get("nested_dtype"))
    if kept != (NESTED_BLOCKSIZE, "float32"):
        raise OpError(
            f"{name}: got scales quantized in blocks of {kept[0]} in {kept[1]}; double "
            f"quantization has blocks of {NESTED_BLOCKSIZE} in float32; start from the unquantized "
            "checkpoint"
        )
    offset = state.get("nested_offset")
    if not isinstance(offset, (int, float)) or not math.isfinite(offset):
        raise OpError(
            f"{name}: got nested_offset {offset!r}; expected a finite number, the mean of absmax; "
            "the weight held NaN or Inf when it was quantized, or the checkpoint is damaged"
        )


def _dtype(state: Mapping[str, Any], name: str) -> torch.dtype:
    for dtype in DTYPES:
        if state["dtype"] == word(dtype):
            return dtype
    raise OpError(
        f"{name}: got dtype {state['dtype']!r}; allowed are {', '.join(map(word, DTYPES))}; "
        "start from the unquantized checkpoint"
    )


def _part(
    tensors: Mapping[str, Tensor], key: str, name: str, suffix: str, dtype: torch.dtype
) -> Tensor:
    part = tensors.get(key + suffix)
    if part is None:
        raise OpError(f"{name}{suffix}: is not there; load the whole state dict")
    if part.dtype != dtype:
        raise OpError(
            f"{name}{suffix}: got {part.dtype}; this part of a 4-bit weight is {dtype}; load a "
            "state dict that was not cast"
        )
    return part


def _check_table(name: str, theirs: Tensor | None, ours: Tensor) -> None:
    if theirs is None or theirs.dtype != torch.float32:
        got = "nothing" if theirs is None else str(theirs.dtype)
        raise OpError(
            f"{name}: got {got}; this part of a 4-bit weight is {ours.dtype}; load a state dict "
            "that is whole and was not cast"
        )
    if theirs.shape != ours.shape or not torch.allclose(
        theirs.cpu(), ours, rtol=TABLE_RTOL, atol=0.0
    ):
        raise OpError(
            f"{name}: its values are not those that the codes stand for in NF4, FP4 or double "
            "quantization; a table of one's own is not supported: start from the unquantized "
            "checkpoint"
        )


def _table(quant_type: str) -> Tensor:
    return TABLES[quant_type][0]
