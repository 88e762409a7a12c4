"""Recipe and Step: what a run is, as plain data that goes to YAML or JSON and comes back equal.

A recipe file reads like the fluent chain::

    tunesmith: 1
    model: HuggingFaceTB/SmolLM2-135M-Instruct
    steps:
      - quantize: nf4
      - peft: lora
        r: 16
      - train: sft
        data: train.json
      - train: dpo
        data: prefs.json
      - export: merge

Nothing here knows which plugins exist or what their options mean; `tunesmith.engine.plan` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from tunesmith.errors import RecipeError, close_matches, listed

__all__ = ["KIND_OF_VERB", "RECIPE_VERSION", "VERBS", "Recipe", "Step", "plain"]

RECIPE_VERSION = 1

KIND_OF_VERB: dict[str, str] = {
    "quantize": "quantizers",
    "peft": "methods",
    "train": "trainers",
    "evaluate": "metrics",
    "export": "exporters",
}
"""Which plugin kind serves which verb."""

VERBS = tuple(KIND_OF_VERB)

_DATA_KEYS = ("data", "format")


def _frozen(value: Any) -> Any:
    """Return a value with its lists as tuples, so that equal recipes compare equal."""
    if isinstance(value, Mapping):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


@attrs.frozen
class Step:
    """One verb of a recipe with its plugin name, the options given to it and its data."""

    verb: str
    """One of `VERBS`."""
    plugin: str
    """Name of the plugin that does it, bare or as "distribution:name"."""
    options: Mapping[str, Any] = attrs.field(factory=dict, converter=_frozen)
    """Options as given, not filled with defaults."""
    data: Any = None
    """Path or paths, hub id, `datasets.Dataset`, or rows; None for a step without data."""
    format: str | None = None
    """Name of the data format; None detects it from the rows."""

    def __attrs_post_init__(self) -> None:
        if self.verb not in VERBS:
            raise RecipeError(
                f"unknown step '{self.verb}'{close_matches(self.verb, VERBS)}; "
                f"a step is one of: {', '.join(VERBS)}"
            )

    @property
    def kind(self) -> str:
        """Plugin kind that serves this step."""
        return KIND_OF_VERB[self.verb]

    @property
    def label(self) -> str:
        """Short name for people and directories, such as "quantize-nf4", "lora" or "sft"."""
        name = self.plugin.rpartition(":")[2]
        return name if self.verb in {"peft", "train", "export"} else f"{self.verb}-{name}"

    def to_dict(self) -> dict[str, Any]:
        """Return the step as a mapping of plain values; refuse data that a file cannot hold."""
        row: dict[str, Any] = {self.verb: self.plugin}
        if self.data is not None:
            row["data"] = _plain_data(self.data)
        if self.format is not None:
            row["format"] = self.format
        clash = [key for key in self.options if key in (*VERBS, *_DATA_KEYS, "with")]
        given = {key: plain(value) for key, value in self.options.items()}
        if clash:
            row["with"] = given
        else:
            row.update(given)
        return row

    @classmethod
    def from_dict(cls, row: Any, *, where: str = "step") -> Step:
        """Read a step from a mapping; errors name `where`."""
        if not isinstance(row, Mapping):
            raise RecipeError(f"{where}: got {row!r}; expected a mapping such as 'quantize: nf4'")
        verbs = [key for key in row if key in VERBS]
        if len(verbs) != 1:
            unknown = next((str(key) for key in row if key not in VERBS), "")
            hint = close_matches(unknown, VERBS) if not verbs else ""
            raise RecipeError(
                f"{where}: got the keys {listed(map(str, row))}; expected exactly one of "
                f"{', '.join(VERBS)}{hint}"
            )
        verb = verbs[0]
        name = row[verb]
        if not isinstance(name, str) or not name:
            raise RecipeError(f"{where}: '{verb}' is {name!r}; expected the name of a plugin")
        options = {str(k): v for k, v in row.items() if k not in (verb, *_DATA_KEYS, "with")}
        form = row.get("format")
        if form is not None and not isinstance(form, str):
            raise RecipeError(f"{where}: 'format' is {form!r}; expected the name of a data format")
        extra = row.get("with", {})
        if not isinstance(extra, Mapping):
            raise RecipeError(f"{where}: 'with' is {extra!r}; expected a mapping of options")
        more = {str(k): v for k, v in extra.items()}
        if twice := options.keys() & more.keys():
            raise RecipeError(
                f"{where}: {listed(twice)} given beside 'with' and in it; give it in one place"
            )
        return cls(verb, name, {**options, **more}, row.get("data"), form)


def _tuple_of_steps(steps: Iterable[Step]) -> tuple[Step, ...]:
    return tuple(steps)


@attrs.frozen
class Recipe:
    """A model, the steps to take with it, and the settings of the whole run."""

    model: str
    """Hub id, local Hugging Face directory, or a .gguf file."""
    steps: tuple[Step, ...] = attrs.field(default=(), converter=_tuple_of_steps)
    seed: int = 0
    """Seeds everything random: initialisation, shuffling, dropout, splits."""
    device: str = "auto"
    """"auto" takes cuda, then mps, then cpu; or a torch device string."""
    precision: str = "auto"
    """"auto", "fp32", "bf16" or "fp16": the dtype the model computes in."""
    chat_template: str | None = None
    """Jinja source, the path of a .jinja file, or "chatml"; None keeps the tokenizer's own."""

    def with_step(self, step: Step) -> Recipe:
        """Return a recipe with one more step at its end."""
        return attrs.evolve(self, steps=(*self.steps, step))

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values, ready for YAML or JSON; defaults are left out."""
        row: dict[str, Any] = {"tunesmith": RECIPE_VERSION, "model": self.model}
        for field in attrs.fields(Recipe):
            if field.name in ("model", "steps"):
                continue
            value = getattr(self, field.name)
            if value != field.default:
                row[field.name] = value
        row["steps"] = [step.to_dict() for step in self.steps]
        return row

    @classmethod
    def from_dict(cls, row: Any, *, where: str = "recipe") -> Recipe:
        """Read a recipe from a mapping; every problem is reported at once."""
        if not isinstance(row, Mapping):
            raise RecipeError(f"{where}: got {type(row).__name__}; expected a mapping")
        known = {"tunesmith", *(field.name for field in attrs.fields(cls))}
        problems = [
            f"{where}: unknown key '{key}'{close_matches(str(key), known)}"
            for key in row
            if key not in known
        ]
        version = row.get("tunesmith", RECIPE_VERSION)
        if version != RECIPE_VERSION:
            problems.append(
                f"{where}: written for recipe version {version!r}; this tunesmith reads version "
                f"{RECIPE_VERSION}; upgrade with `pip install -U tunesmith`"
            )
        model = row.get("model")
        if not isinstance(model, str) or not model:
            problems.append(
                f"{where}: 'model' is {model!r}; expected a hub id, a directory or a .gguf file"
            )
        for key, kinds, expected in _SETTINGS:
            value = row.get(key)
            if key in row and (not isinstance(value, kinds) or isinstance(value, bool)):
                problems.append(f"{where}: '{key}' is {value!r}; expected {expected}")
        steps: list[Step] = []
        listing = row.get("steps") or []
        if isinstance(listing, str) or not isinstance(listing, Sequence):
            problems.append(f"{where}: 'steps' is {listing!r}; expected a list of steps")
            listing = []
        for number, item in enumerate(listing, 1):
            try:
                steps.append(Step.from_dict(item, where=f"{where}: step {number}"))
            except RecipeError as error:
                problems.append(str(error))
        if problems:
            raise RecipeError("\n".join(problems))
        settings = {k: v for k, v in row.items() if k not in ("tunesmith", "model", "steps")}
        return cls(model=str(model), steps=tuple(steps), **settings)

    def to_yaml(self) -> str:
        """Return the recipe as YAML text."""
        return _write_yaml(self.to_dict())

    def to_json(self) -> str:
        """Return the recipe as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def from_yaml(cls, source: str | Path) -> Recipe:
        """Read a recipe from YAML or JSON: a path, or the text itself."""
        text, where = _text_of(source)
        if text.lstrip().startswith("{"):
            # not left to YAML, which takes JSON's 2e-05 for text and its \ud83d for a character
            try:
                return cls.from_dict(json.loads(text, object_pairs_hook=_unique), where=where)
            except json.JSONDecodeError as error:
                if where.endswith(".json"):
                    raise RecipeError(
                        f"{where}, line {error.lineno}: not valid JSON: {error.msg}"
                    ) from error
            except _DuplicateKeyError as error:
                raise RecipeError(f"{where}: {error}") from error
        return cls.from_dict(_read_yaml(text, where), where=where)

    from_json = from_yaml


