"""What a run leaves in its directory when it is stopped before it has come to write anything."""

from __future__ import annotations

from pathlib import Path

import attrs

from tunesmith.engine.store import MARKER, RunStore
from tunesmith.errors import RecipeError
from tunesmith.plugin.recipe_files import with_absolute_paths
from tunesmith.recipe import Recipe, Step, plain

__all__ = ["leave_recipe", "recipe_text", "writable"]


def leave_recipe(recipe: Recipe, directory: Path) -> None:
    """Write the recipe into a run directory that holds none; what stands in one is left alone.

    Errors: `RunError` for a directory that is in use or holds something else.
    """
    with RunStore(directory) as store:
        if not (directory / MARKER).exists():
            store.write_recipe(recipe_text(recipe))


def recipe_text(recipe: Recipe) -> str:
    """Return the recipe as YAML; see `writable`."""
    return writable(recipe).to_yaml()


def writable(recipe: Recipe) -> Recipe:
    """Return a recipe that a file can hold and that means the same wherever the file lies.

    Paths are whole ones, and what lives in this process only is named as such.
    """
    if not isinstance(recipe.model, str):
        recipe = attrs.evolve(recipe, model=f"<{recipe.model}>")
    recipe = with_absolute_paths(recipe)
    return attrs.evolve(recipe, steps=[_writable(step) for step in recipe.steps])


def _writable(step: Step) -> Step:
    try:
        attrs.evolve(step, options={}).to_dict()
    except RecipeError:
        step = attrs.evolve(step, data=f"<{type(step.data).__name__} in memory>")
    options = dict(step.options)
    for key, value in options.items():
        try:
            plain(value)
        except RecipeError as error:
            options[key] = f"<{error}>"
    return attrs.evolve(step, options=options)
