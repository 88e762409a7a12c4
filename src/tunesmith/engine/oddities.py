"""What is allowed and rarely meant: a plan says it in notes, and a run in warnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tunesmith.engine.estimate import optimizer_steps
from tunesmith.engine.world import current as current_world

if TYPE_CHECKING:
    from tunesmith.engine.plan import PlannedStep

__all__ = ["odd_notes"]

HIGH_RATE = 1.0
"""Soft prompts are trained at up to 0.3 (Lester et al. 2021, arXiv:2104.08691); nothing is
above."""


def odd_notes(steps: Sequence[PlannedStep]) -> list[str]:
    """Return a line for each thing that is odd."""
    return [*_nothing_to_do(steps), *_untrained(steps), *(t for s in steps for t in _options(s))]


def _nothing_to_do(steps: Sequence[PlannedStep]) -> Iterator[str]:
    if steps and not any(step.verb.leaves_stage for step in steps):
        yield (
            "the recipe says how a model is loaded and adapted, and nothing that is done with it; "
            "add a step such as .sft(data)"
        )


def _untrained(steps: Sequence[PlannedStep]) -> Iterator[str]:
    """Say where an adapter is used that is as fresh as it was begun."""
    fresh: PlannedStep | None = None
    for step in steps:
        kind = step.verb.kind
        if kind == "methods":
            fresh = step
        elif kind in ("trainers", ""):
            fresh = None
        elif kind in ("metrics", "exporters") and fresh is not None:
            yield (
                f"{step.here}: is done with the {fresh.step.label} of step {fresh.number} "
                "untrained, which is the base as it was; put a training between them, or leave "
                f"{fresh.step.label} out"
            )
            fresh = None


def _options(step: PlannedStep) -> Iterator[str]:
    """Say which options of a training are odd, by themselves and beside its rows."""
    config, data = step.config, step.data
    if step.verb.kind != "trainers" or config is None:
        return
    if config.learning_rate is not None and config.learning_rate > HIGH_RATE:
        yield (
            f"{step.here}: learning_rate={config.learning_rate:g} is far above what any method is "
            "trained with (LoRA: about 2e-4), and the loss will not go down"
        )
    if data is None:
        return
    rows = len(data.examples)
    if "batch_size" in step.step.options and config.batch_size > rows:
        yield (
            f"{step.here}: batch_size={config.batch_size} is more than the {rows} rows there are; "
            "a batch holds all of them"
        )
    steps, _ = optimizer_steps(config, rows, current_world().size)
    packs = getattr(config, "packs", False)  # how many blocks there will be is not known yet
    if config.eval_steps is not None and config.eval_steps > steps and not packs:
        yield (
            f"{step.here}: eval_steps={config.eval_steps} is more than the {steps} steps that are "
            "taken, so nothing is evaluated on the way; lower it, or leave it out to evaluate once "
            "an epoch"
        )