_SETTINGS: tuple[tuple[str, Any, str], ...] = (
    ("seed", int, "a whole number"),
    ("device", str, "'auto' or a torch device such as 'cuda:0'"),
    ("precision", str, "'auto', 'fp32', 'bf16' or 'fp16'"),
    ("chat_template", (str, type(None)), "Jinja source, the path of a .jinja file, or 'chatml'"),
)
"""Settings of a run with their types, as a file may hold them."""


class _DuplicateKeyError(ValueError):
    """A mapping in a file says two things under one key."""


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's mapping; refuse a key that stands twice, for one would be lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise _DuplicateKeyError(f"the key '{twice}' stands twice in one mapping; keep one of them")
    return row


def _write_yaml(row: Mapping[str, Any]) -> str:
    """Return a mapping as YAML that is read back equal."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        # PyYAML writes these three as they are and reads them as line breaks, unless quoted
        quoted = any(character in value for character in "\x85\u2028\u2029")
        return dumper.represent_scalar(
            "tag:yaml.org,2002:str", value, style='"' if quoted else None
        )

    Dumper.add_representer(str, text)
    written: str = yaml.dump(row, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    return written


def _read_yaml(text: str, where: str) -> Any:
    """Return what a YAML text holds; refuse a key that stands twice, for one would be lost."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if key.value in seen:
                    problem = f"the key '{key.value}' stands twice in one mapping; keep one of them"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{where}{line}: not valid YAML: {problem}") from error


