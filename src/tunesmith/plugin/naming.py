"""How a plugin is written in a chain and in a recipe, for somebody who wrote its name alone."""

from __future__ import annotations

from collections.abc import Iterable

from tunesmith.errors import close_matches, listed
from tunesmith.plugin.registry import Registered, Registry, registry
from tunesmith.recipe import VERBS

__all__ = ["as_step", "no_such_verb"]

_IN_PYTHON = {
    "formats": 'give it beside the data: .sft(data, format="{0}")',
    "transforms": 'write it behind the data: Data(source).transform("{0}")',
    "rewards": 'give it to a trainer or a metric that takes rewards: rewards="{0}"',
}
_IN_A_FILE = {
    "formats": "write 'format: {0}' beside the data of a step",
    "transforms": "write '- transform: {0}' among the transforms of a step's data",
    "rewards": "write 'rewards: {0}' beside a step that takes rewards",
}
"""How what is no step is had, "{0}" standing for its name."""


def no_such_verb(name: str, verbs: Iterable[str], found: Registry | None = None) -> str:
    """Return what is said of a method that a Tuner does not have; `verbs` are those it has."""
    verbs = list(verbs)
    plugins = [item for item in found or registry() if item.spec.name == name]
    if plugins:
        ways = " or ".join(dict.fromkeys(_in_python(item) for item in plugins))
        return f"a Tuner has no .{name}(); '{name}' is {_kinds(plugins)}: {ways}"
    names = [*verbs, *(item.spec.name for item in found or registry() if item.kind in _STEPS)]
    near = close_matches(name, dict.fromkeys(names))
    return (
        f"a Tuner has no .{name}(), and no plugin of that name is installed{near}; its verbs are: "
        f"{listed(verbs)}; a plugin that is installed is had by its name, as in "
        '.train("name", data), and `tunesmith plugins` lists them'
    )


def as_step(keys: Iterable[str], found: Registry | None = None) -> str:
    """Return how to write a step of a recipe whose keys name a plugin and no verb, or nothing."""
    for key in keys:
        bare = key.rpartition(":")[2]
        plugins = [item for item in found or registry() if key in (item.spec.name, item.key)]
        if plugins:
            ways = " or ".join(dict.fromkeys(_in_a_file(item, key) for item in plugins))
            return f"'{bare}' is {_kinds(plugins)} and no verb: {ways}"
    return ""


_STEPS = {row.kind: verb for verb, row in VERBS.items() if row.kind}


def _in_python(item: Registered) -> str:
    name = item.spec.name
    if item.kind not in _STEPS:
        return _IN_PYTHON[item.kind].format(name)
    verb = _STEPS[item.kind]
    return f'write .{verb}("{name}"{", data" if VERBS[verb].takes_data else ""})'


def _in_a_file(item: Registered, name: str) -> str:
    if item.kind not in _STEPS:
        return _IN_A_FILE[item.kind].format(name)
    verb = _STEPS[item.kind]
    data = "'data: …' and " if VERBS[verb].takes_data else ""
    return f"write '{verb}: {name}', with {data}its options as keys beside it"


def _kinds(plugins: Iterable[Registered]) -> str:
    nouns = dict.fromkeys(item.kind.removesuffix("s") for item in plugins)
    return " and ".join(f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" for noun in nouns)
