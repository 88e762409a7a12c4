"""The text of a recipe to plain values: YAML or JSON, within bounds and never waiting.

A recipe is written by people and handed around, so nothing in it may cost more than reading it:
aliases may not multiply, nothing nests without end, no key stands twice, no tag makes an object.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.errors import RecipeError
from tunesmith.recipe_variables import expanded, expanded_text, has_variable
from tunesmith.strict_json import MAX_DEPTH, JsonError, is_text, parse

__all__ = ["MAX_BYTES", "MAX_VALUES", "is_recipe_text", "parse_recipe", "recipe_text"]

MAX_BYTES = 8_000_000
"""Of a recipe's file; rows by the million belong into a data file."""
MAX_VALUES = 100_000
"""Keys and values of a recipe in YAML, each alias counted as all that it stands for."""

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def recipe_text(source: str | os.PathLike[str]) -> tuple[str, str]:
    """Return a recipe's text and what to call it in errors; a path is read.

    Errors: `RecipeError` for what is no regular file, too large, or not text in UTF-8.
    """
    if is_recipe_text(source):
        assert isinstance(source, str)
        if len(source) > MAX_BYTES:
            raise RecipeError(_too_large("recipe", len(source)))
        return source, "recipe"
    path = Path(source)
    shown = str(path).encode("utf-8", "backslashreplace").decode()
    shown = shown if len(shown) <= 200 else shown[:197] + "..."
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise RecipeError(
                f"{shown}: is a directory; expected a recipe file such as recipe.yaml"
            )
        if not stat.S_ISREG(status.st_mode):
            # a pipe or a device may never end, or never begin
            raise RecipeError(f"{shown}: is no regular file; expected a file such as recipe.yaml")
        if status.st_size > MAX_BYTES:
            raise RecipeError(_too_large(shown, status.st_size))
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise RecipeError(_too_large(shown, len(raw)))
        return _decoded(raw, shown), shown
    except FileNotFoundError:
        raise RecipeError(f"{shown}: no such recipe file") from None
    except RecipeError:
        raise
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or error
        raise RecipeError(f"{shown}: cannot be read: {problem}; check the path") from error


