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
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from tunesmith.errors import RecipeError, close_matches, listed
from tunesmith.recipe_text import MAX_BYTES, MAX_VALUES, parse_recipe, recipe_text
from tunesmith.strict_json import MAX_DEPTH, MAX_DIGITS, is_text

__all__ = ["RECIPE_VERSION", "VERBS", "Recipe", "Step", "Verb", "is_name", "plain", "stage_name"]

RECIPE_VERSION = 1


@attrs.frozen
class Verb:
    """What a step of a recipe can be: a row of `VERBS`. Nothing asks for a verb by its name."""

    kind: str
    """Which plugin kind serves it."""
    work: str
    """Lazy path "package.module:Class" of what does it."""
    takes_data: bool = False
    leaves_stage: bool = False
    """Whether its work is kept, and not done again; if not, it only says what is done later."""
    is_link: bool = True
    """Whether what comes after it depends on it."""
    labelled: bool = False
    """Whether a step's label begins with the verb; if not, it is the plugin's name alone."""
    once: str = ""
    """What to do about a second one on the same base; empty where there may be more."""
    not_after: Mapping[str, str] = attrs.field(factory=dict)
    """Verbs that may not come before it on the same base, and what to do about it."""
    needs: Mapping[str, tuple[str, str]] = attrs.field(factory=dict)
    """Where a verb came before it, which other one has to stand between, and why and how."""


VERBS: dict[str, Verb] = {
    "quantize": Verb(
        "quantizers",
        "tunesmith.engine.steps:Quantize",
        labelled=True,
        once="a model is quantized once: leave one of them out",
        not_after=dict.fromkeys(
            ("peft", "train"), "how weights are loaded is decided first: put it at the start"
        ),
    ),
    "peft": Verb(
        "methods",
        "tunesmith.engine.steps:Peft",
        once="one method a base: leave one of them out",
        not_after={"train": "all weights were trained by then; put the method before it"},
    ),
    "train": Verb(
        "trainers",
        "tunesmith.engine.steps:Train",
        takes_data=True,
        leaves_stage=True,
        needs={
            "quantize": (
                "peft",
                "quantized weights cannot be trained; add a method such as .lora() before it, or "
                "leave the quantize step out",
            )
        },
    ),
    "evaluate": Verb(
        "metrics",
        "tunesmith.engine.steps:Evaluate",
        takes_data=True,
        leaves_stage=True,
        is_link=False,
        labelled=True,
    ),
    "export": Verb("exporters", "tunesmith.engine.steps:Export", leaves_stage=True),
}
"""Every verb by its name, in the order of a usual recipe. "The same base" in their rules is what
was loaded at first, or by the last export that made a model to go on from."""

_DATA_KEYS = ("data", "format")


MAX_NAME = 100
"""Bytes of the longest name of a plugin: names of directories are made of them."""

_NAME = re.compile(r"(?:[\w.+-]+:)?[\w+-][\w.+-]*")

MAX_SEED = 2**32 - 1
"""The largest seed that numpy takes."""


def _frozen(value: Any, field: str = "an option", depth: int = 0) -> Any:
    """Return a value with its lists as tuples, so that equal recipes compare equal."""
    if depth > MAX_DEPTH:
        raise RecipeError(f"'{field[:60]}' is nested more than {MAX_DEPTH} deep; expected less")
    if isinstance(value, Mapping):
        return {key: _frozen(item, str(key), depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item, field, depth + 1) for item in value)
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise RecipeError(f"'{field}' is {_shown(value)}; expected at most {MAX_DIGITS} digits")
    if isinstance(value, str) and not is_text(value):
        raise RecipeError(f"'{field}' is {_shown(value)}, which holds half of a character; mend it")
    return value


_MAX_BITS = int(MAX_DIGITS * math.log2(10))


def _check_finite(value: Any, field: str) -> None:
    """Raise for NaN and infinity, which no option takes; one given in Python the plan refuses."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_finite(item, str(key))
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_finite(item, field)
    elif isinstance(value, float) and not math.isfinite(value):
        raise RecipeError(f"'{field}' is {float(value)}; expected a finite number")


def _options(value: Mapping[str, Any]) -> Any:
    return _frozen(value)


def _shown(value: Any) -> str:
    """Return a value as Python writes it, cut to what fits into a message."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"a whole number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number too long to write, a nesting too deep to show
        text = f"a {type(value).__name__}"
    return text if len(text) <= 200 else text[:197] + "..."


