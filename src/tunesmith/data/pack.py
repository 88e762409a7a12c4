"""Packing and collation: rendered examples to the tensors a model's forward takes.

A packed block holds several samples one after another. transformers keeps them apart in the
attention mask if, and only if, `position_ids` restart at 0 with every sample, no `attention_mask`
is given and no cache is used; `PackingCollator` builds exactly that, and `packing_supported` tries
out whether a model heeds it.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from tunesmith.data.render import IGNORE_INDEX, Rendered
from tunesmith.errors import DataError
from tunesmith.modes import in_mode

__all__ = [
    "PackingCollator",
    "PaddingCollator",
    "PreferenceCollator",
    "pack",
    "packing_supported",
    "padding_id",
]

TokenRow: TypeAlias = Rendered | Mapping[str, Sequence[int]]
"""A rendered example, or a mapping with its input_ids and labels."""


def padding_id(tokenizer: Any) -> int:
    """Return the id to pad with: the tokenizer's eos, or 0 where it has none.

    Any id that has a row in the embedding would do: padding is masked by position and never by what
    it is. A pad token that was added to a tokenizer may have none.
    """
    eos = tokenizer.eos_token_id
    return 0 if eos is None else int(eos)


def pack(rows: Sequence[Rendered], max_length: int) -> list[list[Rendered]]:
    """Return the rows grouped into blocks of at most `max_length` tokens, none lost and none cut.

    Best fit, the longest first: each row goes where it leaves the least room. Deterministic.
    Errors: `DataError` for a row longer than a block.
    """
    blocks: list[list[Rendered]] = []
    room: list[tuple[int, int]] = []  # (free tokens, block), sorted
    for index in sorted(range(len(rows)), key=lambda index: (-len(rows[index]), index)):
        row = rows[index]
        if len(row) > max_length:
            raise DataError(
                f"row {index + 1} has {len(row)} tokens; expected at most max_length={max_length}; "
                "render it with that max_length"
            )
        place = bisect_left(room, (len(row), -1))
        if place == len(room):
            blocks.append([row])
            insort(room, (max_length - len(row), len(blocks) - 1))
        else:
            free, block = room.pop(place)
            blocks[block].append(row)
            insort(room, (free - len(row), block))
    return blocks


class PaddingCollator:
    """Makes a batch of examples, padded on the right to the longest one.

    Returns int64 `input_ids`, `attention_mask` and `labels`, each [rows, length]. What is padding
    is told by length, never by id: the padding token may well be one that is trained.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """Return the batch."""
        tokens = [_ids_and_labels(row) for row in rows]
        length = max(len(ids) for ids, _ in tokens)
        return {
            "input_ids": _padded([ids for ids, _ in tokens], length, self.pad_token_id),
            "attention_mask": _padded([[1] * len(ids) for ids, _ in tokens], length, 0),
            "labels": _padded([labels for _, labels in tokens], length, IGNORE_INDEX),
        }


class PackingCollator:
    """Makes a batch of packed blocks whose samples do not see each other.

    Returns int64 `input_ids`, `position_ids` and `labels`, each [blocks, length], and
    `use_cache=False`: with a cache, or with an attention_mask, transformers would let every sample
    attend to those before it. Padding at the end of a block is a sample of its own.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, blocks: Sequence[Sequence[TokenRow]]) -> dict[str, Any]:
        """Return the batch."""
        ids: list[list[int]] = []
        labels: list[list[int]] = []
        positions: list[list[int]] = []
        for block in blocks:
            samples = [_ids_and_labels(row) for row in block]
            ids.append([token for tokens, _ in samples for token in tokens])
            labels.append([label for _, targets in samples for label in targets])
            positions.append([at for tokens, _ in samples for at in range(len(tokens))])
        length = max(len(block_ids) for block_ids in ids)
        for block_positions in positions:
            block_positions.extend(range(length - len(block_positions)))
        return {
            "input_ids": _padded(ids, length, self.pad_token_id),
            "position_ids": torch.tensor(positions, dtype=torch.int64),
            "labels": _padded(labels, length, IGNORE_INDEX),
            "use_cache": False,
        }


class PreferenceCollator:
    """Makes one batch of pairs: all chosen rows first, then all rejected, in the same order.

    Rows are {"chosen", "rejected"} as `Rendered`, and optionally "reference_chosen_logps" and
    "reference_rejected_logps". Returns int64 `input_ids`, `attention_mask` and `labels`, each
    [2 * pairs, length], and the reference's log-probabilities as fp32 [pairs] where there are any.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.padding = PaddingCollator(pad_token_id)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return the batch."""
        sides = ("chosen", "rejected")
        batch = self.padding([row[side] for side in sides for row in rows])
        for name in (f"reference_{side}_logps" for side in sides):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return batch


def packing_supported(model: Any) -> str | None:
    """Return why packed samples would see each other in this model, or None if they do not.

    Tried out rather than looked up: two short samples go through the model in one block, once after
    one another and once with the first one changed and once in the other order. What the second
    sample gets must not change with what stands before it. Takes three forward passes of a dozen
    tokens without gradient; leaves the model as it was.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(inner.forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "position_ids" not in parameters and not open_ended:
        return "its forward takes no position_ids, by which packed samples are told apart"
    device = next(inner.parameters()).device
    if device.type == "meta":
        return None
    size = inner.get_input_embeddings().num_embeddings
    first, second, other = ([(7 * k + s) % size for k in range(1, 7)] for s in (1, 2, 4))
    try:
        with torch.no_grad(), in_mode(inner, training=False):
            plain = _second_logits(inner, first, second, device)
            changed = _second_logits(inner, other, second, device)
            moved = _second_logits(inner, second, first, device, of=0)
    except TypeError as error:
        return f"its forward does not take packed samples: {error}"
    scale = plain.float().abs().max().clamp_min(1e-6)
    leak = float((plain.float() - changed.float()).abs().max() / scale)
    shift = float((plain.float() - moved.float()).abs().max() / scale)
    full = plain.dtype == torch.float32
    # same shapes, same places: what stands before changes nothing, not even by rounding (but for
    # experts, which gather their tokens in another order)
    if leak > (1e-5 if full else 1e-2):
        return (
            "what a sample gets depends on the samples before it in its block (its attention or "
            "its state does not heed position_ids)"
        )
    # the same numbers elsewhere in the block may be summed in another order
    if shift > (1e-4 if full else 3e-2):
        return "its positions do not start again with each sample of a block"
    return None


def _second_logits(
    model: Any, first: list[int], second: list[int], device: torch.device, *, of: int = 1
) -> Tensor:
    """Return the logits of one of two packed samples, [2, 6, vocabulary].

    The block stands in the batch twice, as some attention kernels tell samples apart only in a
    batch of one.
    """
    rows = [{"input_ids": ids, "labels": ids} for ids in (first, second)]
    batch = PackingCollator(0)([rows, rows])
    ids, positions = batch["input_ids"].to(device), batch["position_ids"].to(device)
    logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    length = len(first)
    return logits[:, of * length : (of + 1) * length]


def _ids_and_labels(row: TokenRow) -> tuple[Sequence[int], list[int]]:
    """Return a sample's ids and labels; its first token is a label of nothing.

    The causal shift sets a label against the token before it, and in a block that one belongs to
    another sample.
    """
    if isinstance(row, Rendered):
        ids, labels = row.input_ids, list(row.labels)
    else:
        ids, labels = tuple(row["input_ids"]), list(row["labels"])
    labels[:1] = [IGNORE_INDEX] * len(labels[:1])
    return ids, labels


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    padded = [[*row, *[value] * (length - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64)  # [rows, length]
