"""Plan: a recipe resolved against this machine, these files and these plugins.

Everything that can be found wrong is found here, all of it at once, before a weight is read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Container, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs

from tunesmith.engine.alone import alone
from tunesmith.engine.checks import ModelFindings, Use, examine
from tunesmith.engine.dataset import LoadedData
from tunesmith.engine.device import Device, find_device
from tunesmith.engine.effects import conditions_of, with_effects
from tunesmith.engine.estimate import ITEMSIZE, Estimate, Shapes, estimate_step, model_shapes
from tunesmith.engine.kept_models import examine_object
from tunesmith.engine.models import ModelSource, find_model, gguf_findings, metadata_directory
from tunesmith.engine.oddities import odd_notes
from tunesmith.engine.order import methods_at, order_problems
from tunesmith.engine.preparing import CLEAN, DataReader, after, before
from tunesmith.engine.quiet import quiet_libraries
from tunesmith.engine.readings import readings_for
from tunesmith.engine.store import problem_with
from tunesmith.errors import (
    DataError,
    ModelError,
    OptionError,
    PlanError,
    PluginError,
    RunError,
    TunesmithError,
)
from tunesmith.nn.checkpoint import stored_quantization
from tunesmith.nn.pretrained import trusting
from tunesmith.nn.weight_files import weight_files
from tunesmith.plugin.optimizers import AUTO, OPTIMIZERS, optimizer_problem
from tunesmith.plugin.options import NoOptions
from tunesmith.plugin.quantizers import Quantizer
from tunesmith.plugin.registry import Registered, Registry
from tunesmith.plugin.rewards import identities
from tunesmith.recipe import HELD_OUT, VERBS, Data, Recipe, Step, Verb, stage_name
from tunesmith.recipe_data import Transformation
from tunesmith.units import byte_size

__all__ = ["Plan", "PlannedStep", "check_base", "make_plan"]


@attrs.frozen
class PlannedStep:
    """A step with what it was resolved to; parts that have a problem are None."""

    number: int
    step: Step = attrs.field(repr=lambda step: step.label)  # its data may be rows
    plugin: Registered | None = None
    config: Any = None
    data: LoadedData | None = None
    eval_data: LoadedData | None = None
    estimate: Estimate | None = None
    rewards: tuple[Any, ...] = ()
    """What decides the scores of the rewards in its options."""
    stored: str = ""
    """A quantize step: how a model that is stored quantized is taken; empty for any other."""
    holds: tuple[str, ...] = ()
    """A quantize step: what of the model is held quantized, and what is not and why."""
    adapts: str = ""
    """A peft step: what of the model is adapted, and what is not and why."""
    effective: Mapping[str, Any] = attrs.field(factory=dict)
    """Its options as they will act, and what follows from them; empty where there is a problem."""

    @property
    def name(self) -> str:
        """Name of the stage that the step becomes, such as "03-sft"."""
        return stage_name(self.number, self.step)

    @property
    def here(self) -> str:
        """The step as problems name it, such as "step 3 (sft)"."""
        return f"step {self.number} ({self.step.label})"

    @property
    def verb(self) -> Verb:
        """The row of its verb."""
        return VERBS[self.step.verb]

    def free_label(self, taken: Container[str]) -> str:
        """Return what an adapter it makes is called if it is given no name: none of `taken`."""
        return self.step.label if self.step.label not in taken else self.name

    def flag(self, name: str) -> Any:
        """Return what its implementation says of itself; None where it could not be loaded."""
        try:
            return getattr(self.plugin.load(), name, None) if self.plugin is not None else None
        except (PluginError, ImportError):
            return None


@attrs.frozen
class Plan:
    """What will be done, what it will take, and what is wrong with it."""

    recipe: Recipe
    model: ModelSource | None
    device: Device | None
    steps: tuple[PlannedStep, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    shapes: Shapes | None = None

    @property
    def configs(self) -> Sequence[Any]:
        """One config instance a step, or None where its options are wrong."""
        return [step.config for step in self.steps]

    def raise_if_problems(self) -> None:
        """Raise `PlanError` with every problem, if there is one."""
        if self.problems:
            raise PlanError(self.problems)

    def __str__(self) -> str:
        from tunesmith.engine.explain import plan_text

        return plan_text(self)

    # the rows of all data lie in it, which nobody wants to see in a notebook's cell
    __repr__ = __str__

    def _repr_html_(self) -> str:
        from tunesmith.engine.cells import plan_html, was_shown

        return "" if was_shown(self) else plan_html(self)


def make_plan(
    recipe: Recipe,
    registry: Registry,
    *,
    directory: Path | None = None,
    estimates: bool = True,
) -> Plan:
    """Resolve a recipe; problems are collected in the plan and not raised.

    `directory` is where the run shall go, checked too if given; `estimates=False` leaves out the
    prediction of memory and time, and nothing that could be wrong.
    """
    problems: list[str] = []
    notes: list[str] = []
    model: ModelSource | None = None
    directory_of_model: Path | None = None
    try:
        model = find_model(recipe.model)
        with trusting(recipe.trust_remote_code):
            directory_of_model = metadata_directory(model)
    except TunesmithError as error:
        problems.append(str(error))
    device = None
    try:
        device = find_device(recipe.device, recipe.precision)
    except OptionError as error:
        problems.extend(error.problems)
    reader = DataReader(registry, readings_for(recipe, keep=estimates))
    steps: tuple[PlannedStep, ...] = ()
    for number, each in enumerate(recipe.steps, 1):
        steps = (*steps, _planned(number, each, steps, reader, recipe.seed, problems))
    problems += order_problems(steps)
    if device is not None:
        for step in steps:
            wrong = optimizer_problem(
                getattr(step.config, "optimizer", AUTO), device.name.partition(":")[0]
            )
            problems += [f"{step.here}: {wrong}"] if wrong else []
    notes += odd_notes(steps)
    quantizer = _quantizer(steps)
    found: ModelFindings | None = None
    if directory_of_model is not None:
        assert model is not None
        # its skeleton is built on the meta device, and a run beside it would be handed such
        # tensors; a run that asks for its own plan is alone already
        by_itself = alone("predicting memory and time", brief=True)
        try:
            with by_itself if estimates else nullcontext():
                steps, found = _with_model(
                    recipe, steps, model, directory_of_model, quantizer, problems, notes
                )
        except RunError as error:
            notes.append(f"the model is not looked at, and memory and time are not told: {error}")
    if directory is not None and (problem := problem_with(directory)):
        problems.append(problem)
    shapes = None
    if found is not None and found.skeleton is not None and not problems:
        with quiet_libraries():
            try:
                shapes = model_shapes(found.skeleton)
            except Exception as error:
                notes.append(f"memory and time are not predicted: {type(error).__name__}: {error}")
            if shapes is not None and device is not None:
                steps = _with_held(steps, shapes, device, quantizer, problems)
                steps = _with_adapted(steps, shapes, problems)
            if shapes is not None and device is not None and estimates and not problems:
                steps = _with_estimates(steps, shapes, device, quantizer, recipe.seed, notes)
    if device is not None:
        # the first quantizer has been told how the model is stored
        first = _first(steps, "quantizers")
        steps = with_effects(
            steps,
            conditions_of(device, recipe.seed, None if shapes is None else shapes.model),
            lambda step: quantizer if step is first else _built(step),
            notes,
        )
    plan = Plan(recipe, model, device, steps, tuple(problems), tuple(notes), shapes)
    for distribution, answer in registry.each_hook("tunesmith_check_plan", plan=plan):
        if isinstance(answer, Exception):
            notes.append(f"plugin {distribution} failed to check the plan: {answer}")
        else:
            problems += [f"{distribution}: {line}" for line in answer or ()]
    return attrs.evolve(plan, problems=tuple(problems), notes=tuple(notes))


def _planned(
    number: int,
    step: Step,
    earlier: Sequence[PlannedStep],
    reader: DataReader,
    seed: int,
    problems: list[str],
) -> PlannedStep:
    """Resolve one step after those before it; add what is wrong with it to `problems`."""
    here = f"step {number} ({step.label})"
    registry = reader.registry
    plugin = config = data = eval_data = None
    rewards: tuple[Any, ...] = ()
    if not step.kind:
        return PlannedStep(number, step, config=NoOptions())
    try:
        plugin = registry.find(step.kind, step.plugin)
        config = plugin.structure_of(step)
        rewards = identities(config, registry)
    except PluginError as error:
        problems.append(f"{here}: {error}")
    except OptionError as error:
        problems += [f"{here}: {problem}" for problem in error.problems]
    if plugin is not None:
        problems += [f"{here}: {problem}" for problem in _missing_packages(plugin, config)]
        try:
            plugin.load()
        except (PluginError, ImportError) as error:
            problems.append(f"{here}: {error}")
    if VERBS[step.verb].takes_data and step.reads_held_out:
        data = _held_out(here, step, plugin, earlier, reader, problems)
    elif VERBS[step.verb].takes_data:
        trains = step.kind == "trainers" and config is not None
        own = getattr(config, "seed", None)
        seed = seed if own is None else own
        opening = before(config) if trains else ()
        closing = after(config) if trains else ()
        bad = getattr(config, "on_bad_row", "error")
        data = _loaded(here, step.source, plugin, reader, problems, seed, opening, closing, bad)
        if data is not None and config is not None:
            problems += [f"{here}: {text}" for text in _held_out_problems(step, config, data)]
        given = getattr(config, "eval_data", None)
        if given is not None:
            chosen = step.format or (data.format if data is not None else None)
            if chosen is not None and " + " in chosen:
                chosen = None  # of several formats the rows say which one it is
            held_out = Data(given, format=chosen)
            there = f"{here}, eval_data"
            eval_data = _loaded(
                there, held_out, plugin, reader, problems, seed, (CLEAN,), on_bad_row=bad
            )
    elif step.data is not None:
        problems.append(f"{here}: takes no data; got {step.data!r}")
    return PlannedStep(number, step, plugin, config, data, eval_data, rewards=rewards)


def _held_out(
    here: str,
    step: Step,
    plugin: Registered | None,
    earlier: Sequence[PlannedStep],
    reader: DataReader,
    problems: list[str],
) -> LoadedData | None:
    """Return the rows that the training before a step has held out."""
    trainings = [each for each in earlier if each.verb.kind == "trainers"]
    if step.kind == "trainers" or not trainings:
        problems.append(
            f"{here}: its data is '{HELD_OUT}', which is what a training before it has held out; "
            + ("there is none before it" if not trainings else "that is not trained on")
            + "; give a file, a hub id or rows"
        )
        return None
    before = trainings[-1]
    if before.data is None:
        return None  # which has a problem of its own
    rows = before.eval_data.examples if before.eval_data is not None else before.data.held_out
    if not rows:
        problems.append(
            f"{here}: its data is '{HELD_OUT}', and {before.here} holds no rows out; give that one "
            "eval_split, as in eval_split=0.1, or give data of its own"
        )
        return None
    text = json.dumps([attrs.asdict(row.example) for row in rows], sort_keys=True, default=str)
    found = LoadedData(
        f"what {before.here} holds out of {before.data.description}",
        before.data.format,
        rows,
        hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest(),
        rows=len(rows),
    )
    problems += _shape_problems(here, found, plugin, reader)
    return found


def _held_out_problems(step: Step, config: Any, data: LoadedData) -> list[str]:
    """Return what is wrong with rows that the data's own transforms hold out, or do not."""
    source = step.source
    own = source is not None and source.is_transformed
    if step.kind != "trainers":
        if not data.held_out:
            return []
        return [
            "a transform of its data holds rows out, which nothing would measure; leave the split "
            "out, or evaluate on data of its own"
        ]
    if not own:
        return []
    held_out = bool(data.held_out) and not config.eval_split
    found = config.problems_without_evaluation(step.options) if not held_out else []
    if held_out and config.eval_data is not None:
        found.append("eval_data, and its data holds rows out as well; give one of them")
    return list(found)