def is_name(name: Any) -> bool:
    """Return whether a value names a plugin: a plain word that no file system takes for a path."""
    return (
        isinstance(name, str)
        and _NAME.fullmatch(name) is not None
        and len(name.encode()) <= MAX_NAME
    )


def _check_name(name: Any, what: str) -> None:
    if is_name(name):
        return
    raise RecipeError(
        f"{what} is {_shown(name)}; expected a name of at most {MAX_NAME} letters, digits, '_', "
        "'-', '+' and '.', such as 'lora', or 'distribution:name'"
    )


@attrs.frozen
class Step:
    """One verb of a recipe with its plugin name, the options given to it and its data."""

    verb: str
    """One of `VERBS`."""
    plugin: str
    """Name of the plugin that does it, bare or as "distribution:name"."""
    options: Mapping[str, Any] = attrs.field(factory=dict, converter=_options)
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
        _check_name(self.plugin, f"'{self.verb}'")
        if self.format is not None:
            _check_name(self.format, "'format'")

    @property
    def kind(self) -> str:
        """Plugin kind that serves this step."""
        return VERBS[self.verb].kind

    @property
    def label(self) -> str:
        """Short name for people and directories, such as "quantize-nf4", "lora" or "sft"."""
        name = self.plugin.rpartition(":")[2]
        return f"{self.verb}-{name}" if VERBS[self.verb].labelled else name

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
            raise RecipeError(
                f"{where}: got {_shown(row)}; expected a mapping such as 'quantize: nf4'"
            )
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
        _check_keys(row, where)
        options = {k: v for k, v in row.items() if k not in (verb, *_DATA_KEYS, "with")}
        form = row.get("format")
        extra = row.get("with", {})
        if not isinstance(extra, Mapping):
            raise RecipeError(f"{where}: 'with' is {_shown(extra)}; expected a mapping of options")
        _check_keys(extra, f"{where}: 'with'")
        more = dict(extra)
        if twice := options.keys() & more.keys():
            raise RecipeError(
                f"{where}: {listed(twice)} given beside 'with' and in it; give it in one place"
            )
        try:
            step = cls(verb, name, {**options, **more}, row.get("data"), form)
            _check_finite(step.options, "an option")
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error
        return step


def stage_name(number: int, step: Step) -> str:
    """Return the name of the stage that a recipe's step of a number becomes, such as "03-sft"."""
    return f"{number:02d}-{step.label}"


