"""Turns of a row: role, content, calls, and whether the turn is learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from tunesmith.data.examples import Message
from tunesmith.errors import RowError, close_matches
from tunesmith_plugins.formats._calls import calls, spelled_calls
from tunesmith_plugins.formats._fields import NOTHING, got, text, without_nulls

__all__ = ["needs_assistant", "same_turn", "turns", "with_system"]

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
_FLAGS = ("train", "training", "trainable", "loss")
"""Keys of a turn that say whether it is learned, as data for axolotl and ms-swift has them."""
_DETAILS = ("train_detail", "training_detail")
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_PASSED_ON = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def turns(row: Mapping[str, Any], field: str) -> list[Message]:
    """Return the turns in a field, given as a list, or as one turn alone.

    What the assistant says and the calls it makes next are one turn, however many the data has.
    """
    value = row.get(field, NOTHING)
    if isinstance(value, Mapping) and value:
        return [_turn(value, field)]
    if not isinstance(value, (list, tuple)) or not value:
        raise RowError(field, got(value), _SHAPE)
    return _joined([_turn(item, f"{field}[{index}]") for index, item in enumerate(value)])


def with_system(row: Mapping[str, Any], messages: Sequence[Message]) -> list[Message]:
    """Return turns that begin with the row's 'system' text, if it has one and they do not yet."""
    content = text(row, "system", optional=True)
    if not content.strip():
        return list(messages)
    given = Message("system", content)
    if messages and same_turn(given, messages[0]):
        return list(messages)
    return [given, *messages]