def _loaded(
    here: str,
    data: Data | None,
    plugin: Registered | None,
    reader: DataReader,
    problems: list[str],
    seed: int,
    opening: Sequence[Transformation] = (),
    closing: Sequence[Transformation] = (),
    on_bad_row: str = "error",
) -> LoadedData | None:
    if data is None:
        problems.append(f"{here}: has no data; give a file, a hub id or rows")
        return None
    try:
        loaded = reader.read(data, seed=seed, before=opening, after=closing, on_bad_row=on_bad_row)
    except OptionError as error:
        problems += [f"{here}: {problem}" for problem in error.problems]
        return None
    except (DataError, PluginError) as error:
        problems.append(f"{here}: {error}")
        return None
    problems += _shape_problems(here, loaded, plugin, reader)
    return loaded


def _shape_problems(
    here: str, loaded: LoadedData, plugin: Registered | None, reader: DataReader
) -> list[str]:
    """Say so where a plugin does not take examples of this shape."""
    wanted = plugin.spec.example if plugin is not None else None
    if plugin is None or wanted is None or loaded.shape == wanted:
        return []
    takers = [
        item.spec.name
        for item in reader.registry.of_kind(plugin.kind)
        if item.spec.example == loaded.shape
    ]
    hint = f"; for these rows use {' or '.join(takers)}" if takers else ""
    return [
        f"{here}: needs {wanted} examples, and {loaded.description} holds {loaded.shape} "
        f"examples (format {loaded.format}){hint}"
    ]


