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
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from tunesmith.errors import RecipeError, close_matches, listed
from tunesmith.other_names import unknown_setting
from tunesmith.recipe_data import Data
from tunesmith.recipe_model import ModelObject
from tunesmith.recipe_text import parse_recipe, recipe_text
from tunesmith.recipe_values import (
    check_finite,
    check_keys,
    check_name,
    frozen_options,
    is_name,
    plain,
    plain_data,
    shown,
)
from tunesmith.recipe_variables import escaped
from tunesmith.strict_json import is_text

__all__ = [
    "DATA_KEYS",
    "HELD_OUT",
    "MAX_SEED",
    "RECIPE_VERSION",
    "VERBS",
    "Data",
    "Recipe",
    "Step",
    "Verb",
    "is_name",
    "plain",
    "stage_name",
]

RECIPE_VERSION = 1

Advise: TypeAlias = Callable[[Iterable[str]], str]
"""Keys of a step without a verb to what should be written; empty where that is not known."""


@attrs.frozen
class Verb:
    """What a step of a recipe can be: a row of `VERBS`. Nothing asks for a verb by its name."""

    kind: str
    """Which plugin kind serves it; empty for one that no plugin does: it names an adapter."""
    work: str
    """Lazy path "package.module:Class" of what does it."""
    takes_data: bool = False
    leaves_stage: bool = False
    """Whether its work is kept, and not done again; if not, it only says what is done later."""
    is_link: bool = True
    """Whether what comes after it depends on it."""
    labelled: bool = False
    """Whether a step's label begins with the verb; if not, it is the plugin's name alone."""
    named: bool = False
    """Whether what is trained by it can be given a name, to be found again by."""
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
        named=True,
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
    "use": Verb("", "tunesmith.engine.steps:Use", labelled=True),
    "evaluate": Verb(
        "metrics",
        "tunesmith.engine.steps:Evaluate",
        takes_data=True,
        leaves_stage=True,
        is_link=False,
        labelled=True,
    ),
    "export": Verb("exporters", "tunesmith.engine.steps:Export", leaves_stage=True, named=True),
}
"""Every verb by its name, in the order of a usual recipe. "The same base" in their rules is what
was loaded at first, or by the last export that made a model to go on from."""

DATA_KEYS = ("data", "format")
"""Keys of a step that say what data it is given, whatever its verb."""

HELD_OUT = "held-out"
"""Data of a step that measures: what the training before it has held out."""


MAX_SEED = 2**32 - 1
"""The largest seed that numpy takes."""


