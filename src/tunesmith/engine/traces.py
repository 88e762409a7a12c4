"""What a run leaves in its directory when it is stopped before it has come to write anything."""

from __future__ import annotations

from pathlib import Path

import attrs

from tunesmith.engine.store import MARKER, RunStore
from tunesmith.errors import RecipeError
from tunesmith.recipe import Recipe

__all__ = ["leave_recipe", "recipe_text"]


def leave_recipe(recipe: Recipe, directory: Path) -> None:
    """Write the recipe into a run directory that holds none; what stands in one is left alone.

    Errors: `RunError` for a directory that is in use or holds something else.
    """
    with RunStore(directory) as store:
        if not (directory / MARKER).exists():
            store.write_recipe(recipe_text(recipe))


def recipe_text(recipe: Recipe) -> str:
    """Return the recipe as YAML; data that lives in this process only is named as such."""
    steps = []
    for step in recipe.steps:
        try:
            step.to_dict()
        except RecipeError:
            step = attrs.evolve(step, data=f"<{type(step.data).__name__} in memory>")
        steps.append(step)
    return attrs.evolve(recipe, steps=steps).to_yaml()