def _missing_packages(plugin: Registered, config: Any) -> list[str]:
    """Name the packages that a step needs and that are not installed."""
    needs = [(name, plugin.spec.hint or f"pip install {name}") for name in plugin.spec.requires]
    for logger in getattr(config, "loggers", ()):
        if logger != "none":
            needs.append((logger, f"pip install 'tunesmith[{logger}]'"))
    optimizer = OPTIMIZERS.get(getattr(config, "optimizer", ""))
    if optimizer is not None and optimizer.package:
        needs.append((optimizer.package, f"pip install 'tunesmith[{optimizer.package}]'"))
    return [
        f"needs the package '{name}', which is not installed; install it with: {command}"
        for name, command in needs
        if importlib.util.find_spec(name) is None
    ]


def _quantizer(steps: tuple[PlannedStep, ...]) -> Quantizer[Any] | None:
    """Return the quantizer; None if there is no such step, or it has a problem of its own."""
    step = _first(steps, "quantizers")
    if step is None or step.config is None:
        return None
    quantizer: Quantizer[Any] | None = _built(step)
    return quantizer


def check_base(plan: Plan, base: Path) -> None:
    """Look at a model that was not here yet when the plan was made, now that it is.

    Errors: `PlanError` with every problem, as `make_plan` finds them for a directory.
    """
    assert plan.model is not None
    if plan.model.kind == "directory":
        return
    problems: list[str] = []
    quantizer = _quantizer(plan.steps)
    source = ModelSource(plan.model.name, "directory", base)
    _with_model(plan.recipe, plan.steps, source, base, quantizer, problems, [])
    if problems:
        raise PlanError(problems)