def _check_keys(row: Mapping[Any, Any], where: str) -> None:
    for key in row:
        if not isinstance(key, str):
            raise RecipeError(
                f"{where}: the key {_shown(key)} is no text; write the name of an option, or put "
                "it in quotes"
            )


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
    trust_remote_code: bool = False
    """Run the Python files that come with this model; nothing that is downloaded runs otherwise."""

    def __attrs_post_init__(self) -> None:
        whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
        if not (whole and 0 <= self.seed <= MAX_SEED):
            raise RecipeError(f"'seed' is {_shown(self.seed)}; expected 0 to {MAX_SEED}")
        for name in ("model", "device", "precision", "chat_template"):
            value = getattr(self, name)
            if isinstance(value, str) and not is_text(value):
                raise RecipeError(
                    f"'{name}' is {_shown(value)}, which holds half of a character; mend it"
                )

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
            f"{where}: unknown key '{str(key)[:100]}'{close_matches(str(key)[:100], known)}"
            for key in row
            if key not in known
        ]
        version = row.get("tunesmith", RECIPE_VERSION)
        if version != RECIPE_VERSION:
            problems.append(
                f"{where}: written for recipe version {_shown(version)}; this tunesmith reads "
                f"version {RECIPE_VERSION}; upgrade with `pip install -U tunesmith`"
            )
        model = row.get("model")
        if not isinstance(model, str) or not model:
            problems.append(
                f"{where}: 'model' is {_shown(model)}; expected a hub id, a directory or a .gguf "
                "file"
            )
        for key, kinds, expected in _SETTINGS:
            value = row.get(key)
            if key in row and (not isinstance(value, kinds) or isinstance(value, bool)):
                problems.append(f"{where}: '{key}' is {_shown(value)}; expected {expected}")
        trusted = row.get("trust_remote_code", False)
        if not isinstance(trusted, bool):
            problems.append(
                f"{where}: 'trust_remote_code' is {_shown(trusted)}; expected true or false"
            )
        steps: list[Step] = []
        listing = row.get("steps") or []
        if isinstance(listing, str) or not isinstance(listing, Sequence):
            problems.append(f"{where}: 'steps' is {_shown(listing)}; expected a list of steps")
            listing = []
        for number, item in enumerate(listing, 1):
            try:
                steps.append(Step.from_dict(item, where=f"{where}: step {number}"))
            except RecipeError as error:
                problems.append(str(error))
        if problems:
            raise RecipeError("\n".join(problems))
        settings = {k: v for k, v in row.items() if k not in ("tunesmith", "model", "steps")}
        try:
            return cls(model=str(model), steps=tuple(steps), **settings)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error

    def to_yaml(self) -> str:
        """Return the recipe as YAML text."""
        return _write_yaml(self.to_dict())

    def to_json(self) -> str:
        """Return the recipe as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def from_yaml(cls, source: str | Path) -> Recipe:
        """Read a recipe from YAML or JSON: a path, or the text itself."""
        text, where = recipe_text(source)
        return cls.from_dict(parse_recipe(text, where), where=where)

    from_json = from_yaml


_SETTINGS: tuple[tuple[str, Any, str], ...] = (
    ("seed", int, "a whole number"),
    ("device", str, "'auto' or a torch device such as 'cuda:0'"),
    ("precision", str, "'auto', 'fp32', 'bf16' or 'fp16'"),
    ("chat_template", (str, type(None)), "Jinja source, the path of a .jinja file, or 'chatml'"),
)
"""Settings of a run with their types, as a file may hold them."""


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


def plain(value: Any) -> Any:
    """Return an option value as YAML and JSON can hold it: tuples become lists, paths strings."""
    try:
        return _plain(value)
    except RecursionError as error:
        raise RecipeError("an option is nested too deep for a file; make it flatter") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [_plain(item) for item in items]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float):
        if isinstance(value, kind):  # a subclass too, such as numpy's, which YAML cannot write
            number = kind(value)
            if not math.isfinite(number) if kind is float else int(number).bit_length() > _MAX_BITS:
                raise RecipeError(f"got {_shown(number)}; a recipe holds finite numbers only")
            return number
    if isinstance(value, str):
        if not is_text(value):
            raise RecipeError(f"got {_shown(value)}, which holds half of a character; mend it")
        return str.__str__(value)  # an enum's value, not its name
    raise RecipeError(
        f"got a {type(value).__name__} as an option; a recipe holds text, numbers, booleans, "
        "lists and mappings"
    )


def _count(value: Any) -> int:
    """Return how many keys and values a plain value holds."""
    if isinstance(value, dict):
        return 1 + sum(1 + _count(item) for item in value.values())
    return 1 + sum(map(_count, value)) if isinstance(value, list) else 1


def _size(value: Any) -> int:
    """Return how many characters the texts of a plain value have."""
    if isinstance(value, dict):
        return sum(len(key) + _size(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, str) else 0


def _plain_data(data: Any) -> Any:
    """Return a data description as a file can hold it: paths, ids and literal rows."""
    if isinstance(data, (str, os.PathLike)):
        return os.fsdecode(data)
    if isinstance(data, (list, tuple)) and all(
        isinstance(item, (str, os.PathLike)) for item in data
    ):
        return [os.fsdecode(item) for item in data]
    if isinstance(data, (list, tuple)) and all(isinstance(item, Mapping) for item in data):
        rows = [plain(item) for item in data]
        if _size(rows) > MAX_BYTES // 4 or _count(rows) > MAX_VALUES // 2:
            raise RecipeError(
                f"{len(rows)} rows are too much for a recipe; save them to a .jsonl or .parquet "
                "file and give its path to keep it in a recipe"
            )
        return rows
    raise RecipeError(
        f"data given as a {type(data).__module__}.{type(data).__name__} lives in this process "
        "only; save it to a .jsonl or .parquet file and give its path to keep it in a recipe"
    )
