"""Which steps stand where they cannot: by the table of verbs, and by what plugins say they are.

A plan is read from its first step to its last, as a run will go; an export that makes a model
begins anew on that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from tunesmith.errors import close_matches, listed
from tunesmith.nn.tasks import CAUSAL_LM, Task

if TYPE_CHECKING:
    from tunesmith.engine.plan import PlannedStep

__all__ = ["methods_at", "order_problems"]


@attrs.define
class _SoFar:
    """What has been said of one base, up to a step."""

    since: dict[str, PlannedStep] = attrs.field(factory=dict)
    """First step of each verb."""
    method: PlannedStep | None = None
    trained: PlannedStep | None = None
    """The last training of the adapter that goes on."""
    adapters: dict[str, tuple[PlannedStep, PlannedStep]] = attrs.field(factory=dict)
    """The method and the last training of each adapter, by its name."""
    current: str | None = None

    def passed(self, step: PlannedStep) -> None:
        """Take in a step."""
        kind = step.verb.kind
        if kind == "methods":
            self.method, self.trained, self.current = step, None, None
        elif kind == "trainers":
            self.trained = step
            if self.method is not None and not self.method.flag("saves_model"):
                self._trains(step, self.method)
        elif step.flag("makes_adapter"):
            of = _read_by(step)
            if of and of[0] in self.adapters:
                self.method, self.trained = self.adapters[of[0]]
                self.current = step.step.name or step.free_label(self.adapters)
                self.adapters[self.current] = (self.method, self.trained)
        elif not kind and step.step.plugin in self.adapters:
            self.method, self.trained = self.adapters[step.step.plugin]
            self.current = step.step.plugin
        self.since.setdefault(step.step.verb, step)

    def _trains(self, step: PlannedStep, method: PlannedStep) -> None:
        self.current = method.step.name or step.free_label(self.adapters)
        self.adapters[self.current] = (method, step)


def order_problems(steps: Sequence[PlannedStep]) -> list[str]:
    """Return a line for each step that cannot stand where it does."""
    if not steps:
        return ["the recipe has no steps; add one, such as .sft(data)"]
    problems: list[str] = []
    so_far = _SoFar()
    for step in steps:
        problems += _by_table(step, so_far.since)
        kind = step.verb.kind
        if kind == "methods":
            problems += _by_method(step, so_far)
        elif kind == "trainers":
            problems += _by_training(step, so_far.method, so_far.trained)
        elif kind == "exporters":
            problems += _by_export(step, so_far.method, so_far.trained)
            problems += _by_adapters(step, so_far)
        elif not kind:
            problems += _unknown(step, (step.step.plugin,), so_far)
        so_far.passed(step)
        if step.flag("makes_model"):
            so_far = _SoFar()
    return problems


def methods_at(steps: Sequence[PlannedStep]) -> dict[int, PlannedStep | None]:
    """Return the step whose method is in force at each step, by the number of that step."""
    found: dict[int, PlannedStep | None] = {}
    so_far = _SoFar()
    for step in steps:
        so_far.passed(step)
        found[step.number] = so_far.method
        if step.flag("makes_model"):
            so_far = _SoFar()
    return found


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


def _by_method(step: PlannedStep, so_far: _SoFar) -> list[str]:
    since = so_far.since
    if so_far.method is None and "train" in since:
        return [
            f"{_after(step, since['train'])}; all weights were trained by then; put the method "
            "before it"
        ]
    if so_far.method is not None and so_far.trained is None:
        return [
            f"{_after(step, so_far.method)}, of which nothing is trained before it; leave one of "
            "them out"
        ]
    name = step.step.name
    if so_far.method is not None and name is None:
        return [
            f"{_after(step, so_far.method)}, and begins a second adapter on the same base; give it "
            "a name of its own if that is meant, as in name='second', or put .merge() between "
            "them, to train on top of what was trained"
        ]
    if name in so_far.adapters:
        return [
            f"{step.here}: there is an adapter '{name}' already; give this one another name, or "
            f"go on with that one by .use('{name}')"
        ]
    quantized = next((each for each in since.values() if each.verb.kind == "quantizers"), None)
    if step.flag("saves_model") and quantized is not None:
        return [
            f"{_after(step, quantized)}, and trains all weights, which quantized ones cannot be; "
            "leave one of them out"
        ]
    return []


def _by_adapters(step: PlannedStep, so_far: _SoFar) -> list[str]:
    """Say what is wrong with the adapters that an export reads, and with the one it makes."""
    problems: list[str] = []
    name, makes = step.step.name, step.flag("makes_adapter")
    if name is not None and not makes:
        problems.append(f"{step.here}: makes no adapter to be called '{name}'; leave the name out")
    elif name in so_far.adapters:
        problems.append(f"{step.here}: there is an adapter '{name}' already; take another name")
    read = _read_by(step)
    if unknown := _unknown(step, read, so_far):
        return problems + unknown
    if not makes or not read:
        return problems
    methods, trained = zip(*(so_far.adapters[each] for each in read), strict=True)
    kinds = {each.step.plugin: each for each in methods}
    problems += [
        f"{step.here}: adapters of {label} cannot be added up to one"
        for label, each in kinds.items()
        if not each.flag("mixable")
    ]
    tasks = {str(_task(each)) for each in trained}
    if len(kinds) > 1 or len(tasks) > 1:
        problems.append(
            f"{step.here}: the adapters are not of one kind: they are of {listed(kinds)}, trained "
            f"for {listed(sorted(tasks))}; mix those that are"
        )
    return problems


def _read_by(step: PlannedStep) -> tuple[str, ...]:
    """Return the adapters that an export names."""
    reads = step.flag("reads")
    return tuple(reads(step.config)) if reads is not None and step.config is not None else ()


def _unknown(step: PlannedStep, names: Sequence[str], so_far: _SoFar) -> list[str]:
    return [
        f"{step.here}: there is no adapter '{name}' by then{close_matches(name, so_far.adapters)}; "
        f"trained on this base so far: {listed(so_far.adapters) or 'none'}"
        for name in names
        if name not in so_far.adapters
    ]


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