def _with_model(
    recipe: Recipe,
    steps: tuple[PlannedStep, ...],
    model: ModelSource,
    directory: Path,
    quantizer: Quantizer[Any] | None,
    problems: list[str],
    notes: list[str],
) -> tuple[tuple[PlannedStep, ...], ModelFindings | None]:
    """Look at the model; return the steps, told how it is stored, and what was found."""
    with trusting(recipe.trust_remote_code), quiet_libraries():
        if model.kind == "gguf":  # its header was read; the rest can be told once it is converted
            return steps, gguf_findings(model)
        uses = [
            Use(
                step.here,
                getattr(step.config, "max_length", None),
                (*step.data.examples, *step.data.held_out) if step.data is not None else (),
            )
            for step in steps
            if step.verb.takes_data
        ]
        if model.given is not None:
            found, stored = examine_object(
                model.given, chat_template=recipe.chat_template, uses=uses, root=directory
            )
        else:
            try:
                stored = stored_quantization(directory)
                here = bool(weight_files(directory)) or model.kind == "directory"
            except ModelError as error:
                problems.append(str(error))
                return steps, None
            found = examine(
                directory,
                chat_template=recipe.chat_template,
                uses=uses,
                stored=stored,
                weights=here,
            )
        problems += found.problems
        notes += found.notes
        if stored is not None and found.skeleton is not None:
            where = directory if model.given is None else None
            steps = _with_stored(steps, model, stored, where, quantizer, problems)
    return steps, found


