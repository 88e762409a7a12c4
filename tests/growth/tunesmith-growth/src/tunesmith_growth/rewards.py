"""Functions that score answers."""

from __future__ import annotations


def vowels(completions=(), **_):
    """Return the share of vowels in each answer, between 0 and 1."""
    texts = [each[-1]["content"] if isinstance(each, list) else each for each in completions]
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]