@attrs.frozen
class Step:
    """One verb of a recipe with its plugin name, the options given to it and its data."""

    verb: str
    """One of `VERBS`."""
    plugin: str
    """Name of the plugin that does it, bare or as "distribution:name"; or of an adapter."""
    options: Mapping[str, Any] = attrs.field(factory=dict, converter=frozen_options)
    """Options as given, not filled with defaults."""
    data: Any = None
    """Path or paths, hub id, `datasets.Dataset`, rows, a `Data`, or `HELD_OUT`; None for a step
    without."""
    format: str | None = None
    """Name of the data format; None detects it from the rows."""
    name: str | None = None
    """Name of the adapter that is trained from here on; None goes by the training step's label."""

    def __attrs_post_init__(self) -> None:
        if self.verb not in VERBS:
            raise RecipeError(
                f"unknown step '{self.verb}'{close_matches(self.verb, VERBS)}; "
                f"a step is one of: {', '.join(VERBS)}"
            )
        check_name(self.plugin, f"'{self.verb}'")
        if self.name is not None:
            check_name(self.name, "'name'")
            if not self.takes_name or ":" in self.name:
                raise RecipeError(
                    f"'name' is {shown(self.name)}; expected letters, digits, '.', '_' and '-', "
                    "and it is given to a step that makes an adapter, such as .lora(name='zh')"
                )
        if not self.kind and self.options:
            raise RecipeError(
                f"'{self.verb}' takes the name of an adapter and nothing else; got "
                f"{listed(self.options)}"
            )
        if self.format is not None:
            check_name(self.format, "'format'")
            if isinstance(self.data, Data):
                raise RecipeError(
                    f"'format' is {shown(self.format)} beside a Data, each source of which has a "
                    "format of its own; give it there, as in Data(source, format=...)"
                )

    @property
    def kind(self) -> str:
        """Plugin kind that serves this step."""
        return VERBS[self.verb].kind

    @property
    def takes_name(self) -> bool:
        """Whether it can be given a name."""
        return VERBS[self.verb].named

    @property
    def reads_held_out(self) -> bool:
        """Whether its data is what the training before it has held out."""
        return isinstance(self.data, str) and self.data == HELD_OUT

    @property
    def source(self) -> Data | None:
        """The data, whatever short form it was given in; None for a step without data."""
        return None if self.data is None else Data.of(self.data, self.format)

    @property
    def label(self) -> str:
        """Short name for people and directories, such as "quantize-nf4", "lora" or "sft"."""
        name = self.plugin.rpartition(":")[2]
        return f"{self.verb}-{name}" if VERBS[self.verb].labelled else name

    def to_dict(self) -> dict[str, Any]:
        """Return the step as a mapping of plain values; refuse data that a file cannot hold."""
        row: dict[str, Any] = {self.verb: self.plugin}
        if self.name is not None:
            row["name"] = self.name
        if self.data is not None:
            data = self.data
            row["data"] = data.to_dict() if isinstance(data, Data) else plain_data(data)
        if self.format is not None:
            row["format"] = self.format
        own = (*VERBS, *DATA_KEYS, *(("name",) if self.takes_name else ()), "with")
        clash = [key for key in self.options if key in own]
        given = {key: plain(value) for key, value in self.options.items()}
        if clash:
            row["with"] = given
        else:
            row.update(given)
        return row

    @classmethod
    def from_dict(cls, row: Any, *, where: str = "step", advise: Advise | None = None) -> Step:
        """Read a step from a mapping; errors name `where`, and add what `advise` has to say."""
        if not isinstance(row, Mapping):
            raise RecipeError(
                f"{where}: got {shown(row)}; expected a mapping such as 'quantize: nf4'"
            )
        verbs = [key for key in row if key in VERBS]
        if len(verbs) != 1:
            unknown = [str(key) for key in row if key not in VERBS]
            if not verbs and advise is not None and (advice := advise(unknown)):
                raise RecipeError(f"{where}: {advice}")
            hint = close_matches(unknown[0], VERBS) if unknown and not verbs else ""
            raise RecipeError(
                f"{where}: got the keys {listed(map(str, row))}; expected exactly one of "
                f"{', '.join(VERBS)}{hint}"
            )
        verb = verbs[0]
        name = row[verb]
        check_keys(row, where)
        named = ("name",) if VERBS[verb].named else ()
        own = (verb, *DATA_KEYS, *named, "with")
        options = {k: v for k, v in row.items() if k not in own}
        form = row.get("format")
        extra = row.get("with", {})
        if not isinstance(extra, Mapping):
            raise RecipeError(f"{where}: 'with' is {shown(extra)}; expected a mapping of options")
        check_keys(extra, f"{where}: 'with'")
        more = dict(extra)
        if twice := options.keys() & more.keys():
            raise RecipeError(
                f"{where}: {listed(twice)} given beside 'with' and in it; give it in one place"
            )
        try:
            data = row.get("data")
            if isinstance(data, Mapping):
                data = Data.from_dict(data)
            given = row.get("name") if named else None
            step = cls(verb, name, {**options, **more}, data, form, given)
            check_finite(step.options, "an option")
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error
        return step


def stage_name(number: int, step: Step) -> str:
    """Return the name of the stage that a recipe's step of a number becomes, such as "03-sft"."""
    return f"{number:02d}-{step.label}"


def _tuple_of_steps(steps: Iterable[Step]) -> tuple[Step, ...]:
    return tuple(steps)