def needs_assistant(messages: Sequence[Message], field: str) -> None:
    """Raise unless one of the turns is the assistant's: there would be nothing to learn."""
    if not any(message.role == "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(message.role for message in messages)) or "no turns"
        raise RowError(field, f"turns of {roles} only", "at least one turn of the assistant")


def same_turn(one: Message, other: Message) -> bool:
    """Return whether two turns say the same, but for the amount of white space."""
    return (
        one.role == other.role
        and one.content.split() == other.content.split()
        and one.extra.get("tool_calls") == other.extra.get("tool_calls")
    )


def _joined(messages: Sequence[Message]) -> list[Message]:
    """Return the turns, with calls that follow on what the assistant says, or calls, in one."""
    done: list[Message] = []
    for message in messages:
        if done and (joined := _as_one(done[-1], message)) is not None:
            done[-1] = joined
        else:
            done.append(message)
    return done


def _as_one(first: Message, then: Message) -> Message | None:
    if not first.role == then.role == "assistant" or first.trained != then.trained:
        return None
    made = then.extra.get("tool_calls")
    if not made or then.content.strip():
        return None
    ours = {key: item for key, item in first.extra.items() if key != "tool_calls"}
    theirs = {key: item for key, item in then.extra.items() if key != "tool_calls"}
    if any(ours[key] != theirs[key] for key in ours.keys() & theirs.keys()):
        return None
    every = [*first.extra.get("tool_calls", ()), *made]
    return attrs.evolve(first, extra={**ours, **theirs, "tool_calls": every})


def _turn(value: Any, field: str) -> Message:
    if not isinstance(value, Mapping):
        raise RowError(field, got(value), "an object with 'role' and 'content'")
    if value.get("from") is not None and value.get("role") is None:
        return _sharegpt_turn(value, field)
    if value.get("role") == "function":  # what OpenAI's chat API had before the role tool
        value = {**value, "role": "tool"}
    role = _role(value, "role", field, _ROLES)
    others = ("role", "content", "function_call", "weight", *_FLAGS, *_DETAILS)
    extra = {key: item for key, item in value.items() if key not in others}
    if value.get("function_call"):  # what OpenAI's chat API had before tool_calls
        made = extra.get("tool_calls") or []
        one = calls(value["function_call"], f"{field}.function_call")
        extra["tool_calls"] = [*calls(made, f"{field}.tool_calls"), *one]
    extra = _extra(extra, field)
    content = value.get("content", NOTHING)
    # an assistant that only thinks or calls a tool says nothing: null or no content is how that
    # is written
    silent = role == "assistant" and any(extra.get(key) for key in ("tool_calls", *_THOUGHTS))
    if content in (None, NOTHING) and silent:
        content = ""
    return Message(
        role, _content(content, role, f"{field}.content"), extra, _trained(value, role, field)
    )


def _sharegpt_turn(value: Mapping[str, Any], field: str) -> Message:
    role = _role(value, "from", field, _FROM)
    extra = _extra({key: value[key] for key in _PASSED_ON if key in value}, field)
    content = value.get("value", NOTHING)
    trained = _trained(value, role, field)
    if value["from"] in _CALLS and "tool_calls" not in extra:
        made = spelled_calls(content, f"{field}.value")
        if made:
            return Message(role, "", {**extra, "tool_calls": made}, trained)
    if content in (None, NOTHING) and extra.get("tool_calls"):
        content = ""
    return Message(role, _content(content, role, f"{field}.value"), extra, trained)


def _extra(given: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Return further keys of a turn without those that say nothing, calls in their one form."""
    extra = {
        key: item if key == "tool_calls" else without_nulls(item)
        for key, item in given.items()
        if item is not None and not (key in ("tool_calls", "tool_call_id", "name") and not item)
    }
    if "tool_calls" in extra:
        made = calls(extra.pop("tool_calls"), f"{field}.tool_calls")
        if made:
            extra["tool_calls"] = made
    return extra


def _content(value: Any, role: str, field: str) -> str:
    if isinstance(value, str):
        return value
    parts = _parts(value)
    if parts is not None:
        return "".join(parts)
    if role == "tool" and value is not None and value is not NOTHING:
        # what a tool returns is a value as often as a text
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, (list, tuple)) and value:
        raise RowError(field, "a list with parts that are not text", "text, or parts of text")
    raise RowError(field, got(value), "text")


def _parts(value: Any) -> list[str] | None:
    """Return the texts of a list of parts, or None if it holds anything else."""
    if not isinstance(value, (list, tuple)) or not value:
        return None
    texts = []
    for part in value:
        if isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS:
            part = part.get("text")
        if not isinstance(part, str):
            return None
        texts.append(part)
    return texts


def _role(value: Mapping[str, Any], key: str, field: str, allowed: Mapping[str, str]) -> str:
    role = value.get(key, NOTHING)
    if isinstance(role, str) and role in allowed:
        return allowed[role]
    expected = f"one of {', '.join(allowed)}"
    if isinstance(role, str):
        raise RowError(
            f"{field}.{key}", f"the role '{role}'", expected + close_matches(role, allowed)
        )
    raise RowError(f"{field}.{key}", got(role), expected)


def _trained(value: Mapping[str, Any], role: str, field: str) -> bool:
    """Return whether a turn is to be learned, by its weight or by a flag."""
    for key in _DETAILS:
        if value.get(key):
            raise RowError(
                f"{field}.{key}",
                got(value[key]),
                "no such key: a turn is learned as a whole or not at all; give weight 0 or 1",
            )
    trained = True
    weight = value.get("weight")
    if weight is not None:
        if not isinstance(weight, (bool, int, float)) or weight not in (0, 1):
            allowed = "0 for a turn that is shown and not learned, or 1"
            raise RowError(f"{field}.weight", got(weight), allowed)
        trained = bool(weight)
    for key in _FLAGS:
        flag = value.get(key)
        if flag is None:
            continue
        if not isinstance(flag, (bool, int, float)) or flag not in (0, 1):
            allowed = "false for a turn that is shown and not learned, or true"
            raise RowError(f"{field}.{key}", got(flag), allowed)
        if flag and role != "assistant":
            allowed = f"false: only turns of the assistant are learned, and this is the {role}'s"
            raise RowError(f"{field}.{key}", got(flag), allowed)
        trained = trained and bool(flag)
    return trained or role != "assistant"
