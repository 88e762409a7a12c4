"""Options to config instances: strict types, closed key sets, every problem at once.

Config classes are frozen attrs classes. Their validators come from here, so that every message
has the same form, and a docstring under each field is that option's help text.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, TypeVar, cast

import attrs
import cattrs

from tunesmith.errors import OptionError, PluginError, RecipeError, TunesmithError
from tunesmith.other_names import unknown_option
from tunesmith.recipe import plain

__all__ = [
    "PATHS",
    "NoOptions",
    "at_least",
    "between",
    "field_docs",
    "given_options",
    "more_than",
    "one_of",
    "part_of_rows",
    "plain_options",
    "structure",
]

C = TypeVar("C")
PATHS = "tunesmith.paths"
"""Key of a field's metadata that says that the option holds a path, or several: "data" for what may
be a hub's id as well, "file" for what may not. In a recipe file it is one from the file's own
directory: `attrs.field(default=None, metadata={PATHS: "file"})`."""
_FACTORY: Any = attrs.Factory  # typed as a function, and is a class


@attrs.frozen
class NoOptions:
    """Config of a plugin that has no options."""


@attrs.frozen
class Bound:
    """A validator for finite numbers within bounds; None passes."""

    holds: Callable[[Any], bool] = attrs.field(repr=False)
    allowed: str
    schema: Mapping[str, Any]
    """The same as keywords of JSON Schema."""

    def __call__(self, instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        """Raise `ValueError` for a number out of bounds."""
        if value is None:
            return
        # `not holds` rather than its inverse: NaN compares false and must not pass
        if not isinstance(value, int) and not math.isfinite(value):
            raise ValueError(f"got {value!r}; expected a number that is finite, {self.allowed}")
        if not self.holds(value):
            raise ValueError(f"got {value!r}; expected {self.allowed}")


@attrs.frozen
class Choice:
    """A validator for a closed set of values; a near miss is answered with its match."""

    allowed: tuple[Any, ...]

    @property
    def schema(self) -> Mapping[str, Any]:
        """The same as keywords of JSON Schema."""
        return {"enum": list(self.allowed)}

    def __call__(self, instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        """Raise `ValueError` for another value."""
        if value not in self.allowed:
            near = difflib.get_close_matches(str(value), [str(item) for item in self.allowed], n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            choices = ", ".join(str(item) for item in self.allowed)
            raise ValueError(f"got {value!r}; expected one of {choices}{hint}")


@attrs.frozen
class Part:
    """A validator for a part of the rows: a share below 1, or a whole number of them.

    1.0 is neither: it might mean all rows as well as one.
    """

    none: bool
    """Whether it may be 0, for none."""

    @property
    def schema(self) -> Mapping[str, Any]:
        """The same as keywords of JSON Schema."""
        above = "minimum" if self.none else "exclusiveMinimum"
        return {"anyOf": [{"type": "integer", above: 0}, {above: 0, "exclusiveMaximum": 1}]}

    def __call__(self, instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
        """Raise `ValueError` for anything else."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        share = isinstance(value, float) and value < 1
        if not (whole or share) or not (value > 0 or (self.none and value == 0)):
            raise ValueError(
                f"got {value!r}; expected a share below 1, or a number of rows without a fraction, "
                "such as 100"
            )


def part_of_rows(*, none: bool = False) -> Part:
    """Return a validator for a share (below 1) or a whole number of rows; `none` lets 0 pass."""
    return Part(none)


def at_least(minimum: float) -> Bound:
    """Return a validator for numbers >= minimum; None passes."""
    return Bound(lambda value: value >= minimum, f"at least {minimum:g}", {"minimum": minimum})


def more_than(minimum: float) -> Bound:
    """Return a validator for numbers > minimum; None passes."""
    return Bound(
        lambda value: value > minimum, f"more than {minimum:g}", {"exclusiveMinimum": minimum}
    )


def between(low: float, high: float) -> Bound:
    """Return a validator for low <= number <= high; None passes."""
    return Bound(
        lambda value: low <= value <= high,
        f"{low:g} to {high:g}",
        {"minimum": low, "maximum": high},
    )


def one_of(*allowed: Any) -> Choice:
    """Return a validator for a closed set of values; a near miss is answered with its match."""
    return Choice(allowed)


def structure(config: type[C], options: Mapping[str, Any], *, name: str) -> C:
    """Return a config instance from options as a user wrote them.

    `name` is the plugin's, for messages. Errors: `OptionError` with a line for every unknown
    option, wrong type and value out of range; `PluginError` if the class itself is unsound.
    """
    try:
        resolved: Any = attrs.resolve_types(cast(Any, config))
        fields = {f.name: f for f in attrs.fields(resolved) if f.init}
    except NameError as error:
        raise PluginError(
            f"{config.__module__}.{config.__qualname__}, the options of {name}, has a type that "
            f"cannot be resolved: {error}; import it at run time, not under TYPE_CHECKING"
        ) from error
    problems = [unknown_option(key, name, fields) for key in options if key not in fields]
    values: dict[str, Any] = {}
    for key, value in options.items():
        field = fields.get(key)
        if field is None:
            continue
        try:
            structured = _converter.structure(value, field.type or Any)
        except Exception:
            expected = _type_name(field.type)
            if _infinite(value):
                expected = expected.replace("a number", "a number that is finite")
            problems.append(f"option '{key}' for {name}: got {value!r}; expected {expected}")
            continue
        try:
            # a field with a converter is validated as converted, when the instance is built
            if field.validator is not None and field.converter is None:
                field.validator(None, field, structured)
        except (ValueError, TypeError) as error:
            problems.append(f"option '{key}' for {name}: {_message(error)}")
            continue
        except AttributeError:
            pass  # it reads other fields of the instance, which will be there when it is built
        values[key] = structured
    for field in fields.values():
        if field.name not in options and field.default is attrs.NOTHING:
            problems.append(
                f"option '{field.name}' for {name}: missing; expected {_type_name(field.type)}"
            )
    if problems:
        raise OptionError(problems)
    try:
        return config(**values)
    except OptionError as error:
        raise OptionError([f"{name}: {problem}" for problem in error.problems]) from error
    except TunesmithError:
        raise
    except (ValueError, TypeError) as error:
        raise OptionError([f"options for {name}: {_message(error)}"]) from error


