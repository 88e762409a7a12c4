"""What a run is resolved to, and a hash for each step over all that its outcome depends on."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import attrs

from tunesmith.data.chat_template import template_source
from tunesmith.engine.models import describe_model
from tunesmith.engine.plan import Plan, PlannedStep
from tunesmith.engine.traces import writable
from tunesmith.engine.world import current
from tunesmith.plugin.options import plain_options
from tunesmith.plugin.session import RunRecord
from tunesmith.recipe import VERBS, Recipe

__all__ = ["fingerprints", "lock_of", "record_of"]

VERSIONED = ("tunesmith", "torch", "transformers", "peft", "accelerate", "tokenizers")
"""Packages whose version decides whether a finished stage is still what would be made today."""

NEUTRAL_OPTIONS = frozenset(
    {"loggers", "logging_steps", "save_steps", "save_strategy", "save_total_limit", "eval_data"}
)
"""Options that say how a stage is watched and not what it makes, or by which path data is read
whose content is hashed."""


def lock_of(plan: Plan, base: Path) -> dict[str, Any]:
    """Return what decides the outcome of a run, as lock.json keeps it."""
    assert plan.device is not None
    versions = {name: _version(name) for name in VERSIONED}
    plugins = {}
    for step in plan.steps:
        if step.plugin is not None:
            plugins[step.plugin.key] = step.plugin.version
            versions |= {name: _version(name) for name in step.plugin.spec.requires}
    # as many times the rows in a step
    several = {"processes": current().size} if current().several else {}
    return {
        **several,
        "versions": versions,
        "python": platform.python_version(),
        "platform": sys.platform,
        "device": plan.device.name,
        "precision": plan.device.precision,
        "model": describe_model(base, plan.recipe),
        "plugins": plugins,
        "data": {
            step.name: {
                "description": step.data.description,
                "format": step.data.format,
                "rows": step.data.rows,
                "sha256": step.data.fingerprint,
            }
            for step in plan.steps
            if step.data is not None
        },
    }


def record_of(
    recipe: Recipe, steps: Sequence[PlannedStep], lock: Mapping[str, Any], number: int
) -> RunRecord:
    """Return what a run is up to its step of a number: what comes after it has no say.

    `recipe` is one that can be written, `lock` that of the whole run.
    """
    so_far = [step for step in steps if step.number <= number]
    registered = [step.plugin for step in so_far if step.plugin is not None]
    packages = {*VERSIONED, *(name for each in registered for name in each.spec.requires)}
    keys = {"versions": packages, "plugins": {each.key for each in registered}}
    keys["data"] = {step.name for step in so_far}
    keys["fingerprints"] = {step.name for step in so_far if step.number < number}
    kept = {
        part: {name: held for name, held in lock.get(part, {}).items() if name in wanted}
        for part, wanted in keys.items()
    }
    shorter = attrs.evolve(recipe, steps=recipe.steps[:number])
    return RunRecord(shorter.to_dict(), {**lock, **kept})


def fingerprints(plan: Plan, lock: Mapping[str, Any]) -> dict[int, str]:
    """Return a hash for each step's number, over all that its outcome depends on.

    Earlier steps are among that, but for those that what follows does not depend on.
    """
    recipe = plan.recipe
    chain = _digest(
        {key: lock[key] for key in ("versions", "device", "precision")}
        | {
            "model": lock["model"]["sha256"],
            "code": lock["model"]["code"],
            "seed": recipe.seed,
            "template": template_source(recipe.chat_template),
        }
        | {key: lock[key] for key in ("processes",) if key in lock}
    )
    found: dict[int, str] = {}
    for step in plan.steps:
        options = {
            key: value
            for key, value in plain_options(step.config).items()
            if key not in NEUTRAL_OPTIONS
        }
        own: dict[str, Any] = {
            "verb": step.step.verb,
            "plugin": step.plugin.key if step.plugin is not None else step.step.plugin,
            "version": step.plugin.version if step.plugin is not None else "",
            "options": options,
            "data": step.data.fingerprint if step.data else None,
            "format": step.data.format if step.data else None,
            "eval_data": step.eval_data.fingerprint if step.eval_data else None,
        }
        if step.step.name is not None:
            own["name"] = step.step.name
        if step.rewards:
            own["rewards"] = step.rewards
        if step.flag("reads_run"):
            made = {each.name: found[each.number] for each in plan.steps if each.number in found}
            record = record_of(
                writable(recipe), plan.steps, {**lock, "fingerprints": made}, step.number
            )
            own["run"] = attrs.asdict(record)
        found[step.number] = _digest({"before": chain, **own})
        if VERBS[step.step.verb].is_link:
            chain = found[step.number]
    return found


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
