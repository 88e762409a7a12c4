"""The plan as text: what `explain()` prints, in lines that fit a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tunesmith.data.clean import Dropped
from tunesmith.engine.figures import short_time
from tunesmith.plugin.options import plain_options
from tunesmith.units import byte_size

if TYPE_CHECKING:
    from tunesmith.engine.estimate import Estimate
    from tunesmith.engine.plan import Plan, PlannedStep

__all__ = ["decided", "facts_of", "plan_text"]

COLUMNS = 80
_NAME = 11
"""Columns up to what a line says, after the name of it."""


def plan_text(plan: Plan) -> str:
    """Return a plan as plain text, steps first, problems last."""
    lines: list[str] = []
    for name, text in facts_of(plan):
        lines += _wrapped(name, text)
    lines.append("")
    for step in plan.steps:
        lines += _filled(f"{step.name}  {_verb(step)}", _options(step.step.options))
        said = ""
        for name, text in facts_of_step(step):
            # what is said of one thing in several lines is named once
            lines += _wrapped("" if name == said else name, text, indent=4)
            said = name
    for note in plan.notes:
        lines += ["", *textwrap.wrap(f"note: {note}", COLUMNS, **_BY_WORDS)]
    if plan.problems:
        count = len(plan.problems)
        lines += ["", "1 problem:" if count == 1 else f"{count} problems:"]
        lines += [f"  {number}. {text}" for number, text in enumerate(plan.problems, 1)]
    else:
        lines += ["", "no problems found"]
    return "\n".join(lines)


def facts_of(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield what holds for the whole of a plan: (name, text)."""
    kind = f"  ({plan.model.kind})" if plan.model else ""
    size = f", {plan.shapes.parameters / 1e6:,.0f} M parameters" if plan.shapes else ""
    yield "model", f"{plan.recipe.model}{kind}{size}"
    device = plan.device
    if device is not None:
        yield (
            "device",
            f"{device.name} ({device.description}), {device.precision}, "
            f"{byte_size(device.memory_bytes)} memory",
        )
    yield "seed", str(plan.recipe.seed)


def facts_of_step(step: PlannedStep) -> Iterator[tuple[str, str]]:
    """Yield what is known of a step beside its options: (name, text), some names several times."""
    if late := decided(step):
        yield "decided", _options(late)
    if step.stored:
        yield "stored", step.stored
    for text in step.holds:
        yield "holds", text
    if step.adapts:
        yield "adapts", step.adapts
    if step.data is not None:
        yield (
            "data",
            f"{step.data.description}: {step.data.rows} rows, format {step.data.format}",
        )
        if step.data.dropped:
            reasons = ", ".join(
                f"{count} {reason}" for reason, count in count_reasons(step.data.dropped)
            )
            yield "left out", f"{len(step.data.dropped)} rows: {reasons}"
        if step.data.held_out:
            yield "held out", f"{len(step.data.held_out)} of its rows"
    if step.eval_data is not None:
        yield "held out", f"{step.eval_data.description}: {step.eval_data.rows} rows"
    if step.estimate is not None:
        yield from _predicted(step, step.estimate)


def decided(step: PlannedStep) -> Mapping[str, Any]:
    """Return the options that are left out of a step and decided late, as they will act.

    What is said in other words beside them is left out: the batch of an update, what is adapted.
    """
    if step.config is None:
        return {}
    given = plain_options(step.config)
    told = {"effective_batch_size", *(["targets"] if step.adapts else [])}
    if step.effective.get("save_strategy") == "no":
        told.add("save_strategy")
    return {
        name: value
        for name, value in step.effective.items()
        if given.get(name) != value and name not in told
    }


def count_reasons(dropped: Iterable[Dropped]) -> list[tuple[str, int]]:
    """Return why rows were left out, and how many for each reason, the most frequent first."""
    return Counter(entry.reason for entry in dropped).most_common()


def _predicted(step: PlannedStep, found: Estimate) -> Iterator[tuple[str, str]]:
    config = step.config
    processes = found.rows // (config.batch_size * config.gradient_accumulation)
    batch = f"{config.batch_size} x {config.gradient_accumulation}"
    if processes > 1:
        batch += f" in each of {processes} processes"
    yield (
        "trains",
        f"{found.trainable:,} parameters in {found.steps:,} steps of {found.rows} rows ({batch}), "
        f"over about {found.tokens:,} tokens",
    )
    each = " in each process" if processes > 1 else ""
    yield (
        "takes",
        f"about {byte_size(found.memory_bytes)} of memory{each} beyond Python and its libraries "
        f"(weights {byte_size(found.weights_bytes)}, trained {byte_size(found.adapter_bytes)}, "
        f"activations {byte_size(found.activations_bytes)}) and {short_time(found.seconds)}",
    )
    for piece in found.speed:
        if not piece.fast:
            remedy = f"; faster with {piece.remedy}" if piece.remedy else ""
            yield "slower", f"{piece.text}{remedy}"


def _verb(step: PlannedStep) -> str:
    key = step.plugin.key if step.plugin is not None and not step.plugin.builtin else ""
    return f"{step.step.verb} by {key}" if key else step.step.verb


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_value(value)}" for name, value in options.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return f"({', '.join(value)})"
    return repr(value)


_BY_WORDS: dict[str, Any] = {
    "break_long_words": False,
    "break_on_hyphens": False,
    "subsequent_indent": "  ",
}


def _wrapped(name: str, text: str, *, indent: int = 0) -> list[str]:
    """Return a line that begins with a name, as many as it takes."""
    blank = " " * indent
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=blank + name.ljust(_NAME - (2 if indent else 0)),
        subsequent_indent=blank + " " * (_NAME - (2 if indent else 0)),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _filled(head: str, options: str) -> list[str]:
    return textwrap.wrap(
        f"{head}  {options}".rstrip(),
        COLUMNS,
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )
