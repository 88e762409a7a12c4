"""Recipe files: read with the paths in them taken from the file's own directory, and written so.

In memory a relative path is one from the working directory, as everywhere in Python; in a file it
is one from the file's directory, so that a recipe can be run from anywhere, and moved together with
what it names. What could be a hub's id ("owner/name") is a path if there is such a file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeAlias

import attrs

from tunesmith.data.reading.files import is_hub_id
from tunesmith.errors import PluginError, RecipeError
from tunesmith.plugin.naming import as_step
from tunesmith.plugin.options import PATHS
from tunesmith.plugin.recipe_changes import Place, changed
from tunesmith.plugin.registry import registry
from tunesmith.recipe import Data, Recipe, Step
from tunesmith.recipe_text import is_recipe_text, parse_recipe, recipe_text

__all__ = ["is_model_path", "read_recipe", "with_absolute_paths", "with_paths_from"]

Move: TypeAlias = Callable[[str, str], str]
"""Path, and what kind it is of, to what shall stand in its place."""


def read_recipe(
    source: str | Path,
    *,
    changes: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> Recipe:
    """Return the recipe of a file, or of its text, as it is meant in the working directory.

    `changes` are those of `--set`, and paths in them are what they are on the command line;
    `variables` are the environment's unless given. Errors: `RecipeError` with every problem.
    """
    known = os.environ if variables is None else variables
    text, where = recipe_text(source)
    row, places = changed(parse_recipe(text, where, known), changes, known)
    recipe = Recipe.from_dict(row, where=where, advise=as_step)
    if is_recipe_text(source):
        return recipe
    home = Path(source).parent
    if _same(home, Path()):
        return recipe
    problems: list[str] = []

    def move(path: str, kind: str) -> str:
        try:
            return _from_file(path, kind, home, where)
        except RecipeError as error:
            problems.append(str(error))
            return path

    moved = _relocated(recipe, move, places)
    if problems:
        raise RecipeError("\n".join(problems))
    return moved


def with_paths_from(recipe: Recipe, directory: Path) -> Recipe:
    """Return a recipe as it has to be written into a file of a directory."""
    if _same(directory, Path()):
        return recipe
    here = os.path.realpath(directory)

    def move(path: str, kind: str) -> str:
        if _is_fixed(path) or not _is_local(path, kind, Path()):
            return path
        return _marked(os.path.relpath(_absolute(path, Path()), here), kind, directory)

    return _relocated(recipe, move)


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """Return a recipe that means the same wherever it lies: what a run directory keeps."""

    def move(path: str, kind: str) -> str:
        local = not _is_fixed(path) and _is_local(path, kind, Path())
        return _absolute(path, Path()) if local else path

    return _relocated(recipe, move)


def is_model_path(name: str) -> bool:
    """Return whether a model that is not there can be nothing but a path: no hub has such ids."""
    return name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1


def _from_file(path: str, kind: str, home: Path, where: str) -> str:
    """Return a path of a recipe's file as one from the working directory."""
    if _is_fixed(path) or (kind == "template" and not _is_local(path, kind, home)):
        return path
    if _exists(Path(path), kind) and not _exists(home / path, kind):
        better = os.path.relpath(_absolute(path, Path()), os.path.realpath(home))
        raise RecipeError(
            f"{where}: '{path}' lies in the working directory and not beside the recipe; a path in "
            f"a recipe is one from its own directory: write '{better}', or the whole path"
        )
    if not _is_local(path, kind, home):
        return path
    found, working = _absolute(path, home), os.path.realpath(os.curdir)
    if os.path.commonpath([found, working]) == working:
        found = os.path.relpath(found, working)
    return _marked(found, kind, Path())


def _relocated(recipe: Recipe, move: Move, leave: frozenset[Place] = frozenset()) -> Recipe:
    """Return a recipe with its paths moved, but for those of some places."""

    def moved(number: int, key: str, value: Any, kind: str) -> Any:
        return value if (number, key) in leave else _moved(value, kind, move)

    steps = []
    for number, step in enumerate(recipe.steps, 1):
        options = {
            key: moved(number, key, step.options[key], kind)
            for key, kind in _path_options(step).items()
            if key in step.options
        }
        data = step.data
        if not step.reads_held_out:
            data = moved(number, "data", data, "data")
        steps.append(attrs.evolve(step, data=data, options={**step.options, **options}))
    return attrs.evolve(
        recipe,
        model=moved(0, "model", recipe.model, "model"),
        chat_template=moved(0, "chat_template", recipe.chat_template, "template"),
        steps=steps,
    )


def _moved(value: Any, kind: str, move: Move) -> Any:
    """Return paths moved, one, several or those of a `Data`; anything else is left as it is."""
    if isinstance(value, Data):
        return value.with_sources(lambda data: _moved(data, kind, move))
    if isinstance(value, (str, os.PathLike)):
        return move(os.fsdecode(value), kind) if os.fsdecode(value) else value
    if isinstance(value, (list, tuple)) and all(isinstance(v, (str, os.PathLike)) for v in value):
        return [move(os.fsdecode(each), kind) for each in value]
    return value


def _path_options(step: Step) -> Mapping[str, str]:
    """Return the options of a step that hold paths, with the kind of each."""
    if not step.kind:
        return {}
    try:
        config = registry().find(step.kind, step.plugin).spec.config
    except PluginError:  # the plan tells
        return {}
    return {
        field.name: field.metadata[PATHS]
        for field in attrs.fields(config)
        if PATHS in field.metadata
    }


def _is_fixed(path: str) -> bool:
    """Whether a path means the same in every directory."""
    return PurePath(path).is_absolute() or path.startswith("~")


def _is_local(path: str, kind: str, home: Path) -> bool:
    """Whether what stands in the place of a path is one, read from a directory."""
    if kind == "template":
        return path.endswith(".jinja") and "{%" not in path and "{{" not in path
    if kind == "model":
        return is_model_path(path) or _exists(home / path, kind)
    if kind == "data":
        return not is_hub_id(path) or _exists(home / path, kind)
    return True


def _exists(path: Path, kind: str) -> bool:
    """Whether there is such a file; of a data set on disk a split may be named behind it."""
    try:
        bare = str(path).rpartition(":")[0] if kind == "data" else ""
        return path.exists() or bool(bare and Path(bare, "dataset_dict.json").is_file())
    except (OSError, ValueError):
        return False


def _absolute(path: str, home: Path) -> str:
    """Return a path in full; dots in front are taken off, others may lie behind a link."""
    place, parts = os.path.realpath(home), list(PurePath(path).parts)
    while parts and parts[0] in (os.curdir, os.pardir):
        place = os.path.dirname(place) if parts.pop(0) == os.pardir else place
    return os.path.join(place, *parts)


def _marked(path: str, kind: str, home: Path) -> str:
    """Return a path that is not taken for anything else, where it is read from a directory."""
    return path if _is_local(path, kind, home) else os.path.join(os.curdir, path)


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
