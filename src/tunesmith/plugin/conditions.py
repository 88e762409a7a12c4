"""What a plan knows of a step before it runs, and what a plugin answers: how it will act.

Many defaults are decided late: a learning rate by the method in use, a seed by the recipe. What
they are decided to be is said by the plugin itself (`Resolved.effective`), and stands in the plan,
in the record of the stage and in the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from tunesmith.plugin.options import plain_options

__all__ = ["Conditions", "Piece", "Resolved"]


@attrs.frozen(kw_only=True)
class Conditions:
    """Where a step will work, and on what."""

    device: str = "cpu"
    """A torch device's type."""
    precision: str = "fp32"
    """"fp32", "bf16" or "fp16": the dtype that the model computes in."""
    seed: int = 0
    """The recipe's."""
    processes: int = 1
    """How many train as one."""
    trains_base: bool = False
    """Whether weights of the base itself are trained: all of them, or some by a method."""
    model: Any = attrs.field(default=None, repr=False)
    """The model on the meta device, unquantized; None where it is not known yet."""


@attrs.frozen
class Piece:
    """One of the things that decide how fast a training is."""

    text: str
    """What it is and how it goes, such as "attention: sample by sample"."""
    fast: bool = True
    """Whether it goes the faster way."""
    remedy: str = ""
    """What to set so that it does, such as "chunked_loss=True"; "" where no option would."""

    def __str__(self) -> str:
        return self.text


class Resolved:
    """What every plugin of a step can say: what its options come to."""

    def effective(self, conditions: Conditions) -> Mapping[str, Any]:
        """Return every option as it will act, by name, as plain values.

        An option that is given is returned as it is, and one that is left out as what it is decided
        to be; None only where it then means nothing. Names beside the options are for what follows
        from them, such as a batch. Unless overridden these are the options as they are.
        """
        config: Any = getattr(self, "config", None)
        return plain_options(config) if attrs.has(type(config)) else {}
