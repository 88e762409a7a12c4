"""${VAR} and ${VAR:-default} in a recipe's text values, taken from the environment.

`$${` stands for the letters `${`; of a longer run of dollars one is taken away. What is put in is
text and never looked at again, so it can bring no variable of its own along. A name that says it is
a secret is refused: a recipe is kept with the run, and shown by its report.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from tunesmith.errors import RecipeError

__all__ = ["escaped", "escaped_text", "expanded", "expanded_text", "has_variable"]

_BEGIN = re.compile(r"(\$+)\{")
_REST = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_SECRETS = frozenset(
    ("KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIALS")
)


def has_variable(text: str) -> bool:
    """Return whether there is anything in a text to be put in or unescaped."""
    return "${" in text


def expanded_text(text: str, variables: Mapping[str, str]) -> str:
    """Return a text with its variables put in.

    Errors: `RecipeError` for one that is not set and has no default, that is no variable at all,
    or whose name says that it is a secret.
    """
    parts: list[str] = []
    at = 0
    while begin := _BEGIN.search(text, at):
        parts.append(text[at : begin.start()])
        dollars, at = begin[1], begin.end()
        if len(dollars) > 1:
            parts.append(dollars[1:] + "{")
            continue
        rest = _REST.match(text, at)
        if rest is None:
            raise RecipeError(
                f"{text[begin.start() : begin.start() + 30]!r} begins a variable; expected "
                "${NAME} or ${NAME:-default}, and $${ for the letters themselves"
            )
        parts.append(_value(rest[1], rest[2], variables))
        at = rest.end()
    return "".join([*parts, text[at:]])


def _value(name: str, default: str | None, variables: Mapping[str, str]) -> str:
    if not _SECRETS.isdisjoint(name.upper().split("_")):
        raise RecipeError(
            f"${{{name}}} is a secret by its name, and a recipe is kept in the run directory and "
            "shown in the report; leave it out: libraries read their own, such as HF_TOKEN, from "
            "the environment"
        )
    found = variables.get(name, "")
    if found:
        return found
    if default is not None:
        return default
    if name in variables:
        return found
    near = difflib.get_close_matches(name, variables, n=1, cutoff=0.75)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise RecipeError(
        f"${{{name}}} is not set{hint}; set it, give a default: "
        f"${{{name}:-…}}, or write $${{{name}}} for the letters themselves"
    )


def expanded(value: Any, variables: Mapping[str, str], *, most: int, at: str = "") -> Any:
    """Return a plain value with the variables in its texts put in; keys stay as they are.

    `most` is how many characters may come of it. Errors: `RecipeError` that names the key.
    """
    size = 0

    def inner(value: Any, at: str) -> Any:
        nonlocal size
        if isinstance(value, dict):
            return {key: inner(item, f"{at}.{key}" if at else key) for key, item in value.items()}
        if isinstance(value, list):
            return [inner(item, f"{at}.{number}") for number, item in enumerate(value, 1)]
        if not isinstance(value, str) or not has_variable(value):
            return value
        try:
            made = expanded_text(value, variables)
        except RecipeError as error:
            raise RecipeError(f"'{at[:100]}': {error}") from error
        size += len(made)
        if size > most:
            raise RecipeError(f"'{at[:100]}': its variables make more than {most:,} characters")
        return made

    return inner(value, at)


def escaped(value: Any) -> Any:
    """Return a plain value whose texts come back as they are when variables are put in."""
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [escaped(item) for item in value]
    return escaped_text(value) if isinstance(value, str) else value


def escaped_text(text: str) -> str:
    """Return a text with one more dollar before each "{" that follows dollars."""
    return _BEGIN.sub(r"$\1{", text)