def _message(error: Exception) -> str:
    """Return an error's message; attrs' own validators put the attribute and more behind it."""
    return str(error.args[0]) if error.args else str(error)


def given_options(config: Any) -> dict[str, Any]:
    """Return the options of a config instance that differ from their defaults, as plain values."""
    given: dict[str, Any] = {}
    for field in attrs.fields(type(config)):
        value = getattr(config, field.name)
        default = field.default
        if isinstance(default, _FACTORY):
            default = default.factory(*([config] if default.takes_self else []))
        if default is attrs.NOTHING or value != default:
            given[field.name] = plain(value)
    return given


def plain_options(config: Any) -> dict[str, Any]:
    """Return all options of a config instance as plain values.

    A function that lives in this process only, which no recipe can hold, is told as such.
    """
    found: dict[str, Any] = {}
    for field in attrs.fields(type(config)):
        value = getattr(config, field.name)
        if attrs.has(type(value)) and not hasattr(value, "to_option"):
            value = attrs.asdict(value)
        try:
            found[field.name] = plain(value)
        except RecipeError as error:
            found[field.name] = f"<{error}>"
    return found


def field_docs(config: type) -> dict[str, str]:
    """Return each option's help text: the docstring under its field, inherited ones included."""
    docs: dict[str, str] = {}
    for owner in reversed(config.__mro__):
        if not attrs.has(owner):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError, SyntaxError):
            continue
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        for statement, following in pairwise(body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            ):
                docs[statement.target.id] = inspect.cleandoc(following.value.value)
    return {field.name: docs.get(field.name, "") for field in attrs.fields(config)}


def _type_name(hint: Any) -> str:
    """Return a type as a person would say it."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint in names:
        return names[hint]
    arguments = getattr(hint, "__args__", None)
    if arguments and getattr(hint, "__origin__", None) is None:
        return " or ".join("nothing" if a is type(None) else _type_name(a) for a in arguments)
    if getattr(hint, "__origin__", None) in (tuple, list):
        return str(getattr(arguments[0] if arguments else None, "expected", "a list"))
    return str(hint)


def _infinite(value: Any) -> bool:
    """Whether a value, or one in it, is infinite, written as a number or as text."""
    if isinstance(value, (list, tuple)):
        return any(map(_infinite, value))
    if isinstance(value, Mapping):
        return any(map(_infinite, value.values()))
    try:
        return isinstance(value, (float, str)) and math.isinf(float(value))
    except ValueError:
        return False


def _integer(value: Any, _: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("a boolean is not a number")
    if isinstance(value, str):
        value = float(value)
    if isinstance(value, float):
        if not math.isfinite(value) or not value.is_integer():
            raise TypeError("not a whole number")
        return int(value)
    if not isinstance(value, int):
        raise TypeError("not a whole number")
    return value


def _number(value: Any, _: Any) -> float:
    # YAML reads `2e-4` as text, so text that is a number is taken as one
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError("not a number")
    number = float(value)
    if not math.isfinite(number):  # no option means anything by infinity
        raise ValueError("not a finite number")
    return number


def _boolean(value: Any, _: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("not a boolean")
    return value


def _text(value: Any, _: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("not text")
    return value


def _sequence(value: Any, hint: Any) -> tuple[Any, ...]:
    """Structure tuple[X, ...]: a text is one item, not its letters; a mapping is no list."""
    alone = isinstance(value, str)
    if _has_own_form(hint.__args__[0]):  # one of those may be a mapping or a function
        alone = not isinstance(value, (list, tuple))
    elif isinstance(value, Mapping):
        raise TypeError("not a list")
    items = (value,) if alone else tuple(value)
    return tuple(_converter.structure(item, hint.__args__[0]) for item in items)


def _has_own_form(hint: Any) -> bool:
    """Whether a type reads its values from an option's short forms itself."""
    return isinstance(hint, type) and hasattr(hint, "from_option")


def _own_form(value: Any, hint: Any) -> Any:
    return hint.from_option(value)


def _is_sequence(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple and hint.__args__[1:] == (...,)


def _alternatives(value: Any, hint: Any) -> Any:
    """Structure a union: None and exact types as they are, else the first member that fits."""
    members = hint.__args__
    if value is None and type(None) in members:
        return None
    ranked = sorted(members, key=lambda member: type(value) is not member)
    for member in ranked:
        if member is type(None):
            continue
        try:
            return _converter.structure(value, member)
        except Exception:
            continue
    raise TypeError(f"fits none of {hint}")


def _is_union(hint: Any) -> bool:
    return isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union


_converter = cattrs.Converter(forbid_extra_keys=True)
_converter.register_structure_hook(int, _integer)
_converter.register_structure_hook(float, _number)
_converter.register_structure_hook(bool, _boolean)
_converter.register_structure_hook(str, _text)
_converter.register_structure_hook_func(_is_sequence, _sequence)
_converter.register_structure_hook_func(_has_own_form, _own_form)
_converter.register_structure_hook_func(_is_union, _alternatives)
