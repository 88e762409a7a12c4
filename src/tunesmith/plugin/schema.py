"""JSON Schema of recipes, for editors: from the config classes of every plugin that is installed.

What it says is what `tunesmith.plugin.options` and `tunesmith.recipe` do: a recipe that they take
is valid, and one with a misspelt key, a value of another type or out of bounds is not. What only a
plan can find (files, the order of steps, the machine) it knows nothing of. Draft 2020-12.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import attrs

from tunesmith.errors import PluginError, TunesmithError
from tunesmith.plugin.options import field_docs
from tunesmith.plugin.registry import Registered, Registry
from tunesmith.recipe import DATA_KEYS, MAX_SEED, RECIPE_VERSION, VERBS, Recipe, Verb, plain
from tunesmith.recipe_data import ON_BAD_ROW, Source

__all__ = ["options_schema", "recipe_schema"]

Schema = dict[str, Any]
Within = tuple[type, ...]

_VARIABLE = r"\$\{"
_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$|" + _VARIABLE
_WHOLE_NUMBER = r"^\s*[+-]?\d+(\.0*)?([eE]\+?\d+)?\s*$|" + _VARIABLE
_TYPES: Mapping[Any, Schema] = {
    # YAML reads 2e-4 as text, so text that is a number is taken as one; so is a variable
    int: {"type": ["integer", "string"], "pattern": _WHOLE_NUMBER},
    float: {"type": ["number", "string"], "pattern": _NUMBER},
    bool: {"type": ["boolean", "string"], "pattern": _VARIABLE},
    str: {"type": "string"},
    type(None): {"type": "null"},
}


def recipe_schema(registry: Registry) -> Schema:
    """Return the schema of recipes as the plugins of a registry make it."""
    docs = field_docs(Recipe)
    settings: dict[str, Schema] = {
        "model": {"type": "string", "minLength": 1},
        "steps": {"type": ["array", "null"], "items": {"$ref": "#/$defs/step"}},
        "seed": {**_TYPES[int], "minimum": 0, "maximum": MAX_SEED},
        "device": {"type": "string"},
        "precision": _one_of(["auto", "fp32", "bf16", "fp16"]),
        "chat_template": {"type": ["string", "null"]},
        "trust_remote_code": _TYPES[bool],
    }
    steps = {f"{verb}:{item.key}": (verb, item) for verb, item in _served(registry)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "tunesmith recipe",
        "description": "A model, the steps to take with it, and the settings of the whole run.",
        "type": "object",
        "properties": {
            "tunesmith": {"const": RECIPE_VERSION, "description": "Version of the form."},
            **{
                name: {**schema, **_described(docs.get(name, ""))}
                for name, schema in settings.items()
            },
        },
        "required": ["model"],
        "additionalProperties": False,
        "$defs": {
            "step": _step(registry, steps),
            **{name: _plugin_step(verb, item, registry) for name, (verb, item) in steps.items()},
            "variable": {"type": "string", "pattern": _VARIABLE},
            "data": _data(),
            "source": _source(registry),
            "transform": _transform(registry),
            "format": _named(registry, "formats"),
        },
    }


def options_schema(item: Registered) -> Schema:
    """Return the schema of a mapping of all options of a plugin."""
    return _whole(item)


def _option(field: attrs.Attribute[Any], doc: str, within: Within) -> Schema:
    """Return the schema of one option: type, bounds, default and description."""
    own, items = _checks(field.validator)
    schema: Schema = {}
    if field.converter is None:  # else it is checked as converted, and takes whatever that takes
        schema = _typed(field.type, own, items, within)
    default = field.default
    if default is not attrs.NOTHING and not hasattr(default, "factory"):
        with suppress(TunesmithError):  # it may be what no recipe can hold
            schema = {**schema, "default": plain(default)}
    return {**schema, **_described(doc)}


def _served(registry: Registry) -> Iterable[tuple[str, Registered]]:
    for verb, row in VERBS.items():
        for item in registry.of_kind(row.kind) if row.kind else ():
            yield verb, item


def _step(registry: Registry, steps: Mapping[str, tuple[str, Registered]]) -> Schema:
    """Return the schema of a step: which verbs there are, and whose options go with a plugin."""
    properties = {
        verb: _named(registry, row.kind) if row.kind else {"type": "string"}
        for verb, row in VERBS.items()
    }
    cases = [
        {
            "if": {
                "required": [verb],
                "properties": {verb: {"enum": _names(item, registry)}},
            },
            "then": {"$ref": f"#/$defs/{name}"},
        }
        for name, (verb, item) in steps.items()
    ]
    cases += [
        {
            "if": {"required": [verb]},
            "then": {"properties": {verb: True}, "additionalProperties": False},
        }
        for verb, row in VERBS.items()
        if not row.kind
    ]
    return {
        "type": "object",
        "properties": properties,
        "oneOf": [{"required": [verb]} for verb in VERBS],
        "allOf": cases,
    }


def _plugin_step(verb: str, item: Registered, registry: Registry) -> Schema:
    """Return the schema of a step that a plugin does."""
    row = VERBS[verb]
    own: dict[str, Any] = {verb: True, **_step_keys(row)}
    # an option that is called like one of these is no key of the step, and stands in `with`
    kept = {*VERBS, *DATA_KEYS, *own, "with"}
    options, needed = _options(item.spec.config)
    apart = {"type": "object", "properties": options, "additionalProperties": False}
    schema: Schema = {
        **_described(item.spec.summary),
        "properties": {
            **{name: option for name, option in options.items() if name not in kept},
            **own,
            "with": apart,
        },
        "required": [verb, "data"] if row.takes_data else [verb],
        "additionalProperties": False,
    }
    if needed:  # each stands beside the verb or in `with`
        schema["allOf"] = [
            {
                "anyOf": [
                    *([{"required": [name]}] if name not in kept else []),
                    {"required": ["with"], "properties": {"with": {"required": [name]}}},
                ]
            }
            for name in needed
        ]
    return schema


def _step_keys(row: Verb) -> dict[str, Schema]:
    keys: dict[str, Schema] = {}
    if row.takes_data:
        keys |= {
            "data": {
                "$ref": "#/$defs/data",
                "description": "Path or paths, hub id, rows, or several sources and transforms.",
            },
            "format": {
                "$ref": "#/$defs/format",
                "description": "Name of the data format; unset detects it from the rows.",
            },
        }
    if row.named:
        keys["name"] = {
            "type": "string",
            "description": "What the adapter is called, to be found again by.",
        }
    return keys


def _options(config: type, within: Within = ()) -> tuple[dict[str, Schema], list[str]]:
    """Return the schemas of a config class's options, and those that have to be given.

    `within` are the classes of which it is the type of an option.
    """
    docs = field_docs(config)
    # a type that cannot be resolved stays text, of which nothing is said; a plan tells of it
    with suppress(NameError):
        attrs.resolve_types(config)
    fields = [field for field in attrs.fields(config) if field.init]
    options = {field.name: _option(field, docs[field.name], (*within, config)) for field in fields}
    return options, [field.name for field in fields if field.default is attrs.NOTHING]


def _named(registry: Registry, kind: str) -> Schema:
    """Return the schema of a plugin's name, with what each does."""
    choices = [
        {"const": name, **_described(item.spec.summary)}
        for item in registry.of_kind(kind)
        for name in _names(item, registry)
    ]
    return {"anyOf": [*choices, {"$ref": "#/$defs/variable"}]}