def _with_stored(
    steps: tuple[PlannedStep, ...],
    model: ModelSource,
    stored: Mapping[str, Any],
    directory: Path | None,
    quantizer: Quantizer[Any] | None,
    problems: list[str],
) -> tuple[PlannedStep, ...]:
    """Add how a model that is stored quantized is taken, or why it cannot be."""
    step = _first(steps, "quantizers")
    if step is not None and quantizer is None:
        return steps  # the step has a problem of its own
    here = f"model {model.name}" if step is None else step.here
    try:
        text = (quantizer or Quantizer(None)).check_stored(stored, directory)
    except TunesmithError as error:
        problems.append(f"{here}: {error}")
        return steps
    return tuple(attrs.evolve(each, stored=text) if each is step else each for each in steps)


def _with_held(
    steps: tuple[PlannedStep, ...],
    shapes: Shapes,
    device: Device,
    quantizer: Quantizer[Any] | None,
    problems: list[str],
) -> tuple[PlannedStep, ...]:
    """Add what a quantizer holds of the model, or why it can hold nothing."""
    step = _first(steps, "quantizers")
    if step is None or quantizer is None or step.stored:
        return steps
    try:
        found = quantizer.split(shapes.model)
    except TunesmithError as error:
        problems.append(f"{step.here}: {error}")
        return steps
    if found is None:
        return steps
    from tunesmith.nn.quantizable import described

    itemsize = ITEMSIZE[device.precision]
    held = sum(quantizer.nbytes(shape, itemsize) for shape in found.targets.values())
    lines = tuple(described(found, held, itemsize, device.precision))
    return tuple(attrs.evolve(each, holds=lines) if each is step else each for each in steps)


def _with_adapted(
    steps: tuple[PlannedStep, ...], shapes: Shapes, problems: list[str]
) -> tuple[PlannedStep, ...]:
    """Add what a method adapts of the model, or why it cannot."""
    done: list[PlannedStep] = []
    for step in steps:
        if step.verb.kind == "methods" and step.config is not None:
            method = _built(step)
            with quiet_libraries():
                found = method.check(shapes.model)
                text = "" if found else method.describe(shapes.model)
            problems += [f"{step.here}: {problem}" for problem in found]
            step = attrs.evolve(step, adapts=text)
        done.append(step)
    return tuple(done)


def _with_estimates(
    steps: tuple[PlannedStep, ...],
    shapes: Shapes,
    device: Device,
    quantizer: Quantizer[Any] | None,
    seed: int,
    notes: list[str],
) -> tuple[PlannedStep, ...]:
    done: list[PlannedStep] = []
    at_work: Any = None
    methods = methods_at(steps)
    for step in steps:
        if step.verb.kind == "quantizers":
            # the first one has been told how the model is stored
            told = quantizer if step is _first(steps, "quantizers") else None
            at_work = told or _built(step)
        if step.flag("makes_model"):
            at_work = None
        if step.verb.kind == "trainers" and step.data is not None:
            method = methods[step.number]
            try:
                found = estimate_step(
                    _built(step),
                    step.data.examples,
                    at_work,
                    None if method is None else _built(method),
                    shapes,
                    conditions_of(
                        device,
                        seed,
                        shapes.model,
                        trains_base=method is None or bool(method.flag("trains_base")),
                    ),
                    device.name,
                )
            except Exception as error:
                notes.append(f"{step.name}: not predicted: {type(error).__name__}: {error}")
            else:
                step = attrs.evolve(step, estimate=found)
                if found.memory_bytes > device.memory_bytes:
                    notes.append(
                        f"{step.name}: is predicted to need {byte_size(found.memory_bytes)} and "
                        f"{device.name} has {byte_size(device.memory_bytes)}; "
                        "lower batch_size or max_length, or set gradient_checkpointing=True"
                    )
        done.append(step)
    return tuple(done)


def _first(steps: tuple[PlannedStep, ...], kind: str) -> PlannedStep | None:
    """Return the first step that a plugin of a kind does."""
    return next((step for step in steps if step.verb.kind == kind), None)


def _built(step: PlannedStep) -> Any:
    """Return the implementation of a step, or None if it cannot be loaded."""
    assert step.plugin is not None
    try:
        return step.plugin.load()(step.config)
    except (PluginError, ImportError):
        return None
