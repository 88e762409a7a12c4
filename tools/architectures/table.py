"""The table of docs/reference/architectures.md: written from outcomes, and read again by a test."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tools.architectures.journey import BASES, VERDICTS, Outcome

__all__ = ["PAGE", "read", "write"]

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "architectures.md"

_HEAD = """# Architectures

Every causal-LM family of transformers {transformers}, as a tiny random model, went through all of
this on a plain base and on one in NF4: the plan, two steps of SFT with LoRA, two of DPO (whose
first loss has to be ln 2), an evaluation, a merge, an evaluation of the merged model as stock
transformers opens it (the same loss), a training that was interrupted and resumed (the same bytes),
and greedy decoding (the tokens of transformers' own `generate`).

| | {verdicts} |
|---|---|---|---|---|
{counts}

*right*: each of these held. *refused*: the plan says why, and nothing was computed. *wrong*: the
remark says what did not hold. *not tried*: there is no such tiny model for text, and why. "in 4
bits" is the share of the weights besides embeddings and head that `nf4` holds so; what stays, and
why, is in the plan of each run. How a layer is recognised:
[ADR 0019](../adr/0019-experts-in-4-bits.md). Written by `python -m tools.architectures --write`; do
not edit it by hand.

| family | in 4 bits | plain | nf4 | remark |
|---|---|---|---|---|
"""


def write(outcomes: Iterable[Outcome], shares: dict[str, str], transformers: str) -> None:
    """Write the page from the outcomes of all families on all bases."""
    by_family: dict[str, dict[str, Outcome]] = {}
    for outcome in outcomes:
        by_family.setdefault(outcome.family, {})[outcome.base] = outcome
    counts = []
    for base in BASES:
        found = [each[base].verdict for each in by_family.values()]
        figures = [str(found.count(verdict)) for verdict in VERDICTS]
        counts.append(f"| {base} | {' | '.join(figures)} |")
    head = {"verdicts": " | ".join(VERDICTS), "counts": "\n".join(counts)}
    lines = [_HEAD.format(transformers=transformers, **head)]
    for family, each in sorted(by_family.items()):
        verdicts = " | ".join(each[base].verdict for base in BASES)
        lines.append(f"| {family} | {shares.get(family, '')} | {verdicts} | {_remark(each)} |\n")
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text("".join(lines), encoding="utf-8")


def read() -> dict[tuple[str, str], str]:
    """Return the verdict of each (family, base) in the page."""
    found: dict[tuple[str, str], str] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 + len(BASES) and cells[0] and cells[2] in VERDICTS:
            family, _, *verdicts, _ = cells
            found |= {
                (family, base): verdict for base, verdict in zip(BASES, verdicts, strict=True)
            }
    return found


def _remark(each: dict[str, Outcome]) -> str:
    texts = {base: each[base].text for base in BASES if each[base].text}
    if len(set(texts.values())) == 1 and len(texts) == len(BASES):
        return _short(next(iter(texts.values())))
    return "; ".join(f"{base}: {_short(text)}" for base, text in texts.items())


def _short(text: str) -> str:
    # where the model lay is nobody's concern
    text = " ".join(re.sub(r"(/[\w.-]+){2,}", "...", text.replace("|", "/")).split())
    return text if len(text) <= 240 else f"{text[:237]}..."