def is_recipe_text(source: str | os.PathLike[str]) -> bool:
    """Return whether this is a recipe itself and not the path of one."""
    return isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{"))


def _too_large(shown: str, size: int) -> str:
    return (
        f"{shown}: {size:,} bytes; a recipe has at most {MAX_BYTES:,}; put rows into a .jsonl file "
        "and give its path"
    )


def _decoded(raw: bytes, shown: str) -> str:
    if raw.startswith(_UTF16):
        raise RecipeError(f"{shown}: cannot be read: it is UTF-16; save it in the encoding UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{shown}: cannot be read: byte {error.start} (0x{raw[error.start]:02x}) is no UTF-8 "
            "text; expected a recipe in YAML or JSON"
        ) from error


def parse_recipe(text: str, where: str, variables: Mapping[str, str]) -> Any:
    """Return what a recipe's text holds, as plain values, with `variables` put into its texts.

    An unquoted value of YAML is read after they are put in, so that it may become a number; what is
    in quotes, in a block or in JSON is text. Errors: `RecipeError` for text that is neither YAML
    nor JSON, a key that stands twice, aliases that multiply, nesting deeper than `MAX_DEPTH`,
    values that are no plain ones, and variables that are not set.
    """
    if text.lstrip().startswith("{"):
        # not left to YAML, which takes JSON's 2e-05 for text and its \ud83d for a character
        try:
            row = parse(text)
        except JsonError as error:
            if error.position is None:
                raise RecipeError(f"{where}: {error}") from error
            if where.endswith(".json"):
                line = text.count("\n", 0, error.position) + 1
                raise RecipeError(
                    f"{where}, line {line}: not valid JSON: {error.problem}"
                ) from error
        else:
            try:
                row = expanded(row, variables, most=MAX_BYTES)
                return _checked(row)
            except RecipeError as error:
                raise RecipeError(f"{where}: {error}") from error
    return _parse_yaml(text, where, variables)


def _checked(row: Any) -> Any:
    """Return plain values if no variable has brought half of a character into them."""
    if isinstance(row, (dict, list)):
        for value in row.values() if isinstance(row, dict) else row:
            _checked(value)
    elif isinstance(row, str) and not is_text(row):
        raise RecipeError(f"{row[:40]!r} holds half of a character")
    return row


def _parse_yaml(text: str, where: str, variables: Mapping[str, str]) -> Any:
    import yaml

    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise RecipeError(_too_large(where, len(text)))

    class Refused(yaml.MarkedYAMLError):
        """YAML that is valid, and that no recipe may hold."""

    class Loader(yaml.SafeLoader):
        def __init__(self, stream: str) -> None:
            super().__init__(stream)
            self.open = 0
            self.sizes: dict[int, tuple[int, int]] = {}
            self.finished: set[int] = set()
            self.put_in = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()  # type: ignore[no-untyped-call]
            if isinstance(event, yaml.AliasEvent):
                node = self.anchors.get(event.anchor)
                if node is not None and id(node) not in self.finished:
                    raise refused(
                        f"the alias '*{event.anchor}' stands in what it stands for", event
                    )
                return super().compose_node(parent, index)
            self.open += 1
            if self.open > MAX_DEPTH:
                raise refused(f"nested more than {MAX_DEPTH} deep", event)
            node = super().compose_node(parent, index)
            self.open -= 1
            self.measure(node)
            if isinstance(node, yaml.ScalarNode) and not _is_key(parent, index):
                self.expand(node, index, unquoted=event.implicit[0])
            return node

        def expand(self, node: yaml.ScalarNode, index: Any, unquoted: bool) -> None:
            """Put variables into a text; an unquoted one is then read anew."""
            if node.tag != _TEXT or not has_variable(node.value):
                return
            key = f"'{str(index.value)[:80]}': " if isinstance(index, yaml.ScalarNode) else ""
            try:
                node.value = expanded_text(node.value, variables)
            except RecipeError as error:
                raise refused(f"{key}{error}", node) from error
            self.put_in += len(node.value)
            if self.put_in > MAX_BYTES:
                raise refused(f"{key}variables make more than {MAX_BYTES:,} characters", node)
            if unquoted:
                tag = self.resolve(yaml.ScalarNode, node.value, (True, False))  # type: ignore[no-untyped-call]
                node.tag = tag if tag.rpartition(":")[2] in _SCALARS else _TEXT

        def measure(self, node: Any) -> None:
            """Keep how many values a node stands for and how deep they go, aliases unfolded."""
            count, depth = 1, 0
            if isinstance(node, yaml.CollectionNode):
                for part in node.value:
                    for inner in part if isinstance(part, tuple) else (part,):
                        more, deeper = self.sizes[id(inner)]
                        count, depth = count + more, max(depth, deeper)
            self.sizes[id(node)] = count, depth + 1
            self.finished.add(id(node))
            if count > MAX_VALUES:
                raise refused(f"stands for more than {MAX_VALUES:,} values", node)
            if self.open + depth + 1 > MAX_DEPTH:
                raise refused(f"nested more than {MAX_DEPTH} deep", node)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise refused("a key that is no text", key)
                if key.value in seen:
                    raise refused(
                        f"the key '{key.value[:80]}' stands twice in one mapping; keep one of them",
                        key,
                    )
                seen.add(key.value)
            return super().construct_mapping(node, deep)

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            try:
                value = super().construct_object(node, deep)
            except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
                # a tag's or a number's own constructor, on text that it was not made for
                raise refused(
                    f"{str(node.value)[:40]!r} is no {node.tag.rpartition(':')[2][:40]}", node
                ) from error
            if isinstance(value, str) and not is_text(value):
                raise refused(f"{value[:40]!r} holds half of a character", node)
            if not isinstance(value, _PLAIN):
                raise refused(
                    f"{str(node.value)[:40]!r} is read as a {type(value).__name__}; put it in "
                    "quotes if text is meant",
                    node,
                )
            return value

    def refused(problem: str, at: Any) -> Refused:
        return Refused(None, None, problem, at.start_mark)

    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        kind = "" if isinstance(error, Refused) else "not valid YAML: "
        raise RecipeError(f"{where}{line}: {kind}{problem}") from error
    except RecursionError as error:
        raise RecipeError(f"{where}: nested too deep; expected {MAX_DEPTH} at most") from error


def _is_key(parent: Any, index: Any) -> bool:
    """Whether a node that the composer comes to is a key: it passes the key beside each value."""
    import yaml

    return isinstance(parent, yaml.MappingNode) and index is None


_TEXT = "tag:yaml.org,2002:str"
_SCALARS = ("str", "int", "float", "bool", "null", "timestamp")
_PLAIN = (dict, list, str, int, float, bool, type(None))
