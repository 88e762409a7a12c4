"""Which plugins there are, by kind and name; a broken one stops only a run that asks for it."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import attrs
import pluggy

from tunesmith.errors import OptionError, PluginError, UnknownPluginError, close_matches, listed
from tunesmith.plugin import hookspecs
from tunesmith.plugin.options import structure
from tunesmith.plugin.spec import API_VERSION, KINDS, Spec
from tunesmith.recipe import Data, Step

__all__ = ["BUILTIN", "Broken", "Registered", "Registry", "registry"]

BUILTIN = "tunesmith"
"""Distribution whose plugins win a bare name."""

DISABLE_VARIABLE = "TUNESMITH_DISABLE_PLUGINS"

_CALLBACKS = ("tunesmith_check_plan", "tunesmith_on_event")


@attrs.frozen
class Registered:
    """A Spec with the distribution that brought it."""

    kind: str
    spec: Spec
    distribution: str
    version: str

    @property
    def key(self) -> str:
        """The name that always works: "distribution:name"."""
        return f"{self.distribution}:{self.spec.name}"

    @property
    def builtin(self) -> bool:
        """Whether it came with tunesmith."""
        return self.distribution == BUILTIN

    def structure(self, options: Mapping[str, Any]) -> Any:
        """Return a config instance from options; `OptionError` with every problem."""
        return structure(self.spec.config, options, name=self.spec.name)

    def structure_of(self, step: Step) -> Any:
        """Return the config instance of a step; `OptionError` with every problem.

        With them what its options need of its data, if no transform may yet provide for it.
        """
        problems: list[str] = []
        look = getattr(self.spec.config, "problems_without_evaluation", None)
        if look is not None and (step.source is None or not step.source.is_transformed):
            problems += [f"{self.spec.name}: {text}" for text in look(step.options)]
        try:
            config = self.structure(step.options)
        except OptionError as error:
            raise OptionError([*problems, *error.problems]) from error
        if problems:
            raise OptionError(problems)
        return config

    def load(self) -> type[Any]:
        """Import and return the implementation class; `PluginError` if it cannot be used."""
        if self.spec.api != API_VERSION:
            raise PluginError(
                f"'{self.key}' ({self.version}) was written for plugin API {self.spec.api}; this "
                f"tunesmith speaks API {API_VERSION}; upgrade it with "
                f"`pip install -U {self.distribution}`"
            )
        return self.spec.load()


@attrs.frozen
class Broken:
    """A plugin that failed to load, or a hook of it that failed."""

    entry: str
    """Its entry-point name."""
    distribution: str
    version: str
    problem: str
    """One line."""
    traceback: str


class Registry:
    """All plugins of this process.

    Built from entry points (or a given list of (name, distribution, version, loader), for tests).
    Nothing raises while building: what fails is kept in `broken`.
    """

    def __init__(
        self, entries: list[tuple[str, str, str, Callable[[], Any]]] | None = None
    ) -> None:
        self.manager = pluggy.PluginManager(hookspecs.GROUP)
        self.manager.add_hookspecs(hookspecs)
        self.broken: list[Broken] = []
        self.disabled: list[str] = []
        self._registered: list[Registered] = []
        self._distributions: dict[str, tuple[str, str]] = {}
        for name, distribution, version, loader in (
            entries if entries is not None else _installed_entries()
        ):
            self._add(name, distribution, version, loader)

    def __iter__(self) -> Iterator[Registered]:
        return iter(self._registered)

    def of_kind(self, kind: str) -> list[Registered]:
        """Return what is registered under a kind, the built-ins first."""
        mine = [item for item in self._registered if item.kind == kind]
        return sorted(mine, key=lambda item: (not item.builtin, item.spec.name))

    def find(self, kind: str, name: str) -> Registered:
        """Return the plugin of a kind by bare name or "distribution:name".

        Errors: `UnknownPluginError` with close matches and what is installed; `PluginError` if two
        strangers bear the name, or the distribution that was asked for is broken.
        """
        distribution, _, bare = name.rpartition(":")
        found = [
            item
            for item in self.of_kind(kind)
            if item.spec.name == bare
            and (not distribution or _canonical(item.distribution) == _canonical(distribution))
        ]
        if len(found) == 1 or (found and found[0].builtin):
            return found[0]
        noun = kind.removesuffix("s")
        if found:  # two strangers: neither may win by the accident of an order
            keys = " or ".join(f"'{item.key}'" for item in found)
            raise PluginError(
                f"{noun} '{name}' is claimed by {len(found)} plugins; say which: {keys}"
            )
        raise UnknownPluginError(self._unknown(kind, noun, name, distribution))

    def find_config(self, kind: str, config: type) -> Registered:
        """Return the plugin of a kind whose options are of this config class.

        Errors: `UnknownPluginError` if there is none; `PluginError` if several share the class, of
        which not exactly one is built in.
        """
        noun = kind.removesuffix("s")
        found = [item for item in self.of_kind(kind) if item.spec.config is config]
        builtin = [item for item in found if item.builtin]
        if len(found) == 1 or len(builtin) == 1:
            return found[0]
        if found:
            keys = " or ".join(f"'{item.key}'" for item in found)
            raise PluginError(
                f"{config.__qualname__} is the config class of {len(found)} {kind}; say by name "
                f"which: {keys}"
            )
        raise UnknownPluginError(
            f"{config.__module__}.{config.__qualname__} is not the config class of any installed "
            f"{noun}; installed: "
            f"{listed({item.spec.config.__name__ for item in self.of_kind(kind)})}"
        )

    def config_of(self, step: Step) -> tuple[Registered, Any]:
        """Return a step's plugin and its config instance; `PluginError` or `OptionError`."""
        item = self.find(step.kind, step.plugin)
        return item, item.structure_of(step)

    def check_data(self, data: Data) -> None:
        """Raise for a transform that is not installed, or that does not take its options."""
        for each in data.every_transform:
            self.find("transforms", each.plugin).structure(each.options)

    def build(self, step: Step) -> Any:
        """Return the implementation for a step, built with its config."""
        item, config = self.config_of(step)
        return item.load()(config)

    def each_hook(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Call a hook plugin by plugin; yield (distribution, result or the exception raised)."""
        for name, plugin in self.manager.list_name_plugin():
            if plugin is None:
                continue
            others = [p for _, p in self.manager.list_name_plugin() if p not in (None, plugin)]
            distribution = self._distributions[name][0]
            try:
                results = self.manager.subset_hook_caller(hook, others)(**arguments)
            except Exception as error:
                yield distribution, error
                continue
            for result in results:
                yield distribution, result

    def _add(self, name: str, distribution: str, version: str, loader: Callable[[], Any]) -> None:
        if not _disabled_names().isdisjoint({name, distribution, _canonical(distribution)}):
            self.disabled.append(name)
            return
        key = f"{distribution}:{name}"
        try:
            plugin = loader()
            self.manager.register(plugin, name=key)
        except (Exception, SystemExit) as error:
            # some releases of pluggy register before they validate: take the plugin out again
            if self.manager.has_plugin(key):
                self.manager.unregister(name=key)
            self._break(name, distribution, version, error)
            return
        self._distributions[key] = (distribution, version)
        for hook in self.manager.get_hookcallers(plugin) or ():
            # pluggy takes any hook name, and would never call a misspelt one
            if not hook.has_spec():
                known = [f"tunesmith_{kind}" for kind in KINDS] + list(_CALLBACKS)
                problem = f"no hook is called '{hook.name}'{close_matches(hook.name, known)}"
                self._break(name, distribution, version, PluginError(problem))
        for kind in KINDS:
            self._collect(kind, name, key, distribution, version)

    def _collect(self, kind: str, name: str, key: str, distribution: str, version: str) -> None:
        plugin = self.manager.get_plugin(key)
        others = [p for _, p in self.manager.list_name_plugin() if p not in (None, plugin)]
        try:
            results = self.manager.subset_hook_caller(f"tunesmith_{kind}", others)()
            specs = [spec for result in results for spec in result]
        except (Exception, SystemExit) as error:
            self._break(name, distribution, version, error)
            return
        for spec in specs:
            try:
                self._register(kind, spec, distribution, version)
            except PluginError as error:  # the others in the list are none the worse for it
                self._break(name, distribution, version, error)

    def _register(self, kind: str, spec: Any, distribution: str, version: str) -> None:
        if not isinstance(spec, Spec):
            raise PluginError(f"tunesmith_{kind} returned {spec!r}; expected tunesmith.plugin.Spec")
        mine = Registered(kind, spec, distribution, version)
        if any((item.kind, item.key) == (kind, mine.key) for item in self._registered):
            raise PluginError(
                f"{distribution} registers the {kind.removesuffix('s')} '{spec.name}' twice; its "
                "first one is kept"
            )
        self._registered.append(mine)

    def _break(self, name: str, distribution: str, version: str, error: BaseException) -> None:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
        text = "".join(traceback.format_exception(error))
        self.broken.append(Broken(name, distribution, version, problem, text))

    def _unknown(self, kind: str, noun: str, name: str, distribution: str) -> str:
        known = {item.spec.name for item in self.of_kind(kind)}
        near = close_matches(name.rpartition(":")[2], known)
        text = f"unknown {noun} '{name}'{near}; installed: {listed(known)}"
        broken = [
            item
            for item in self.broken
            if not distribution or _canonical(item.distribution) == _canonical(distribution)
        ]
        if broken:
            failures = "; ".join(
                f"{item.distribution} {item.version}: {item.problem}" for item in broken
            )
            text += f"; failed to load: {failures}; see `tunesmith plugins`"
        if self.disabled:
            text += f"; switched off by {DISABLE_VARIABLE}: {listed(self.disabled)}"
        return text


@cache
def registry() -> Registry:
    """Return this process's registry, built from entry points at the first call."""
    return Registry()


def _canonical(distribution: str) -> str:
    """Return a distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _disabled_names() -> set[str]:
    names = os.environ.get(DISABLE_VARIABLE, "").split(",")
    return {name.strip() for name in names if name.strip()}


def _installed_entries() -> list[tuple[str, str, str, Callable[[], Any]]]:
    """Return the installed entry points, the built-ins first, then by distribution name."""
    found: dict[tuple[str, str], tuple[str, str, str, Callable[[], Any]]] = {}
    for entry in entry_points(group=hookspecs.GROUP):
        # metadata that some tool left half removed has neither
        distribution = (entry.dist and entry.dist.name) or "unknown"
        version = (entry.dist and entry.dist.version) or "unknown"
        # an editable install can show the same distribution twice on sys.path
        found.setdefault(
            (distribution, entry.name), (entry.name, distribution, version, entry.load)
        )
    return sorted(found.values(), key=lambda row: (row[1] != BUILTIN, row[1], row[0]))
