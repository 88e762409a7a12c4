"""What `explain()` has read of files is not read again by `run()`: kept with the recipe it was for.

What is kept is used only while the files hold the same bytes, which are hashed each time; that
takes a small part of the time of reading them. Rows in memory, which anyone may change, and data
sets of a hub are read each time.
"""

from __future__ import annotations

import weakref
from typing import Any

from tunesmith.data.reading.files import files_of, is_path, is_paths
from tunesmith.data.sources import fingerprint
from tunesmith.engine.dataset import LoadedData, load_data
from tunesmith.plugin.registry import Registry
from tunesmith.recipe import Recipe

__all__ = ["Readings", "readings_for"]


class Readings:
    """Sources as they were read, for as long as the recipe lives that they were read for."""

    def __init__(self) -> None:
        self._kept: dict[Any, LoadedData] = {}
        self._registry: Registry | None = None

    def load(
        self, data: Any, format: str | None, registry: Registry, *options: Any, **more: Any
    ) -> LoadedData:
        """Return what `load_data` returns for a source, from an earlier call if it is the same."""
        if self._registry is not registry:  # other formats may have become known
            self._kept.clear()
            self._registry = registry
        if not (is_path(data) or is_paths(data)) or files_of(data) is None:
            return load_data(data, format, registry, *options, **more)
        key = (repr(data), format, repr(options), repr(more))
        kept = self._kept.get(key)
        if kept is None or kept.fingerprint != fingerprint(data):
            kept = self._kept[key] = load_data(data, format, registry, *options, **more)
        return kept


# attrs' objects with a dict in them have no hash, so they go by identity
_by_recipe: dict[int, Readings] = {}


def readings_for(recipe: Recipe, *, keep: bool) -> Readings:
    """Return what was read for a recipe; it is kept until the recipe is gone, or `keep` is false.

    A run passes `keep=False`: it holds its rows itself, and nobody is expected to read after it.
    """
    found = _by_recipe.get(id(recipe))
    if not keep:
        _by_recipe.pop(id(recipe), None)
    elif found is None:
        found = _by_recipe[id(recipe)] = Readings()
        weakref.finalize(recipe, _by_recipe.pop, id(recipe), None)
    return found or Readings()
