"""Tools and tool calls of a row, in the one form that chat templates are written for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from tunesmith.data.examples import Message
from tunesmith.errors import RowError
from tunesmith_plugins.formats._fields import from_json, got, without_nulls

__all__ = ["calls", "spelled_calls", "tools", "without_filled"]

_TOOLS = "a list of tools, or the JSON text of one"
_CALLS = "a list of calls, each with a 'function' that has a 'name', or the JSON text of one"
_ARGUMENTS = "an object, or the JSON text of one"
_NULL_SAYS_SOMETHING = ("default", "const", "enum", "example", "examples")
"""Keys of a JSON schema under which null is a value."""


def tools(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the JSON schemas in the field 'tools': a list, or the JSON text of one.

    A bare {"name", "parameters"} is set into {"type": "function", "function": …}, which is what
    chat templates are written for. Where there is none, 'functions' is read, as OpenAI's chat API
    once named them.
    """
    field = "functions" if row.get("tools") is None and "functions" in row else "tools"
    value = row.get(field)
    if isinstance(value, str):
        if not value.strip():
            return []
        value = from_json(value, field, _TOOLS)
    if value is None:
        return []
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise RowError(field, got(value), _TOOLS)
    return [_tool(item, f"{field}[{index}]") for index, item in enumerate(value)]


def _tool(value: Any, field: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        value = from_json(value, field, "a tool, or the JSON text of one")
    if isinstance(value, Mapping):
        # a table fills a schema with the keys of all others, each of them null
        schema: dict[str, Any] = without_nulls(value, keep=_NULL_SAYS_SOMETHING)
        function = schema.get("function")
        if isinstance(function, Mapping):
            return {**schema, "function": _with_parameters(function, f"{field}.function")}
        if isinstance(schema.get("name"), str):
            return {"type": "function", "function": _with_parameters(schema, field)}
    raise RowError(field, got(value), "an object with a 'name', or with a 'function' that has one")


def _with_parameters(function: Mapping[str, Any], field: str) -> dict[str, Any]:
    given = function.get("parameters")
    if not isinstance(given, str):
        return dict(function)
    if not given.strip():
        return {**function, "parameters": {}}
    return {**function, "parameters": from_json(given, f"{field}.parameters", "a JSON schema")}


def calls(value: Any, field: str) -> list[dict[str, Any]]:
    """Return tool calls as [{"type", "function": {"name", "arguments"}}], arguments as an object.

    Templates write arguments as JSON themselves, and would quote a text once more. Ids stay where
    there are any.
    """
    if isinstance(value, str):
        value = from_json(value, field, _CALLS) if value.strip() else []
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise RowError(field, got(value), _CALLS)
    return [_call(item, f"{field}[{index}]") for index, item in enumerate(value)]


def _call(value: Any, field: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = from_json(value, field, "a call, or the JSON text of one")
    if not isinstance(value, Mapping):
        raise RowError(field, got(value), "a call with a 'function' that has a 'name'")
    function, place = value, field
    others = {}
    if value.get("function") is not None:
        function, place = value["function"], f"{field}.function"
        others = {
            key: item
            for key, item in value.items()
            if key not in ("function", "type") and item not in (None, "")
        }
    elif value.get("id") not in (None, ""):
        others = {"id": value["id"]}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        name = function.get("name") if isinstance(function, Mapping) else function
        raise RowError(f"{place}.name", got(name), "the name of the tool that is called")
    named = "parameters" if function.get("arguments") is None else "arguments"
    arguments = _arguments(function.get(named), f"{place}.{named}")
    return {
        **others,
        "type": value.get("type") or "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _arguments(value: Any, field: str) -> Any:
    if isinstance(value, str):
        value = from_json(value, field, _ARGUMENTS) if value.strip() else {}
    if value is None:
        return {}
    if not isinstance(value, (Mapping, list, tuple)):
        raise RowError(field, got(value), _ARGUMENTS)
    return value


def spelled_calls(content: Any, field: str) -> list[dict[str, Any]]:
    """Return the calls that a text spells as JSON, or none if it spells something else."""
    try:
        value = from_json(content, field, _CALLS) if isinstance(content, str) else content
    except RowError:
        return []
    items = value if isinstance(value, list) else [value]
    for item in items:
        known = ("name", "arguments", "parameters", "id", "type", "function")
        if not isinstance(item, Mapping) or not item.keys() <= set(known):
            return []
    try:
        return calls(items, field)
    except RowError:
        return []


def without_filled(
    messages: Sequence[Message], schemas: Sequence[Mapping[str, Any]]
) -> list[Message]:
    """Return the messages without arguments that are null and that the called tool does not have.

    Where rows were once a table, each call was given the arguments of all others, as nulls.
    """
    known: dict[str, Any] = {}
    for schema in schemas:
        function = schema.get("function")
        if isinstance(function, Mapping):
            parameters = function.get("parameters")
            known[str(function.get("name"))] = (
                parameters.get("properties") if isinstance(parameters, Mapping) else None
            )
    return [_without_filled(message, known) for message in messages]


def _without_filled(message: Message, known: Mapping[str, Any]) -> Message:
    made = message.extra.get("tool_calls")
    if not made or not known:
        return message
    done = []
    for call in made:
        function = call["function"]
        arguments, properties = function["arguments"], known.get(function["name"])
        if isinstance(arguments, Mapping) and isinstance(properties, Mapping):
            arguments = {
                key: item
                for key, item in arguments.items()
                if item is not None or key in properties
            }
        done.append({**call, "function": {**function, "arguments": arguments}})
    return attrs.evolve(message, extra={**message.extra, "tool_calls": done})
