"""Write src/tunesmith/verbs.py: the typed verbs, from the built-in plugins' config classes.

Run `python tools/write_verbs.py` after changing a built-in's options; a test fails until it is
done. `--check` only says whether the file is up to date. What the verbs do is not written but
stands in src/tunesmith/sugar.py.
"""

from __future__ import annotations

import sys
import textwrap
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from tunesmith.plugin.options import field_docs
from tunesmith.plugin.registry import BUILTIN, Registered, registry
from tunesmith.plugin.rewards import Rewards
from tunesmith.recipe import VERBS

TARGET = Path(__file__).parents[1] / "src" / "tunesmith" / "verbs.py"

KINDS = {row.kind: verb for verb, row in VERBS.items() if verb in ("peft", "train", "export")}
"""Kinds whose built-ins have verbs of their own, with the verb that they are short for."""

STEP_KEYS = {
    "data: Any": """data: path or paths, hub id, `datasets.Dataset`, list of dicts, or a `Data`,
    which says what is mixed and what is done with the rows first.""",
    "format: str | None = None": "format: name of the data format; unset detects it from the rows.",
    "name: str | None = None": "name: what the adapter is called; unset, the step that makes it.",
}
"""Parameters that are no options of a plugin, and what is said of them."""


def text(items: Iterable[Registered]) -> str:
    """Return the whole file."""
    items = list(items)
    shared: dict[str, type] = {}
    for item in items:
        base = shared_base(item)
        if base is not None:
            shared[options_name(base)] = base
    dicts = "".join(map(typed_dict, shared.values()))
    return HEAD + dicts + CLASS + "".join("\n" + method(item) for item in items)


HEAD = '''\
"""Typed verbs for the built-in plugins, by tools/write_verbs.py: do not edit by hand.

Each method is `.peft`, `.train` or `.export` with the plugin named, and its options spelled out for
the editor and the type checker. What is not given is not in the recipe.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Self, TypedDict, Unpack

from tunesmith.sugar import Chain, sugar

__all__ = ["Verbs"]
'''

CLASS = '''

class Verbs(Chain):
    """A verb for each built-in method, trainer and exporter."""

    __slots__ = ()
'''


def shared_base(item: Registered) -> type | None:
    """Return the class that a trainer's options share with others': what its own derives from."""
    if item.kind != "trainers":
        return None
    base = item.spec.config.__mro__[1]
    return base if attrs.has(base) else None


def options_name(base: type) -> str:
    """Return the name of a config class's TypedDict: FastTrainerOptions of FastTrainerConfig."""
    return base.__name__.removesuffix("Config") + "Options"


def typed_dict(base: type) -> str:
    """Return the TypedDict of the options that several trainers share, with their defaults."""
    lines = ["", "", f"class {options_name(base)}(TypedDict, total=False):"]
    lines += ['    """Options that trainers share.', ""]
    lines += documented(field_docs(base).items(), "    ")
    lines += ['    """', ""]
    for field in fields_of(base):
        lines.append(
            f"    {field.name}: Annotated[{type_text(field.type)}, {literal(field.default)}]"
        )
    return "\n".join(lines) + "\n"


def method(item: Registered) -> str:
    """Return one method as source."""
    verb, spec, base = KINDS[item.kind], item.spec, shared_base(item)
    inherited = {field.name: field for field in fields_of(base)} if base is not None else {}
    docs = field_docs(spec.config)
    own = [field for field in fields_of(spec.config) if field.name not in inherited]
    other = [  # shared ones that have another default or another meaning here
        field
        for field in fields_of(spec.config)
        if field.name in inherited
        and (field.default, docs[field.name])
        != (inherited[field.name].default, field_docs(base)[field.name])  # type: ignore[arg-type]
    ]
    for field in other:
        if field.type != inherited[field.name].type:
            raise SystemExit(f"{spec.name}: {field.name} has another type than its base's")
    row = VERBS[verb]
    data, layout, name = STEP_KEYS
    parameters = ["self", *([data] if row.takes_data else [])]
    named = [*([layout] if row.takes_data else []), *([name] if names_adapter(item) else [])]
    named += [parameter(field) for field in own]
    if named:
        parameters += ["*", *named]
    if base is not None:
        parameters.append(f"**options: Unpack[{options_name(base)}]")
    defaults = [
        f"{field.name}={literal(field.default)}"
        for field in other
        if field.default != inherited[field.name].default
    ]
    lines = [f"    @sugar({', '.join([quoted(verb), quoted(spec.name), *defaults])})"]
    lines += [f"    def {spec.name}("]
    lines += [f"        {each}," for each in parameters]
    lines += ["    ) -> Self:"]
    lines += [f'        """{spec.summary[:1].upper() + spec.summary[1:]}.', ""]
    for key, said in STEP_KEYS.items():
        if key in parameters:
            lines += textwrap.indent(said, " " * 8).splitlines()
    listed = {field.name: docs[field.name] for field in (*own, *other)}
    lines += documented(listed.items(), " " * 8)
    if base is not None:
        lines.append(f"        options: those that trainers share; see `{options_name(base)}`.")
    lines += ['        """', "        return self  # a declaration; the decorator appends the step"]
    return "\n".join(lines) + "\n"


def names_adapter(item: Registered) -> bool:
    """Whether a step makes an adapter, which can be given a name."""
    named = VERBS[KINDS[item.kind]].named
    return named and (item.kind != "exporters" or item.load().makes_adapter)


def documented(docs: Iterable[tuple[str, str]], margin: str) -> Iterator[str]:
    """Yield the lines that tell of options, each "name: what it is"."""
    for name, said in docs:
        filled = textwrap.fill(
            f"{name}: {' '.join(said.split())}", 100 - len(margin), subsequent_indent="    "
        )
        yield from textwrap.indent(filled, margin).splitlines()


def fields_of(config: type | None) -> tuple[attrs.Attribute[typing.Any], ...]:
    """Return a config class's fields, their types resolved."""
    return tuple(attrs.fields(attrs.resolve_types(config))) if config is not None else ()


def parameter(field: attrs.Attribute[typing.Any]) -> str:
    """Return an option as it stands in a signature."""
    default = "" if field.default is attrs.NOTHING else f" = {literal(field.default)}"
    return f"{field.name}: {type_text(field.type)}{default}"


def type_text(hint: object) -> str:
    """Return a type as it is written in a signature."""
    if hint == Rewards:  # any of its short forms
        return "Any"
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return str(hint).replace("NoneType", "None").replace("collections.abc.", "")


def literal(value: object) -> str:
    """Return a default value as source."""
    return quoted(value) if isinstance(value, str) else repr(value)


def quoted(value: str) -> str:
    """Return text as source."""
    return f'"{value}"'


def main() -> int:
    """Write the file, or with --check compare it."""
    written = text(
        item for kind in KINDS for item in registry().of_kind(kind) if item.distribution == BUILTIN
    )
    if "--check" in sys.argv:
        if TARGET.read_text(encoding="utf-8") == written:
            return 0
        print("src/tunesmith/verbs.py is out of date; run: python tools/write_verbs.py")
        return 1
    TARGET.write_text(written, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