def plain(value: Any) -> Any:
    """Return an option value as YAML and JSON can hold it: tuples become lists, paths strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [plain(item) for item in items]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float):
        if isinstance(value, kind):  # a subclass too, such as numpy's, which YAML cannot write
            return kind(value)
    if isinstance(value, str):
        return str.__str__(value)  # an enum's value, not its name
    raise RecipeError(
        f"got a {type(value).__name__} as an option; a recipe holds text, numbers, booleans, "
        "lists and mappings"
    )


def _plain_data(data: Any) -> Any:
    """Return a data description as a file can hold it: paths, ids and literal rows."""
    if isinstance(data, (str, Path)):
        return str(data)
    if isinstance(data, (list, tuple)) and all(isinstance(item, (str, Path)) for item in data):
        return [str(item) for item in data]
    if isinstance(data, (list, tuple)) and all(isinstance(item, Mapping) for item in data):
        return [plain(item) for item in data]
    raise RecipeError(
        f"data given as a {type(data).__module__}.{type(data).__name__} lives in this process "
        "only; save it to a .jsonl or .parquet file and give its path to keep it in a recipe"
    )


def _text_of(source: str | Path) -> tuple[str, str]:
    """Return a recipe's text and what to call it in errors."""
    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{")):
        return source, "recipe"
    path = Path(source)
    try:
        if path.is_dir():
            raise RecipeError(f"{path}: is a directory; expected a recipe file such as recipe.yaml")
        return path.read_text(encoding="utf-8"), str(path)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe file") from None
    except RecipeError:
        raise
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
