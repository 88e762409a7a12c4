"""Reading single fields of a row: text, turns and tools, with errors that name what stood there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tunesmith.data.examples import Message
from tunesmith.errors import RowError, close_matches

__all__ = ["count", "got", "needs_assistant", "system_message", "text", "tools", "turns"]

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
_FROM = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_response": "tool",
}
_CALLS = ("function_call", "tool_call")
_SHAPE = "a list of turns, each {'role', 'content'} or {'from', 'value'}"

_NOTHING = object()


def count(row: Mapping[str, Any], required: Iterable[str], optional: Iterable[str]) -> int:
    """Return how many fields of a row are among the named ones; 0 unless all required are there."""
    needed = set(required)
    if not needed <= row.keys():
        return 0
    return len(row.keys() & (needed | set(optional)))


def got(value: Any) -> str:
    """Return what stood in a field, as a person would say it."""
    if value is _NOTHING:
        return "nothing"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"a number ({value})"
    if isinstance(value, str):
        return f"the text {value[:40]!r}" if value.strip() else "blank text"
    if isinstance(value, Mapping):
        keys = ", ".join(map(str, value))
        return f"an object with the keys {keys}" if value else "an empty object"
    if isinstance(value, Sequence):
        return f"a list of {len(value)}" if value else "an empty list"
    return f"a {type(value).__name__}"


def text(row: Mapping[str, Any], field: str, *, optional: bool = False) -> str:
    """Return the text in a field; "" for an optional one that is not there or null."""
    value = row.get(field, _NOTHING)
    if isinstance(value, str):
        return value
    if optional and (value is None or value is _NOTHING):
        return ""
    raise RowError(field, got(value), "text")


def system_message(row: Mapping[str, Any]) -> list[Message]:
    """Return the row's 'system' text as a message, or no message if there is none."""
    content = text(row, "system", optional=True)
    return [Message("system", content)] if content.strip() else []


def turns(row: Mapping[str, Any], field: str) -> list[Message]:
    """Return the turns in a field, given as a list, or as one turn alone."""
    value = row.get(field, _NOTHING)
    if isinstance(value, Mapping) and value:
        return [_turn(value, field)]
    if not isinstance(value, (list, tuple)) or not value:
        raise RowError(field, got(value), _SHAPE)
    return [_turn(item, f"{field}[{index}]") for index, item in enumerate(value)]


def needs_assistant(messages: Sequence[Message], field: str) -> None:
    """Raise unless one of the turns is the assistant's: there would be nothing to learn."""
    if not any(message.role == "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(message.role for message in messages)) or "no turns"
        raise RowError(field, f"turns of {roles} only", "at least one turn of the assistant")


def tools(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the JSON schemas in the field 'tools': a list, or the JSON text of one.

    A bare {"name", "parameters"} is set into {"type": "function", "function": …}, which is what
    chat templates are written for.
    """
    value = row.get("tools")
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            problem = f"text that is not JSON ({error.msg.lower()} at column {error.colno})"
            raise RowError("tools", problem, "a list of tools, or the JSON text of one") from error
    if value is None:
        return []
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise RowError("tools", got(value), "a list of tools, or the JSON text of one")
    return [_tool(item, f"tools[{index}]") for index, item in enumerate(value)]


def _tool(value: Any, field: str) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        if isinstance(value.get("function"), Mapping):
            return dict(value)
        if isinstance(value.get("name"), str):
            return {"type": "function", "function": dict(value)}
    raise RowError(field, got(value), "an object with a 'name', or with a 'function' that has one")


def _turn(value: Any, field: str) -> Message:
    if not isinstance(value, Mapping):
        raise RowError(field, got(value), "an object with 'role' and 'content'")
    if "from" in value and "role" not in value:
        return _sharegpt_turn(value, field)
    role = _role(value, "role", field, _ROLES)
    extra = {
        key: item
        for key, item in value.items()
        if key not in ("role", "content") and item is not None
    }
    content = value.get("content", _NOTHING)
    # an assistant that only calls a tool says nothing: null or no content is how that is written
    if content in (None, _NOTHING) and role == "assistant" and extra.get("tool_calls"):
        content = ""
    return Message(role, _content(content, f"{field}.content"), extra)


def _content(value: Any, field: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and value:
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in value]
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
        raise RowError(field, "a list with parts that are not text", "text, or parts of text")
    raise RowError(field, got(value), "text")


def _role(value: Mapping[str, Any], key: str, field: str, allowed: Mapping[str, str]) -> str:
    role = value.get(key, _NOTHING)
    if isinstance(role, str) and role in allowed:
        return allowed[role]
    expected = f"one of {', '.join(allowed)}"
    if isinstance(role, str):
        raise RowError(
            f"{field}.{key}", f"the role '{role}'", expected + close_matches(role, allowed)
        )
    raise RowError(f"{field}.{key}", got(role), expected)


def _sharegpt_turn(value: Mapping[str, Any], field: str) -> Message:
    role = _role(value, "from", field, _FROM)
    content = value.get("value", _NOTHING)
    if not isinstance(content, str):
        raise RowError(f"{field}.value", got(content), "text")
    if value["from"] in _CALLS:
        calls = _tool_calls(content)
        if calls:
            return Message(role, "", {"tool_calls": calls})
    return Message(role, content)


def _tool_calls(content: str) -> list[dict[str, Any]]:
    """Return the calls that a text spells as JSON, or none if it spells something else."""
    try:
        value = json.loads(content)
    except json.JSONDecodeError:
        return []
    calls: list[dict[str, Any]] = []
    for item in value if isinstance(value, list) else [value]:
        if not (isinstance(item, dict) and isinstance(item.get("name"), str)):
            return []
        arguments = item.get("arguments", {})
        if isinstance(arguments, str):
            # templates write arguments as JSON themselves and would quote a text once more
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError:
                return []
        calls.append(
            {"type": "function", "function": {"name": item["name"], "arguments": arguments}}
        )
    return calls
