"""Which steps stand where they cannot: by the table of verbs, and by what plugins say they are.

A plan is read from its first step to its last, as a run will go; an export that makes a model
begins anew on that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunesmith.nn.tasks import CAUSAL_LM, Task

if TYPE_CHECKING:
    from tunesmith.engine.plan import PlannedStep

__all__ = ["order_problems"]


def order_problems(steps: Sequence[PlannedStep]) -> list[str]:
    """Return a line for each step that cannot stand where it does."""
    if not steps:
        return ["the recipe has no steps; add one, such as .sft(data)"]
    problems: list[str] = []
    since: dict[str, PlannedStep] = {}
    method: PlannedStep | None = None
    trained: PlannedStep | None = None
    for step in steps:
        problems += _by_table(step, since)
        kind = step.verb.kind
        if kind == "methods":
            problems += _by_method(step, since)
            method, trained = step, None
        elif kind == "trainers":
            problems += _by_training(step, method, trained)
            trained = step
        elif kind == "exporters":
            problems += _by_export(step, method, trained)
        since.setdefault(step.step.verb, step)
        if step.flag("makes_model"):
            since, method, trained = {}, None, None
    return problems


def _by_table(step: PlannedStep, since: dict[str, PlannedStep]) -> list[str]:
    own, verb = step.step.verb, step.verb
    if verb.once and own in since:
        return [f"{_after(step, since[own])}; {verb.once}"]
    early = [name for name in verb.not_after if name in since]
    if early:
        return [f"{_after(step, since[early[0]])}; {verb.not_after[early[0]]}"]
    return [
        f"{step.here}: {remedy}"
        for before, (needed, remedy) in verb.needs.items()
        if before in since and needed not in since
    ]


def _by_method(step: PlannedStep, since: dict[str, PlannedStep]) -> list[str]:
    quantized = next((each for each in since.values() if each.verb.kind == "quantizers"), None)
    if step.flag("saves_model") and quantized is not None:
        return [
            f"{_after(step, quantized)}, and trains all weights, which quantized ones cannot be; "
            "leave one of them out"
        ]
    return []


def _by_training(
    step: PlannedStep, method: PlannedStep | None, trained: PlannedStep | None
) -> list[str]:
    problems = []
    if method is not None and method.flag("adds_tokens") and getattr(step.config, "packs", False):
        problems.append(
            f"{step.here}: packs several rows into one sequence, and {method.step.label} puts "
            "tokens of its own before a row: all but the first would be without them; pass "
            "packing=False"
        )
    if trained is not None and method is not None and _task(trained) != _task(step):
        problems.append(
            f"{step.here}: trains for {_task(step)}, and the adapter of step {trained.number} "
            f"({trained.step.label}), which it would go on from, is for {_task(trained)}; put "
            f".merge() and a method between them"
        )
    return problems


def _by_export(
    step: PlannedStep, method: PlannedStep | None, trained: PlannedStep | None
) -> list[str]:
    if not step.flag("merges") or method is None or trained is None:
        return []
    problems = []
    if method.flag("mergeable") is False:
        problems.append(
            f"{step.here}: what {method.step.label} trains is nothing that can be added into the "
            "base's weights; leave the step out: the adapter itself is kept in the run directory"
        )
    if _task(trained) != CAUSAL_LM:
        problems.append(
            f"{step.here}: step {trained.number} ({trained.step.label}) trains for "
            f"{_task(trained)}, and only a causal-lm is merged; leave the step out: the adapter "
            "itself is kept in the run directory"
        )
    return problems


def _task(step: PlannedStep) -> Task:
    task: Task | None = step.flag("task")
    return task or CAUSAL_LM


def _after(step: PlannedStep, other: PlannedStep) -> str:
    return f"{step.here}: comes after {other.here}"
