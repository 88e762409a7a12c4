"""What each verb does: `VERBS` names one of these classes a verb, and nobody else asks which it is.

A step does its work in a directory of its own (`do`), if it leaves a stage; and it says from where
the run goes on (`then`), from what it has just done as from what an earlier run has kept.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from tunesmith.data.clean import DropLog
from tunesmith.engine.store import MARKER, SAMPLES, Stage, read_lock
from tunesmith.errors import PluginError
from tunesmith.plugin.events import Event, RowsDropped
from tunesmith.plugin.registry import Registry
from tunesmith.plugin.session import RunRecord, Session
from tunesmith.recipe import VERBS, Recipe, Step, stage_name

if TYPE_CHECKING:
    from tunesmith.engine.plan import PlannedStep
    from tunesmith.plugin.exporters import Exporter

__all__ = ["Made", "Place", "Work", "fold", "work_of"]


DROPPED = "dropped.jsonl"


@attrs.frozen
class Place:
    """Where a step works, and whom it tells."""

    directory: Path
    """The stage's own; what is left in it is kept."""
    run: Path
    """The run directory."""
    registry: Registry
    emit: Callable[[Event], None]
    put_aside: Callable[[Path], Path]
    """Moves what is broken out of the way; returns where to."""
    steps: Sequence[PlannedStep]
    """All steps of the run."""
    callbacks: Sequence[Any] = ()
    """Each a `transformers.TrainerCallback`, told of every training of this process."""

    def list_drops(self, stage: str, drops: DropLog, total: int) -> None:
        """Write down, and tell, which of so many rows a stage does not use."""
        if not len(drops):
            return
        drops.write(self.directory / DROPPED)
        path = self.run / "stages" / stage / DROPPED
        self.emit(RowsDropped(stage, len(drops), total, drops.reasons, path))


@attrs.frozen
class Made:
    """What a step has done."""

    metrics: Mapping[str, float] = attrs.field(factory=dict)
    artefacts: Mapping[str, Path] = attrs.field(factory=dict)
    """What others may find again, by name: files or directories in the step's own."""
    adapter_name: str = ""
    """Name of the adapter among them, if there is one."""


class Work:
    """A verb at work."""

    in_all_processes: ClassVar[bool] = False
    """Whether several processes do it together; else the main one does, and the others wait."""

    def do(self, step: PlannedStep, session: Session, place: Place) -> Made:
        """Do the work of a step that leaves a stage."""
        raise NotImplementedError

    def then(
        self, step: Step, name: str, session: Session, stage: Stage | None, registry: Registry
    ) -> Session:
        """Return the session after a step called `name`, which has left a stage, if it does."""
        return session


class Quantize(Work):
    """Says how base weights are loaded."""

    def then(
        self, step: Step, name: str, session: Session, stage: Stage | None, registry: Registry
    ) -> Session:
        return session.with_quantizer(registry.build(step))


class Peft(Work):
    """Says what of a model is trained."""

    def then(
        self, step: Step, name: str, session: Session, stage: Stage | None, registry: Registry
    ) -> Session:
        return session.with_method(registry.build(step), step.name)


class Use(Work):
    """Goes on with another one of the adapters that were trained."""

    def then(
        self, step: Step, name: str, session: Session, stage: Stage | None, registry: Registry
    ) -> Session:
        return session.using(step.plugin)


class Train(Work):
    """Trains, and keeps what was trained: an adapter, or the whole model."""

    in_all_processes = True

    def do(self, step: PlannedStep, session: Session, place: Place) -> Made:
        from tunesmith.engine.training import StageTraining

        made = StageTraining(step, session, place).run()
        if "adapter" not in made.artefacts:
            return made
        return attrs.evolve(made, adapter_name=session.naming or step.free_label(session.adapters))

    def then(
        self, step: Step, name: str, session: Session, stage: Stage | None, registry: Registry
    ) -> Session:
        if stage is not None and stage.adapter is not None:
            task = registry.find(step.kind, step.plugin).load().task
            return session.with_adapter(
                stage.adapter_name, stage.adapter, task=task, parent=session.current
            )
        if stage is not None and stage.model is not None:
            return session.with_base(stage.model, method=session.method)
        return session


