"""Clean, deduplicate, sample and split examples; what is dropped is counted and listed."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from tunesmith.data.examples import (
    Conversation,
    Labeled,
    Message,
    Preference,
    Prompt,
    Sourced,
    Text,
)
from tunesmith.errors import DataError

__all__ = ["Drop", "DropLog", "Dropped", "content", "deduplicate", "drop_empty", "sample", "split"]

Drop: TypeAlias = Callable[[str, str], None]
"""`drop(where, reason)` records a row that is not used."""


@attrs.frozen
class Dropped:
    """A row that is not used, why, and what else is to say about it."""

    where: str
    reason: str
    """The same words for the same cause, so that reasons can be counted."""
    detail: str = ""


class DropLog:
    """Every row that was dropped on the way from the source to the trainer."""

    def __init__(self) -> None:
        self.entries: list[Dropped] = []

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, where: str, reason: str, detail: str = "") -> None:
        """Record a dropped row; `add` itself is what `drop` arguments take."""
        self.entries.append(Dropped(where, reason, detail))

    @property
    def reasons(self) -> dict[str, int]:
        """How many rows were dropped for each reason, the most frequent first."""
        return dict(Counter(entry.reason for entry in self.entries).most_common())

    def write(self, path: str | Path) -> None:
        """Write one JSON line {"where", "reason"} a row, and its "detail" where there is one."""
        with Path(path).open("w", encoding="utf-8") as stream:
            for entry in self.entries:
                row = {key: text for key, text in attrs.asdict(entry).items() if text}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def deduplicate(examples: Iterable[Sourced], drop: Drop) -> list[Sourced]:
    """Return the examples without those that say exactly what an earlier one says.

    Whitespace counts, as it may be code, but for that at the end of a text. The reason is
    "duplicate"; a `DropLog` is told as well which row stands first.
    """
    first: dict[bytes, str] = {}
    kept: list[Sourced] = []
    for item in examples:
        key = content(item.example)
        if key not in first:
            first[key] = item.where
            kept.append(item)
        elif isinstance(log := getattr(drop, "__self__", None), DropLog):
            log.add(item.where, "duplicate", f"of {first[key]}")
        else:
            drop(item.where, "duplicate")
    return kept


def drop_empty(examples: Iterable[Sourced], drop: Drop) -> list[Sourced]:
    """Return the examples that have something to learn from; the reasons say what is missing."""
    kept: list[Sourced] = []
    for item in examples:
        reason = _emptiness(item.example)
        if reason:
            drop(item.where, reason)
        else:
            kept.append(item)
    return kept


def sample(examples: Sequence[Sourced], share: float, seed: int, drop: Drop) -> list[Sourced]:
    """Return this share of the examples, in the order they came; the reason is "not sampled".

    A share of 2 is each one twice, the second time after all others; of 1.5, half of them twice.
    Which ones depends on the seed and on what they say, not on their order. Errors: `DataError` if
    none would be left.
    """
    whole = int(share)
    count = round((share - whole) * len(examples))
    if whole == count == 0 and examples:
        raise DataError(
            f"a share of {share:g} of {len(examples)} rows leaves nothing; give a larger share, or "
            "more data"
        )
    salt = f"sample {seed}".encode()
    ranks = [hashlib.sha256(salt + b"\0" + content(item.example)).digest() for item in examples]
    chosen = set(sorted(range(len(examples)), key=lambda index: (ranks[index], index))[:count])
    if whole == 0:
        for index, item in enumerate(examples):
            if index not in chosen:
                drop(item.where, "not sampled")
    more = [item for index, item in enumerate(examples) if index in chosen]
    return [*(list(examples) * whole), *more]


def split(
    examples: Sequence[Sourced], held_out: float, seed: int
) -> tuple[list[Sourced], list[Sourced]]:
    """Return (training, evaluation) examples, each in the order they came.

    `held_out` is the share (below 1) or the number of examples to hold out; 0 holds out none.
    Which ones depends on the seed and on what they say, not on their order, so a file that is
    sorted anew is split the same. Errors: `DataError` if either side would be left with nothing.
    """
    total = len(examples)
    if held_out == 0:
        return list(examples), []
    if held_out < 0 or (held_out > 1 and held_out != int(held_out)):
        raise DataError(
            f"a split: got {held_out:g}; expected a share below 1 or a whole number of rows"
        )
    count = round(total * held_out) if held_out < 1 else int(held_out)
    if not 0 < count < total:
        left = "evaluate" if count == 0 else "train"
        raise DataError(
            f"a split: got {held_out:g} of {total} row{'' if total == 1 else 's'}, which "
            f"leaves nothing to {left} on; expected 1 to {max(total - 1, 1)} rows or a share that "
            "comes to as much; give another number, or more data"
        )
    salt = str(seed).encode()
    ranks = [hashlib.sha256(salt + b"\0" + content(item.example)).digest() for item in examples]
    chosen = set(sorted(range(total), key=lambda index: (ranks[index], index))[:count])
    training = [item for index, item in enumerate(examples) if index not in chosen]
    evaluation = [item for index, item in enumerate(examples) if index in chosen]
    return training, evaluation


def content(example: Any) -> bytes:
    """Return a digest of what an example says: equal for those that `deduplicate` takes as one."""
    text = json.dumps(_plain(example), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).digest()


def _plain(value: Any) -> Any:
    if attrs.has(type(value)):
        fields = {f.name: _plain(getattr(value, f.name)) for f in attrs.fields(type(value))}
        return {"": type(value).__name__, **fields}
    if isinstance(value, str):
        return value.rstrip()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _emptiness(example: Any) -> str:
    """Return why there is nothing to learn from an example, or nothing."""
    match example:
        case Text(text):
            return "" if text.strip() else "the text is blank"
        case Conversation(messages):
            return _silence(messages, "no assistant turn says anything")
        case Preference(_, chosen, rejected):
            for side, name in ((chosen, "chosen"), (rejected, "rejected")):
                if silence := _silence(side, f"{name} is blank"):
                    return silence
            return "chosen and rejected are equal" if _plain(chosen) == _plain(rejected) else ""
        case Labeled(_, completion):
            return _silence(completion, "the completion is blank")
        case Prompt(prompt):
            blank = not any(message.content.strip() for message in prompt)
            return "the prompt is blank" if blank else ""
    return ""


def _silence(messages: Sequence[Message], reason: str) -> str:
    """Return why there is nothing to learn in turns, or nothing if there is."""
    answers = [message for message in messages if message.role == "assistant"]
    learned = [message for message in answers if message.trained]
    if answers and not learned:
        return "no turn is to be learned (weight 0)"
    says = any(message.content.strip() or message.extra.get("tool_calls") for message in learned)
    return "" if says else reason
