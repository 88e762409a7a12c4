"""Changes to a recipe from the command line: `--set sft.learning_rate=1e-4`, `--set seed=1`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import attrs

from tunesmith.errors import RecipeError, close_matches
from tunesmith.other_names import unknown_setting
from tunesmith.recipe import VERBS, Recipe, Step
from tunesmith.recipe_text import parse_recipe

__all__ = ["Place", "changed"]

Place: TypeAlias = tuple[int, str]
"""Number of a step, from 1, and a key of it; 0 and a key for a setting of the whole run."""

SETTINGS = tuple(field.name for field in attrs.fields(Recipe) if field.name != "steps")


def changed(
    row: Any, changes: Sequence[str], variables: Mapping[str, str]
) -> tuple[Any, frozenset[Place]]:
    """Return a recipe's mapping with changes made to it, each "target=value", and where they are.

    A target is a setting, or a step and a key of it: "sft.learning_rate", "3.learning_rate" or
    "03-sft.learning_rate". A value is read as YAML, as one in a recipe is. Errors: `RecipeError`
    with every change that cannot be made, and the nearest names.
    """
    if not changes or not isinstance(row, Mapping):
        return row, frozenset()
    made = dict(row)
    steps = row.get("steps")
    rows = list(steps) if isinstance(steps, Sequence) and not isinstance(steps, str) else []
    problems: list[str] = []
    places: set[Place] = set()
    for change in changes:
        try:
            target, value = _read(change, variables)
            place = _place(target, rows)
            if place in places:
                raise RecipeError(f"'{target}' is set twice; keep one of them")
        except RecipeError as error:
            problems.append(f"--set {change[:100]}: {error}")
            continue
        places.add(place)
        number, key = place
        if number:
            rows[number - 1] = _with(rows[number - 1], key, value)
        else:
            made[key] = value
    if problems:
        raise RecipeError("\n".join(problems))
    if rows:
        made["steps"] = rows
    return made, frozenset(places)


def _read(change: str, variables: Mapping[str, str]) -> tuple[str, Any]:
    target, equals, text = change.partition("=")
    if not equals or not target.strip():
        raise RecipeError("expected a target and a value, such as sft.learning_rate=1e-4")
    return target.strip(), parse_recipe(text, "the value", variables)


def _place(target: str, rows: Sequence[Any]) -> Place:
    """Return what a target means. Errors: `RecipeError`, with the nearest names."""
    name, dot, key = target.rpartition(".")
    if not dot:
        if target in SETTINGS:
            return 0, target
        raise RecipeError(
            f"{unknown_setting(target, SETTINGS)}; the settings are: {', '.join(SETTINGS)}; an "
            "option of a step is set by the step's name or number, as in sft.learning_rate or "
            "3.learning_rate"
        )
    labels = {number: _label(row) for number, row in enumerate(rows, 1)}
    names = {number: f"{number:02d}-{label}" for number, label in labels.items()}
    found = [
        number for number, label in labels.items() if name in (label, names[number], str(number))
    ]
    if len(found) == 1:
        return found[0], key
    if found:
        numbers = " or ".join(f"{number}.{key}" for number in found)
        raise RecipeError(
            f"there are {len(found)} steps '{name}'; say which by its number: {numbers}"
        )
    near = close_matches(name, dict.fromkeys(labels.values()))
    raise RecipeError(
        f"there is no step '{name}'{near}; the steps are: {', '.join(names.values()) or 'none'}; a "
        "target is a step and one of its keys, whose whole value is given"
    )


def _label(row: Any) -> str:
    """Return the label of a step's mapping; one that is no step has none."""
    verbs = [key for key in row if key in VERBS] if isinstance(row, Mapping) else []
    try:
        return Step(verbs[0], row[verbs[0]]).label if verbs else ""
    except RecipeError:
        return ""


def _with(row: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a step's mapping with a key set, where it stands already or beside the others."""
    inner = row.get("with")
    if isinstance(inner, Mapping) and key in inner:
        return {**row, "with": {**inner, key: value}}
    return {**row, key: value}
