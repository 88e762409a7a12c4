"""A row and the place it stands in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

__all__ = ["Row"]


@attrs.define  # to make a frozen one takes six times as long, which a million rows feel
class Row:
    """One row as its source holds it, and where it stands there."""

    values: Mapping[str, Any]
    """Plain values: dict, list, str, int, float, bool, None; bytes where they are no text."""
    where: str
    """"train.json, row 12", "train.jsonl, line 12", "owner/name[train], row 12" or "row 12"."""