@attrs.frozen
class Recipe:
    """A model, the steps to take with it, and the settings of the whole run."""

    model: str | ModelObject
    """Hub id, local Hugging Face directory, or a .gguf file; or a model in memory."""
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
            raise RecipeError(f"'seed' is {shown(self.seed)}; expected 0 to {MAX_SEED}")
        if not isinstance(self.model, (str, ModelObject)):
            raise RecipeError(f"'model' is {shown(self.model)}; expected the name of a model")
        for name in ("model", "device", "precision", "chat_template"):
            value = getattr(self, name)
            if isinstance(value, str) and not is_text(value):
                raise RecipeError(
                    f"'{name}' is {shown(value)}, which holds half of a character; mend it"
                )

    def with_step(self, step: Step) -> Recipe:
        """Return a recipe with one more step at its end."""
        return attrs.evolve(self, steps=(*self.steps, step))

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values, ready for YAML or JSON; defaults are left out."""
        if isinstance(self.model, ModelObject):
            raise RecipeError(
                f"'model' is a {self.model}, which no file can hold; save it and its tokenizer by "
                "save_pretrained() and give the directory, or run it: the recipe.yaml of the run "
                "names the directory that it was kept in"
            )
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
    def from_dict(cls, row: Any, *, where: str = "recipe", advise: Advise | None = None) -> Recipe:
        """Read a recipe from a mapping; every problem is reported at once.

        `advise` is given the keys of a step that has no verb, and returns what to write, if it
        knows what they are: here nobody knows which plugins there are.
        """
        if not isinstance(row, Mapping):
            raise RecipeError(f"{where}: got {type(row).__name__}; expected a mapping")
        known = {"tunesmith", *(field.name for field in attrs.fields(cls))}
        problems = [
            f"{where}: {unknown_setting(str(key)[:100], known)}" for key in row if key not in known
        ]
        version = row.get("tunesmith", RECIPE_VERSION)
        if version != RECIPE_VERSION:
            problems.append(
                f"{where}: written for recipe version {shown(version)}; this tunesmith reads "
                f"version {RECIPE_VERSION}; upgrade with `pip install -U tunesmith`"
            )
        model = row.get("model")
        if not isinstance(model, str) or not model:
            problems.append(
                f"{where}: 'model' is {shown(model)}; expected a hub id, a directory or a .gguf "
                "file"
            )
        for key, kinds, expected in _SETTINGS:
            value = row.get(key)
            if key in row and (not isinstance(value, kinds) or isinstance(value, bool)):
                problems.append(f"{where}: '{key}' is {shown(value)}; expected {expected}")
        trusted = row.get("trust_remote_code", False)
        if not isinstance(trusted, bool):
            problems.append(
                f"{where}: 'trust_remote_code' is {shown(trusted)}; expected true or false"
            )
        steps: list[Step] = []
        listing = row.get("steps") or []
        if isinstance(listing, str) or not isinstance(listing, Sequence):
            problems.append(f"{where}: 'steps' is {shown(listing)}; expected a list of steps")
            listing = []
        for number, item in enumerate(listing, 1):
            try:
                steps.append(Step.from_dict(item, where=f"{where}: step {number}", advise=advise))
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
        """Return the recipe as YAML text, each `${` of it escaped."""
        return _write_yaml(escaped(self.to_dict()))

    def to_json(self) -> str:
        """Return the recipe as JSON text, each `${` of it escaped."""
        return json.dumps(escaped(self.to_dict()), indent=2, ensure_ascii=False)

    @classmethod
    def from_yaml(
        cls,
        source: str | Path,
        *,
        variables: Mapping[str, str] | None = None,
        advise: Advise | None = None,
    ) -> Recipe:
        """Read a recipe from YAML or JSON: a path, or the text itself.

        `variables` are put in where it says `${NAME}`; None takes the environment's. Paths in it
        stay as they are written: `Tuner.from_yaml` is what takes them from the recipe's own file.
        `advise` is that of `from_dict`.
        """
        text, where = recipe_text(source)
        row = parse_recipe(text, where, os.environ if variables is None else variables)
        return cls.from_dict(row, where=where, advise=advise)


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