def _names(item: Registered, registry: Registry) -> list[str]:
    """Return what a plugin may be called: its key, and its bare name unless that is another's."""
    try:
        bare = registry.find(item.kind, item.spec.name) is item
    except PluginError:  # two strangers bear it
        bare = False
    return [*([item.spec.name] if bare else []), item.key]


def _data() -> Schema:
    return {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "items": {"type": "string"}},
            {"type": "array", "items": {"type": "object"}},
            _sources(),
        ]
    }


def _sources() -> Schema:
    return {
        "type": "object",
        "properties": {
            "sources": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/source"}},
            "transforms": {"type": ["array", "null"], "items": {"$ref": "#/$defs/transform"}},
        },
        "required": ["sources"],
        "additionalProperties": False,
    }


def _source(registry: Registry) -> Schema:
    docs = field_docs(Source)
    keys: dict[str, Schema] = {
        "data": {"$ref": "#/$defs/data"},
        "format": {"$ref": "#/$defs/format"},
        "format_options": {"type": "object"},
        "weight": {"type": "number", "exclusiveMinimum": 0},
        "on_bad_row": _one_of([*ON_BAD_ROW, None]),
    }
    one: Schema = {
        "type": "object",
        "properties": {key: {**schema, **_described(docs[key])} for key, schema in keys.items()},
        "required": ["data"],
        "additionalProperties": False,
        "allOf": [
            _case("format", item, registry, {"format_options": _whole(item)})
            for item in registry.of_kind("formats")
        ],
    }
    return {"anyOf": [{"type": "string"}, one, _sources()]}


def _transform(registry: Registry) -> Schema:
    transforms = registry.of_kind("transforms")
    cases = []
    for item in transforms:
        options, _ = _options(item.spec.config)
        properties = {**options, "transform": True, "with": _whole(item, needs=False)}
        cases.append(_case("transform", item, registry, properties, closed=True))
    return {
        "anyOf": [
            _named(registry, "transforms"),
            {
                "type": "object",
                "properties": {"transform": _named(registry, "transforms")},
                "required": ["transform"],
                "allOf": cases,
            },
        ]
    }


