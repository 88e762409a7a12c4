"""Tool calls in the form that a chat template takes: with ids, short ids, or arguments as text.

Data often has no ids, or ids in the form of the API that it was collected from; some templates
refuse either. An id means nothing but which result answers which call, so it can be made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs

from tunesmith.data.examples import Message

_Form: TypeAlias = Callable[[Sequence[Message]], Sequence[Message]]

__all__ = ["FORMS", "called", "has_calls", "with_ids"]

_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_LENGTH = 9
"""Letters and digits of an id, as Mistral's templates want it; others take any."""


def has_calls(messages: Sequence[Message]) -> bool:
    """Return whether a turn calls a tool or is a tool's result."""
    return any(message.role == "tool" or message.extra.get("tool_calls") for message in messages)


def called(message: Message) -> list[str]:
    """Return the names of the tools that a message calls."""
    functions = [_function(call) for call in message.extra.get("tool_calls") or ()]
    return [name for function in functions if isinstance(name := function.get("name"), str)]


def with_ids(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages with an id on every call and on every result, kept where there is one.

    A made id follows from what is called and from how many calls stand before it, so it is the
    same in every run. A result without id answers the first open call of its name, or else the
    first open one.
    """
    if not has_calls(messages):
        return tuple(messages)
    done: list[Message] = []
    open_calls: list[tuple[str, str]] = []  # (id, name), in order
    number = 0
    for position, message in enumerate(messages):
        calls = message.extra.get("tool_calls")
        if message.role == "tool":
            answered = message.extra.get("tool_call_id")
            if not answered:
                answered = _open_call(open_calls, message.extra.get("name"))
            if answered:
                open_calls = [call for call in open_calls if call[0] != answered]
                message = _with(message, tool_call_id=answered)
        elif calls:
            given = _given_ids(messages[position + 1 :], len(calls))
            made = []
            for call, answer in zip(calls, given, strict=True):
                number += 1
                own = call.get("id") or answer or _made(number, _function(call))
                made.append({**call, "id": own})
                open_calls.append((own, str(_function(call).get("name"))))
            message = _with(message, tool_calls=made)
        done.append(message)
    return tuple(done)


def _given_ids(following: Sequence[Message], count: int) -> list[str | None]:
    """Return the ids that the results right after a turn give to its calls, in their order."""
    ids: list[str | None] = []
    for message in following:
        if message.role != "tool":
            break
        ids.append(message.extra.get("tool_call_id"))
    if len(ids) != count or len(set(ids)) != count:
        return [None] * count
    return ids


def _open_call(open_calls: Sequence[tuple[str, str]], name: Any) -> str | None:
    named = [own for own, of in open_calls if of == name]
    return next(iter([*named, *(own for own, _ in open_calls)]), None)


def _made(*parts: Any) -> str:
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    letters = []
    for _ in range(_LENGTH):
        number, letter = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[letter])
    return "".join(letters)


def _short_ids(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with ids of nine letters and digits, as Mistral wants them."""
    return _renamed(messages, lambda number, call: _short(call.get("id")))


def _named_ids(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with ids such as "functions.look:0", as Kimi K2 has them."""
    return _renamed(
        messages, lambda number, call: f"functions.{_function(call).get('name')}:{number}"
    )


def _renamed(
    messages: Sequence[Message], rename: Callable[[int, Mapping[str, Any]], str]
) -> list[Message]:
    done = []
    number = 0
    ids: dict[Any, str] = {}
    for message in messages:
        if (answered := message.extra.get("tool_call_id")) is not None:
            message = _with(message, tool_call_id=ids.get(answered) or _short(answered))
        if calls := message.extra.get("tool_calls"):
            made = []
            for call in calls:
                own = ids[call.get("id")] = rename(number, call)
                made.append({**call, "id": own})
                number += 1
            message = _with(message, tool_calls=made)
        done.append(message)
    return done


def _short(given: Any) -> str:
    text = str(given)
    return text if len(text) == _LENGTH and text.isalnum() and text.isascii() else _made(text)


def _text_arguments(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with the arguments of calls as JSON text."""
    done = []
    for message in messages:
        if calls := message.extra.get("tool_calls"):
            message = _with(message, tool_calls=[_with_text(call) for call in calls])
        done.append(message)
    return done


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = _function(call)
    arguments = function.get("arguments")
    if arguments is None or isinstance(arguments, str):
        return dict(call)
    written = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {**call, "function": written} if "function" in call else {**call, **written}


def _same(messages: Sequence[Message]) -> Sequence[Message]:
    return messages


def _both(ids: _Form) -> _Form:
    return lambda messages: _text_arguments(ids(messages))


FORMS: tuple[_Form, ...] = (
    _same,
    _short_ids,
    _text_arguments,
    _named_ids,
    _both(_short_ids),
    _both(_named_ids),
)
"""Ways to write the same calls, in the order in which a template is offered them."""


def _function(call: Any) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    return function if isinstance(function, Mapping) else {}


def _with(message: Message, **extra: Any) -> Message:
    return attrs.evolve(message, extra={**message.extra, **extra})