class Evaluate(Work):
    """Measures the model as it stands."""

    def do(self, step: PlannedStep, session: Session, place: Place) -> Made:
        import torch
        from transformers import set_seed

        from tunesmith.engine.guards import check_measured
        from tunesmith.plugin.metrics import Measured

        assert step.data is not None
        drops = DropLog()
        drops.entries += step.data.dropped
        place.list_drops(step.name, drops, step.data.rows)
        metric = place.registry.build(step.step)
        session = session.at_work(task=metric.task)
        model = session.model
        model.eval()
        set_seed(session.seed)
        with torch.no_grad():
            measured = metric.measure(session, [row.example for row in step.data.examples])
        if not isinstance(measured, Measured):
            raise PluginError(
                f"the metric '{step.step.plugin}' returned a {type(measured).__name__}; it has to "
                "return tunesmith.plugin.metrics.Measured"
            )
        values = {name: float(value) for name, value in measured.values.items()}
        check_measured(step.name, values, model)
        if not measured.samples:
            return Made(values)
        file = place.directory / SAMPLES
        lines = [json.dumps(attrs.asdict(each), ensure_ascii=False) for each in measured.samples]
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return Made(values, {"samples": file})


class Export(Work):
    """Writes files that other programs open."""

    def do(self, step: PlannedStep, session: Session, place: Place) -> Made:
        exporter = place.registry.build(step.step)
        target = place.directory / ("model" if exporter.makes_model else "export")
        target.mkdir()
        session.unload()
        session = attrs.evolve(session, samples=_samples(place.steps))
        if exporter.reads_run:
            session = attrs.evolve(session, record=_record(step, place))
        artefacts = dict(exporter.export(session, target))
        session.unload()
        _check_artefacts(step, artefacts, target, exporter)
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
        made = Made({"bytes": float(size)}, artefacts)
        if not exporter.makes_adapter:
            return made
        return attrs.evolve(made, adapter_name=step.step.name or step.free_label(session.adapters))

    def then(
        self, step: Step, name: str, session: Session, stage: Stage | None, registry: Registry
    ) -> Session:
        if stage is not None and stage.model is not None:
            return session.with_base(stage.model)
        if stage is not None and stage.adapter is not None:
            item, config = registry.config_of(step)
            first = session.adapter(item.load().reads(config)[0])
            session = attrs.evolve(session, method=first.method, naming=step.name)
            return session.with_adapter(stage.adapter_name, stage.adapter, task=first.task)
        return session


def _record(step: PlannedStep, place: Place) -> RunRecord:
    """Return what the run's own files say of it, up to this step."""
    from tunesmith.engine.identity import record_of

    recipe = Recipe.from_yaml(place.run / MARKER)
    return record_of(recipe, place.steps, read_lock(place.run), step.number)


def work_of(verb: str) -> Work:
    """Return what does the work of a verb."""
    module, _, name = VERBS[verb].work.partition(":")
    made: Work = getattr(importlib.import_module(module), name)()
    return made


def fold(
    recipe: Recipe, session: Session, stages: Mapping[str, Stage], registry: Registry
) -> Session:
    """Return the session after a recipe's steps, or after the last finished one of a run cut short.

    `stages` are by name. Nothing is loaded.
    """
    finished = session
    for number, step in enumerate(recipe.steps, 1):
        name, verb = stage_name(number, step), VERBS[step.verb]
        stage = stages.get(name)
        if verb.leaves_stage and stage is None:
            if verb.is_link:  # what came before it was said for its sake
                return finished
            continue
        session = work_of(step.verb).then(step, name, session, stage, registry)
        if verb.leaves_stage:
            finished = session
    return session


def _check_artefacts(
    step: PlannedStep, artefacts: Mapping[str, Path], target: Path, exporter: Exporter[Any]
) -> None:
    wrong = [
        f"'{name}': {path} is not there"
        if not Path(path).exists()
        else f"'{name}': {path} is not within {target}"
        for name, path in artefacts.items()
        if not Path(path).exists() or not Path(path).resolve().is_relative_to(target.resolve())
    ]
    if not artefacts:
        wrong.append("it names none")
    for makes, name in ((exporter.makes_model, "model"), (exporter.makes_adapter, "adapter")):
        if makes and name not in artefacts:
            wrong.append(f"there is no '{name}', which the run is to go on with")
    if wrong:
        raise PluginError(
            f"the exporter '{step.step.plugin}' says otherwise than what it has made: "
            f"{'; '.join(wrong)}; it has to return the path of each artefact by name"
        )


def _samples(steps: Sequence[PlannedStep], count: int = 4) -> tuple[str, ...]:
    """Return the text of a few rows that a run reads, for an exporter to try its model on."""
    found: list[str] = []
    for step in steps:
        for row in islice(step.data.examples if step.data is not None else (), count):
            example: Any = row.example
            turns = [
                turn.content
                for part in ("messages", "prompt", "chosen", "completion")
                for turn in getattr(example, part, ())
            ]
            found.append(getattr(example, "text", None) or "\n".join(turns))
    return tuple(text for text in found if text)[:count]
