"""The HTML that the parts of a report are made of; all text goes through `text_of`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["identifier_of", "notes_list", "table", "text_of"]


def text_of(value: object) -> str:
    """Return a value as HTML text, also fit for a quoted attribute."""
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", str(value)))


def notes_list(notes: Sequence[str]) -> str:
    """Return what is missing or broken as a list; nothing where nothing is."""
    if not notes:
        return ""
    items = "".join(f"<li>{text_of(note)}</li>" for note in notes)
    return f'<ul class=notes aria-label="Missing or broken">{items}</ul>'


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; cells are HTML, and the first of each row is its header."""
    head = "".join(f'<th scope="col">{text_of(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class=scroll tabindex="0" role="region" aria-label="{text_of(caption)}"><table>'
        f"<caption>{text_of(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def identifier_of(name: str) -> str:
    """Return the id by which a stage is linked to."""
    return "stage-" + re.sub(r"[^0-9A-Za-z-]", "_", name)
