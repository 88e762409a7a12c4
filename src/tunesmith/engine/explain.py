"""The plan as text: what `explain()` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from tunesmith.data.clean import Dropped
from tunesmith.engine.figures import short_time
from tunesmith.units import byte_size

__all__ = ["plan_text"]


def plan_text(plan: Any) -> str:
    """Return a plan as plain text, steps first, problems last."""
    lines = [f"model      {plan.recipe.model}" + (f"  ({plan.model.kind})" if plan.model else "")]
    if plan.shapes is not None:
        lines[0] += f", {plan.shapes.parameters / 1e6:,.0f} M parameters"
    if plan.device is not None:
        lines.append(
            f"device     {plan.device.name} ({plan.device.description}), {plan.device.precision}, "
            f"{byte_size(plan.device.memory_bytes)} memory"
        )
    lines.append(f"seed       {plan.recipe.seed}")
    lines.append("")
    for step in plan.steps:
        options = ", ".join(f"{key}={value!r}" for key, value in step.step.options.items())
        key = step.plugin.key if step.plugin is not None and not step.plugin.builtin else ""
        lines.append(
            f"{step.name}  {step.step.verb}"
            + (f" by {key}" if key else "")
            + (f"  {options}" if options else "")
        )
        if step.stored:
            lines.append(f"    stored   {step.stored}")
        lines += [
            f"    {'holds   ' if i == 0 else '        '} {text}"
            for i, text in enumerate(step.holds)
        ]
        if step.adapts:
            lines.append(f"    adapts   {step.adapts}")
        if step.data is not None:
            lines.append(
                f"    data     {step.data.description}: {step.data.rows} rows, "
                f"format {step.data.format}"
            )
            if step.data.dropped:
                reasons = ", ".join(
                    f"{count} {reason}" for reason, count in count_reasons(step.data.dropped)
                )
                lines.append(f"    left out {len(step.data.dropped)} rows: {reasons}")
            if step.data.held_out:
                lines.append(f"    held out {len(step.data.held_out)} of its rows")
        if step.eval_data is not None:
            lines.append(f"    held out {step.eval_data.description}: {step.eval_data.rows} rows")
        found = step.estimate
        if found is not None:
            lines.append(
                f"    trains   {found.trainable:,} parameters in {found.steps} steps over about "
                f"{found.tokens:,} tokens"
            )
            lines.append(
                f"    takes    about {byte_size(found.memory_bytes)} of memory (weights "
                f"{byte_size(found.weights_bytes)}, trained {byte_size(found.adapter_bytes)}, "
                f"activations {byte_size(found.activations_bytes)}) and {short_time(found.seconds)}"
            )
            lines += [
                f"    {'speed   ' if i == 0 else '        '} {text}"
                for i, text in enumerate(found.speed)
            ]
    for note in plan.notes:
        lines += ["", f"note: {note}"]
    if plan.problems:
        count = len(plan.problems)
        lines += ["", "1 problem:" if count == 1 else f"{count} problems:"]
        lines += [f"  {number}. {text}" for number, text in enumerate(plan.problems, 1)]
    else:
        lines += ["", "no problems found"]
    return "\n".join(lines)


def count_reasons(dropped: Iterable[Dropped]) -> list[tuple[str, int]]:
    """Return why rows were left out, and how many for each reason, the most frequent first."""
    return Counter(entry.reason for entry in dropped).most_common()
