"""The rows that everyone learns from: real data where it is at hand, else the demo's own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import attrs

__all__ = ["SHARED_DATA", "Rows", "find_rows", "read_rows", "write_rows"]

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
"""Beside the checkout; the product ships none of it."""

_FILLED = 12
"""Characters for each token that an answer of a pair is to fill: more than any tokenizer packs."""


@attrs.frozen
class Rows:
    """Texts of one turn each."""

    source: str
    """Where they come from, for the report."""
    answers: list[tuple[str, str]]
    """(prompt, completion)"""
    pairs: list[tuple[str, str, str]]
    """(prompt, chosen, rejected); both answers fill a sequence, so that all pairs cost the same."""


def find_rows(max_length: int, shared: Path = SHARED_DATA) -> Rows:
    """Return rows for sequences of `max_length` tokens.

    Prompts are short enough to leave room for an answer even where a token is a character.
    """
    instructions, preferences = shared / "alpaca_en_demo.json", shared / "dpo_en_demo.json"
    if instructions.is_file() and preferences.is_file():
        source = f"{instructions.name} and {preferences.name} of LLaMA-Factory"
        answered = json.loads(instructions.read_text(encoding="utf-8"))
        pairs = [
            (row["conversations"][0]["value"], row["chosen"]["value"], row["rejected"]["value"])
            for row in json.loads(preferences.read_text(encoding="utf-8"))
        ]
    else:
        source = "tunesmith.demo"
        answered = _lines("train.jsonl")
        pairs = [(r["prompt"], r["chosen"], r["rejected"]) for r in _lines("preferences.jsonl")]
    answers = [(f"{r['instruction']} {r['input']}".strip(), r["output"]) for r in answered]
    return Rows(
        source,
        [
            (prompt, answer)
            for prompt, answer in answers
            if len(prompt) < max_length // 2 and answer
        ],
        list(_filled(pairs, max_length)),
    )


def write_rows(rows: Rows, path: Path) -> None:
    """Write rows as JSON, for `read_rows`."""
    path.write_text(json.dumps(attrs.asdict(rows)), encoding="utf-8")


def read_rows(path: Path) -> Rows:
    """Return what `write_rows` has written."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return Rows(
        found["source"],
        [(prompt, answer) for prompt, answer in found["answers"]],
        [(prompt, chosen, rejected) for prompt, chosen, rejected in found["pairs"]],
    )


def _lines(name: str) -> list[dict[str, Any]]:
    text = (files("tunesmith.demo") / "data" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _filled(
    pairs: Sequence[tuple[str, str, str]], max_length: int
) -> Iterator[tuple[str, str, str]]:
    """Yield the pairs with answers long enough to be cut at `max_length`."""
    for number, (prompt, _, _) in enumerate(pairs):
        onwards = [pairs[(number + step) % len(pairs)] for step in range(len(pairs))]
        chosen = _at_least(_FILLED * max_length, (row[1] for row in onwards))
        rejected = _at_least(_FILLED * max_length, (row[2] for row in onwards))
        yield prompt[: max_length // 4], chosen, rejected


def _at_least(characters: int, texts: Iterable[str]) -> str:
    lengths = 0
    taken: list[str] = []
    for text in itertools.cycle(filter(None, texts)):
        taken.append(text)
        lengths += len(text)
        if lengths >= characters:
            break
    return " ".join(taken)
