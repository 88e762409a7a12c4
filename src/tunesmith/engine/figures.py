"""Measured values as people read them: the same in plan, console, report and notebook.

Bytes are in binary units, and a stage's main metrics come first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from tunesmith.units import byte_size

__all__ = [
    "EVALUATED",
    "duration",
    "figure",
    "main_metrics",
    "number",
    "short_time",
    "summary",
]

_FIRST = (
    "loss",
    "train_loss",
    "eval_loss",
    "perplexity",
    "rewards/accuracies",
    "eval_rewards/accuracies",
    "rewards/margins",
    "eval_rewards/margins",
)
_BOOKKEEPING = re.compile(
    r"(_|^)(runtime|per_second|flos|epoch|tokens_seen|learning_rate|grad_norm|step|first)$"
)
EVALUATED = _FIRST[2:]
"""What comes with some events only, an evaluation's figures and a training's quality."""
_BYTES = re.compile(r"(^|[_/])bytes$")


def duration(seconds: float) -> str:
    """Return seconds as "4.2s", "2:05" or "1:02:05"; "-" where they are not known."""
    if not math.isfinite(seconds) or seconds < 0:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def number(value: object) -> str:
    """Return a measured value in about four digits; NaN and infinity are written out."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 1e9:
        return f"{value:.3e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def main_metrics(metrics: Mapping[str, Any], *, most: int = 5) -> dict[str, Any]:
    """Return the metrics people ask for first: losses, then quality, never the bookkeeping."""
    telling = [name for name in metrics if not _BOOKKEEPING.search(name)]
    # sorted() is stable: what is not known by name keeps the order it was reported in
    telling.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    return {name: metrics[name] for name in telling[:most]}


def summary(metrics: Mapping[str, Any], *, most: int = 3) -> dict[str, str]:
    """Return in the words of one line what a stage has come to: its main metrics, speed, memory.

    One that is told from its first value on says that too: "loss": "0.41 (from 2.3)".
    """
    beside = {"tokens", "tokens_per_second", "memory_bytes"}
    found: dict[str, str] = {}
    told = {
        name: value
        for name, value in metrics.items()
        # rows that were left out are told where there are some
        if name not in beside and not (name.startswith("rows_") and not value)
    }
    for name, value in main_metrics(told, most=most).items():
        first = metrics.get(f"{name}_first")
        since = f" (from {figure(name, first)})" if first is not None else ""
        found[name] = figure(name, value) + since
    if metrics.get("tokens_per_second"):
        found["speed"] = f"{metrics['tokens_per_second']:,.0f} tokens/s"
    if metrics.get("memory_bytes"):
        found["memory"] = byte_size(metrics["memory_bytes"])
    return found


def figure(name: str, value: object) -> str:
    """Return a metric's value as text: bytes, as its name says, in binary units."""
    if _BYTES.search(name) and isinstance(value, (int, float)) and math.isfinite(value):
        return byte_size(value)
    return number(value)


def short_time(seconds: float) -> str:
    """Return a predicted time as "40 s", "3 min" or "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