def _whole(item: Registered, *, needs: bool = True) -> Schema:
    """Return the schema of a mapping of all options of a plugin."""
    options, needed = _options(item.spec.config)
    return {
        "type": "object",
        "properties": options,
        "required": needed if needs else [],
        "additionalProperties": False,
    }


def _case(
    key: str,
    item: Registered,
    registry: Registry,
    properties: Mapping[str, Any],
    *,
    closed: bool = False,
) -> Schema:
    """Return what holds where a key names a plugin."""
    return {
        "if": {"required": [key], "properties": {key: {"enum": _names(item, registry)}}},
        "then": {
            "properties": dict(properties),
            **({"additionalProperties": False} if closed else {}),
        },
    }


def _described(text: str) -> Schema:
    return {"description": " ".join(text.split())} if text else {}


def _one_of(values: Iterable[Any]) -> Schema:
    return {"anyOf": [{"enum": list(values)}, {"$ref": "#/$defs/variable"}]}


def _typed(hint: Any, own: Mapping[str, Any], items: Mapping[str, Any], within: Within) -> Schema:
    """Return the schema of a type, with the bounds of a value and of a list's items."""
    members = _members(hint)
    if "enum" in own:
        nothing = [None] if type(None) in members else []
        return _one_of([*own["enum"], *nothing])
    schemas = [_member(member, items, within) for member in members]
    simple = [schema for schema in schemas if schema.keys() <= {"type", "pattern"} and schema]
    if len(simple) < len(schemas):
        rest = [schema for schema in schemas if schema not in simple]
        if any(not schema for schema in rest):
            return {}
        schemas = [*([_merged(simple)] if simple else []), *rest]
        whole = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    else:
        whole = _merged(simple)
    return {**whole, **own}


def _members(hint: Any) -> tuple[Any, ...]:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _member(hint: Any, items: Mapping[str, Any], within: Within) -> Schema:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _typed(arguments[0], {}, items, within)
    if hint in _TYPES:
        return dict(_TYPES[hint])
    if origin is typing.Literal:
        return _one_of(arguments)
    if origin is tuple and arguments[1:] != (...,):
        return {"type": "array"}
    if origin in (tuple, list):
        item = _typed(arguments[0], items, {}, within) if arguments else {}
        # one alone stands for a list of one
        return {"anyOf": [item, {"type": "array", "items": item}]} if item else {}
    if isinstance(origin, type) and issubclass(origin, Mapping) and len(arguments) == 2:
        return {"type": "object", "additionalProperties": _typed(arguments[1], items, {}, within)}
    if hint in within:
        return {"type": "object"}
    if isinstance(hint, type) and attrs.has(hint) and not hasattr(hint, "from_option"):
        options, needed = _options(hint, within)
        return {
            "type": "object",
            "properties": options,
            "required": needed,
            "additionalProperties": False,
        }
    return {}  # of a form of its own, which its class reads


def _merged(schemas: Iterable[Schema]) -> Schema:
    """Return one schema for values of any of several plain types."""
    kinds: list[str] = []
    patterns: list[str] = []
    for schema in schemas:
        found = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
        kinds += found
        patterns += [schema.get("pattern", "")] if "string" in found else []
    kinds = list(dict.fromkeys(kinds))
    whole: Schema = {"type": kinds[0] if len(kinds) == 1 else kinds}
    if patterns and all(patterns):
        whole["pattern"] = "|".join(dict.fromkeys(patterns))
    return whole


def _checks(validator: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the bounds that a validator sets, for a value itself and for the items of a list.

    Known are those of `tunesmith.plugin.options` and attrs' own; another's are the plan's to find.
    """
    if validator is None:
        return {}, {}
    if schema := getattr(validator, "schema", None):
        return dict(schema), {}
    if callable(inner := getattr(validator, "validator", None)):  # optional
        return _checks(inner)
    if callable(member := getattr(validator, "member_validator", None)):  # deep_iterable
        return {}, _checks(member)[0]
    if isinstance(several := getattr(validator, "_validators", None), tuple):  # and_
        own: dict[str, Any] = {}
        items: dict[str, Any] = {}
        for each in several:
            for whole, found in zip((own, items), _checks(each), strict=True):
                whole |= found
        return own, items
    if isinstance(options := getattr(validator, "options", None), (list, tuple, set, frozenset)):
        return {"enum": sorted(options, key=repr)}, {}
    keyword = _COMPARISONS.get(str(getattr(validator, "compare_op", None)))
    return ({keyword: validator.bound}, {}) if keyword else ({}, {})


_COMPARISONS = {
    ">=": "minimum",
    ">": "exclusiveMinimum",
    "<=": "maximum",
    "<": "exclusiveMaximum",
}
"""attrs.validators.ge, gt, le and lt by what JSON Schema calls them."""
