"""Tuner: the fluent face. Every verb checks its arguments, appends a step and returns a new one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import attrs

from tunesmith.errors import OptionError, UnknownVerbError
from tunesmith.recipe import VERBS, Data, Recipe, Step
from tunesmith.recipe_model import model_of
from tunesmith.report.kept import reported
from tunesmith.sugar import SUGAR, settings
from tunesmith.verbs import Verbs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import TrainerCallback

    from tunesmith.engine.plan import Plan
    from tunesmith.engine.result import RunResult
    from tunesmith.engine.runner import Listener

__all__ = ["Tuner"]


class Tuner(Verbs):
    """A recipe under construction: immutable and lazy, so branching from a prefix is safe.

    `model` is a hub id, a local Hugging Face directory, or a .gguf file; or a transformers model in
    memory, or PEFT's around one, with its `tokenizer`: what it holds when the run begins is written
    to tunesmith's cache and loaded from there, an adapter merged; the object is not touched.
    Nothing is read or loaded before `explain()` or `run()`, and code that comes with a model is run
    only if `trust_remote_code` says so for this one. Errors: `ModelError` for an object that is no
    model; each verb raises `OptionError` for options it
    does not have or cannot take, and `UnknownPluginError` for a plugin that is not installed; what
    concerns the whole (files, order of steps, the machine) `run()` raises as one `PlanError`.
    """

    __slots__ = ("_recipe",)

    _recipe: Recipe

    @settings
    def __init__(
        self,
        model: str | Path | Any,
        *,
        tokenizer: Any = None,
        seed: int = 0,
        device: str = "auto",
        precision: str = "auto",
        chat_template: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if not isinstance(trust_remote_code, bool):
            raise OptionError(
                [f"trust_remote_code: got {trust_remote_code!r}; expected True or False"]
            )
        recipe = Recipe(
            model_of(model, tokenizer),
            seed=seed,
            device=device,
            precision=precision,
            chat_template=chat_template,
            trust_remote_code=trust_remote_code,
        )
        object.__setattr__(self, "_recipe", recipe)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Tuner is immutable; '{name}' cannot be set")

    if not TYPE_CHECKING:  # a type checker would take any name for one that there is

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):  # what Python and notebooks ask every object for
                raise AttributeError(f"a Tuner has no attribute '{name}'")
            from tunesmith.plugin.naming import no_such_verb

            verbs = [*VERBS, *SUGAR.values(), "explain", "run"]
            raise UnknownVerbError(no_such_verb(name, verbs))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_recipe, (self._recipe,)

    @property
    def recipe(self) -> Recipe:
        """The recipe so far, as plain data."""
        return self._recipe

    def quantize(self, quantizer: str | Any = "nf4", **options: Any) -> Self:
        """Load the base model quantized: "nf4", "bitsandbytes", or any installed quantizer.

        Takes a name with options, or a config instance: `.quantize(NF4Config(blocksize=128))`.
        """
        return self._with("quantize", quantizer, options)

    def peft(self, method: str | Any, *, name: str | None = None, **options: Any) -> Self:
        """Train an adapter by any installed PEFT method, by name or by config instance.

        `name` is what the adapter is called, to be found again by: in `result.adapters`, and by
        `.use(name)`; unset, it is the label of the step that trains it. A second adapter on the
        same base needs one.
        """
        return self._with("peft", method, options, name=name)

    def use(self, adapter: str) -> Self:
        """Go on with an adapter that was trained before: measure, train further or export that one.

        `adapter` is the name that its method was given, or the label of the step that trained it.
        """
        return self._with("use", adapter, {})

    def train(
        self, trainer: str | Any, data: Any, *, format: str | None = None, **options: Any
    ) -> Self:
        """Train by any installed trainer, by name or by config instance.

        `data` is a path or paths, a hub id, a `datasets.Dataset`, a list of dicts, or a `Data`
        that says what is mixed and done with the rows first; `format`
        names its format instead of detecting it.
        """
        return self._with("train", trainer, options, data, format)

    def evaluate(
        self, metric: str | Any, data: Any, *, format: str | None = None, **options: Any
    ) -> Self:
        """Measure the model as it stands at this step by any installed metric."""
        return self._with("evaluate", metric, options, data, format)

    def export(self, exporter: str | Any, *, name: str | None = None, **options: Any) -> Self:
        """Write the model by any installed exporter, by name or by config instance.

        `name` is that of the adapter which it makes, if it makes one, as "mix" does.
        """
        return self._with("export", exporter, options, name=name)

    def explain(self) -> Plan:
        """Print and return the plan: what will be done, what it will take, what is wrong.

        In a notebook it is shown as a table.
        """
        from tunesmith.engine.cells import in_notebook, show_once

        notebook = in_notebook()
        from tunesmith.engine.plan import make_plan
        from tunesmith.plugin.registry import registry

        plan = make_plan(self._recipe, registry())
        if notebook:
            show_once(plan)
        else:
            print(plan)
        return plan

    def run(
        self,
        directory: str | Path,
        *,
        progress: bool = True,
        listeners: Sequence[Listener] = (),
        callbacks: Sequence[TrainerCallback] = (),
    ) -> RunResult:
        """Do the work in a run directory and return the result.

        Stages that an earlier run finished there are reused if recipe, data and versions are
        unchanged. `progress=False` prints nothing; `listeners` are called with (run, event), and
        `callbacks` are given to the trainer of every training that is not reused.
        Errors: `PlanError` with every problem, before any weight is read; `RunError`. Ctrl-C ends
        as `KeyboardInterrupt` and SIGTERM as `SystemExit`, with a report and, from a training, a
        checkpoint: the message says from where the same call goes on.

        Of several processes (`torchrun`) the main one alone shows, tells the listeners and writes
        the report; an error ends all of them.
        """
        from contextlib import ExitStack

        from tunesmith.engine.signals import stoppable
        from tunesmith.engine.world import current

        with stoppable(), ExitStack() as stack:
            main = current().main
            # outside of the report: the other processes wait until it is written
            stack.enter_context(current().together())
            listening = list(listeners)
            if main:
                listening.insert(0, stack.enter_context(reported(self._recipe, Path(directory))))
            if progress and main:
                from tunesmith.report.showing import progress_reporter

                listening.append(stack.enter_context(progress_reporter()))
            from tunesmith.engine.runner import run
            from tunesmith.plugin.registry import registry

            result = run(self._recipe, Path(directory), registry(), listening, callbacks)
        return result

    def to_yaml(self, path: str | Path | None = None) -> str:
        """Return the recipe as YAML, and write it to `path` if one is given.

        Relative paths are those from the directory of `path`, or else from the working directory.
        """
        if path is None:
            return self._recipe.to_yaml()
        from tunesmith.plugin.recipe_files import with_paths_from

        text = with_paths_from(self._recipe, Path(path).parent).to_yaml()
        Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_yaml(cls, source: str | Path) -> Self:
        """Return the Tuner of a recipe: the path of a YAML or JSON file, or its text.

        Paths in a file are those from its own directory, and `${NAME}` is put in from the
        environment; see docs/recipes.md.
        """
        from tunesmith.plugin.recipe_files import read_recipe

        return cls.from_recipe(read_recipe(source))

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Self:
        """Return the Tuner of a recipe."""
        made = cls.__new__(cls)
        object.__setattr__(made, "_recipe", recipe)
        return made

    def _with(
        self,
        verb: str,
        plugin: str | Any,
        options: dict[str, Any],
        data: Any = None,
        format: str | None = None,
        name: str | None = None,
    ) -> Self:
        """Check a step's options against its plugin's config class and return it appended."""
        from tunesmith.plugin.options import given_options
        from tunesmith.plugin.registry import registry

        kind = VERBS[verb].kind
        if isinstance(plugin, str):
            found = plugin
        elif attrs.has(type(plugin)):
            item = registry().find_config(kind, type(plugin))
            found = item.spec.name if registry().find(kind, item.spec.name) is item else item.key
            options = {**given_options(plugin), **options}
        else:
            raise OptionError(
                [
                    f"{verb}: got {plugin!r}; expected the name of a {kind.removesuffix('s')} or "
                    "an instance of its config class"
                ]
            )
        step = Step(verb, found, options, data, format, name)
        if kind:
            registry().config_of(step)
        if isinstance(data, Data):
            registry().check_data(data)
        return self.from_recipe(self._recipe.with_step(step))

    def __repr__(self) -> str:
        settings = [repr(self._recipe.model)]
        for field in attrs.fields(Recipe):
            value = getattr(self._recipe, field.name)
            if field.name not in ("model", "steps") and value != field.default:
                settings.append(f"{field.name}={value!r}")
        chain = [f"Tuner({', '.join(settings)})", *map(_shown, self._recipe.steps)]
        if len("".join(chain)) <= 80:
            return "".join(chain)
        return "(\n    {}\n)".format("\n    ".join(chain))  # as one writes it

    def _repr_html_(self) -> str:
        from tunesmith.engine.cells import recipe_html

        return recipe_html(self._recipe)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tuner) and self._recipe == other._recipe

    def __hash__(self) -> int:
        return hash((self._recipe.model, len(self._recipe.steps)))


def _shown(step: Step) -> str:
    """Return a step as it is written in a chain."""
    arguments = []
    sugar = SUGAR.get((step.verb, step.plugin))
    if sugar is None:
        arguments.append(repr(step.plugin))
    if step.data is not None:
        data = step.data
        brief = isinstance(data, (str, Path)) or (
            isinstance(data, (list, tuple)) and all(isinstance(item, (str, Path)) for item in data)
        )
        if brief:  # a path says no more than its text
            data = str(data) if isinstance(data, Path) else data
            data = [str(item) for item in data] if isinstance(data, (list, tuple)) else data
        shown = brief or isinstance(data, Data)
        arguments.append(repr(data) if shown else f"<{type(data).__name__} of {_count(data)} rows>")
    if step.format is not None:
        arguments.append(f"format={step.format!r}")
    if step.name is not None:
        arguments.append(f"name={step.name!r}")
    arguments += [f"{key}={value!r}" for key, value in step.options.items()]
    return f".{sugar or step.verb}({', '.join(arguments)})"


def _count(data: Any) -> str:
    return str(len(data)) if hasattr(data, "__len__") else "?"
