"""What a plan's steps come to: each step's options as they will act, said by its plugin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from tunesmith.engine.order import methods_at
from tunesmith.engine.quiet import quiet_libraries
from tunesmith.engine.world import current as current_world
from tunesmith.plugin.conditions import Conditions
from tunesmith.plugin.options import plain_options

if TYPE_CHECKING:
    from tunesmith.engine.device import Device
    from tunesmith.engine.plan import PlannedStep

__all__ = ["conditions_of", "setup_before", "with_effects"]


def conditions_of(
    device: Device, seed: int, model: Any = None, *, trains_base: bool = False
) -> Conditions:
    """Return the conditions on a device, in as many processes as there are."""
    return Conditions(
        device=device.name.partition(":")[0],
        precision=device.precision,
        seed=seed,
        processes=current_world().size,
        trains_base=trains_base,
        model=model,
    )


def with_effects(
    steps: Sequence[PlannedStep],
    conditions: Conditions,
    build: Callable[[PlannedStep], Any],
    notes: list[str],
) -> tuple[PlannedStep, ...]:
    """Return the steps with their options as they will act.

    `build` returns a step's implementation, or None where it cannot be loaded. A plugin that fails
    to answer is named in `notes`, and its options stand as they are.
    """
    methods = methods_at(steps)
    done: list[PlannedStep] = []
    for step in steps:
        if step.plugin is None or step.config is None:
            done.append(step)
            continue
        method = methods[step.number]
        own = attrs.evolve(
            conditions, trains_base=method is None or bool(method.flag("trains_base"))
        )
        try:
            with quiet_libraries():
                plugin = build(step)
                found = dict(plugin.effective(own)) if plugin is not None else {}
        except Exception as error:
            notes.append(
                f"{step.name}: its options are told as they were given, for "
                f"'{step.step.plugin}' failed to say how they will act: "
                f"{type(error).__name__}: {error}"
            )
            found = plain_options(step.config)
        done.append(attrs.evolve(step, effective=found))
    return tuple(done)


def setup_before(
    steps: Sequence[PlannedStep], step: PlannedStep
) -> Mapping[str, Mapping[str, Any]]:
    """Return what was said of the model by the time of a step: plugins and options, by step name.

    Those are the steps that leave no stage of their own, since the last model that a run went on
    from.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for each in steps:
        if each.number >= step.number:
            break
        if each.flag("makes_model"):
            found.clear()
        elif not each.verb.leaves_stage and each.plugin is not None:
            found[each.name] = {"plugin": each.plugin.key, "options": dict(each.effective)}
    return found
