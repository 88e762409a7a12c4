"""Task: what kind of model a step needs, and how transformers and PEFT call it.

Loading, quantizing, adapting and estimating take one. It is plain data: nothing heavy is imported.
"""

from __future__ import annotations

from typing import Any

import attrs

from tunesmith.errors import OptionError

__all__ = ["CAUSAL_LM", "Task", "sequence_classification", "task_of"]


@attrs.frozen
class Task:
    """A kind of model over one base: what its head answers."""

    name: str
    """"causal-lm" or "sequence-classification"."""
    labels: int = 0
    """Numbers that the head gives for a sequence; 0 for a head over the vocabulary."""

    def __attrs_post_init__(self) -> None:
        if self.name not in _AUTO:
            raise OptionError([f"task: got {self.name!r}; expected one of {', '.join(_AUTO)}"])
        if (self.labels > 0) != (self.name != "causal-lm"):
            raise OptionError(
                [f"task {self.name}: got {self.labels} labels; only a classifier has some"]
            )

    @property
    def auto_class(self) -> str:
        """Name of transformers' auto class for it."""
        return _AUTO[self.name]

    @property
    def peft_type(self) -> str:
        """PEFT's name for it; of a classifier PEFT trains and saves the head, too."""
        return _PEFT[self.name]

    def __str__(self) -> str:
        return f"{self.name} ({self.labels})" if self.labels else self.name


_AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}
_PEFT = {"causal-lm": "CAUSAL_LM", "sequence-classification": "SEQ_CLS"}

CAUSAL_LM = Task("causal-lm")
"""Predict the next token: what a language model does."""


def sequence_classification(labels: int) -> Task:
    """Give `labels` numbers for a sequence: one for a reward model, one for each class else."""
    return Task("sequence-classification", labels)


def task_of(model: Any) -> Task:
    """Return the task of a transformers model, by what its forward pass ends in."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None or not type(model).__name__.endswith("ForSequenceClassification"):
        return CAUSAL_LM
    return sequence_classification(int(model.config.num_labels))
