"""Write src/tunesmith/verbs.py: the typed verbs, from the built-in plugins' config classes.

Run `python tools/write_verbs.py` after changing a built-in's options; a test fails until it is
done. `--check` only says whether the file is up to date.
"""

from __future__ import annotations

import sys
import textwrap
import typing
from pathlib import Path

import attrs

from tunesmith.plugin.options import field_docs
from tunesmith.plugin.registry import BUILTIN, Registered, registry
from tunesmith.plugin.rewards import Rewards
from tunesmith.recipe import VERBS

TARGET = Path(__file__).parents[1] / "src" / "tunesmith" / "verbs.py"

KINDS = {"methods": "peft", "trainers": "train", "exporters": "export"}

HEAD = '''"""Typed verbs for the built-in plugins, by tools/write_verbs.py: do not edit by hand.

Each method is `.peft`, `.train` or `.export` with the plugin named, and every option of its config
class spelled out for the editor and the type checker. What is not given is not in the recipe.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, ParamSpec, Self, TypeVar, cast

from tunesmith.errors import OptionError, close_matches
from tunesmith.recipe import VERBS

__all__ = ["Verbs"]

P = ParamSpec("P")
R = TypeVar("R")


def _sugar(verb: str, plugin: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a method append the step that its signature describes, with only what was given."""

    def decorate(declared: Callable[P, R]) -> Callable[P, R]:
        known = list(inspect.signature(declared).parameters)[1:]
        names = VERBS[verb].named

        @functools.wraps(declared)
        def append(self: Any, *args: Any, **options: Any) -> Any:
            if not options and args and not isinstance(args[0], str) and "data" not in known:
                return self._with(verb, args[0], {})
            positional = [name for name in known if name == "data"]
            if len(args) > len(positional):
                raise OptionError([f".{plugin}() takes its options by name, such as {known[-1]}=…"])
            options |= dict(zip(positional, args, strict=False))
            unknown = [
                f"unknown option '{key}' for {plugin}{close_matches(key, known)}"
                for key in options
                if key not in known
            ]
            if unknown:
                raise OptionError(unknown)
            if "data" in known and "data" not in options:
                raise OptionError([f".{plugin}() needs data: a file, a hub id or rows"])
            data, format_name = options.pop("data", None), options.pop("format", None)
            name = options.pop("name", None) if names else None
            return self._with(verb, plugin, options, data, format_name, name)

        return cast("Callable[P, R]", append)

    return decorate


class Verbs:
    """The generated part of `Tuner`."""

    __slots__ = ()

    SUGAR: ClassVar[dict[tuple[str, str], str]] = {
%(sugar)s    }
    """(verb, plugin) to the method that stands for it."""

    def _with(
        self,
        verb: str,
        plugin: str | Any,
        options: dict[str, Any],
        data: Any = None,
        format: str | None = None,
        name: str | None = None,
    ) -> Self:
        raise NotImplementedError
'''


def type_text(hint: object) -> str:
    """Return a type as it is written in a signature."""
    if hint == Rewards:  # any of its short forms
        return "Any"
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return str(hint).replace("NoneType", "None").replace("collections.abc.", "")


def method_text(item: Registered) -> str:
    """Return one method as source."""
    verb = KINDS[item.kind]
    spec = item.spec
    fields = attrs.fields(attrs.resolve_types(spec.config))
    docs = field_docs(spec.config)
    parameters = ["self"]
    if verb == "train":
        parameters += ["data: Any", "*", "format: str | None = None"]
    elif fields:
        parameters.append("*")
    if names := VERBS[verb].named and (verb != "export" or item.load().makes_adapter):
        parameters.append("name: str | None = None")
    for field in fields:
        default = "" if field.default is attrs.NOTHING else f" = {literal(field.default)}"
        parameters.append(f"{field.name}: {type_text(field.type)}{default}")
    lines = [f'    @_sugar("{verb}", "{spec.name}")', f"    def {spec.name}("]
    lines += [f"        {parameter}," for parameter in parameters]
    lines += ["    ) -> Self:"]
    title = spec.summary[:1].upper() + spec.summary[1:]
    lines += [f'        """{title}.', ""]
    if verb == "train":
        lines += [
            "        data: path or paths, hub id, `datasets.Dataset`, list of dicts, or a `Data`,",
            "            which says what is mixed and what is done with the rows first.",
        ]
        lines.append("        format: name of the data format; unset detects it from the rows.")
    if names:
        lines.append("        name: What the adapter is called; unset, by the step that makes it.")
    for name, text in docs.items():
        wrapped = textwrap.fill(f"{name}: {' '.join(text.split())}", 92, subsequent_indent="    ")
        lines += textwrap.indent(wrapped, " " * 8).splitlines()
    lines += ['        """', "        return self  # a declaration; the decorator appends the step"]
    return "\n".join(lines) + "\n"


def literal(value: object) -> str:
    """Return a default value as source."""
    return f'"{value}"' if isinstance(value, str) else repr(value)


def source() -> str:
    """Return the whole file."""
    items = [
        item for kind in KINDS for item in registry().of_kind(kind) if item.distribution == BUILTIN
    ]
    sugar = "".join(
        f'        ("{KINDS[item.kind]}", "{item.spec.name}"): "{item.spec.name}",\n'
        for item in items
    )
    return HEAD % {"sugar": sugar} + "".join("\n" + method_text(item) for item in items)


def main() -> int:
    """Write the file, or with --check compare it."""
    text = source()
    if "--check" in sys.argv:
        if TARGET.read_text(encoding="utf-8") == text:
            return 0
        print("src/tunesmith/verbs.py is out of date; run: python tools/write_verbs.py")
        return 1
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
