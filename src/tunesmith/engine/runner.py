"""Runs a plan: folds its steps over a session, and keeps what each has done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from tunesmith.engine.alone import alone
from tunesmith.engine.durable import told
from tunesmith.engine.effects import setup_before
from tunesmith.engine.identity import fingerprints, lock_of
from tunesmith.engine.models import ModelSource, local_directory
from tunesmith.engine.plan import Plan, PlannedStep, check_base, make_plan
from tunesmith.engine.quiet import quiet_libraries
from tunesmith.engine.result import RunResult
from tunesmith.engine.room import require_room_for_run
from tunesmith.engine.session import open_session
from tunesmith.engine.signals import current, outlook_of
from tunesmith.engine.steps import Made, Place, Work, work_of
from tunesmith.engine.store import RunStore, Stage, finished_stages
from tunesmith.engine.traces import recipe_text
from tunesmith.engine.world import World
from tunesmith.engine.world import current as current_world
from tunesmith.errors import OptionError, RunError
from tunesmith.nn.pretrained import trusting
from tunesmith.plugin.events import (
    Event,
    RunFinished,
    RunStarted,
    StageFinished,
    StageReused,
    StageStarted,
    Warned,
)
from tunesmith.plugin.registry import Registry
from tunesmith.plugin.session import Session
from tunesmith.recipe import Recipe

__all__ = ["Listener", "run"]

EVENT = "on_train_begin"
"""What every `transformers.TrainerCallback` has."""

Listener = Callable[[Any, Event], None]


def run(
    recipe: Recipe,
    directory: Path,
    registry: Registry,
    listeners: Sequence[Listener] = (),
    callbacks: Sequence[Any] = (),
) -> RunResult:
    """Do what a recipe says in a run directory, reusing stages that are already done.

    `callbacks` are `transformers.TrainerCallback`s, told of each training that is not reused;
    anything else among them is an `OptionError`.

    Errors: `PlanError` with every problem, before anything is written; `RunError` for a directory
    that is in use, or beside another run of this process; what a plugin raises, with the stage
    named in a note.

    Of several processes the main one alone writes into the directory and tells the listeners.
    """
    _check_callbacks(callbacks)
    world = current_world()
    with alone(f"the run in {directory}"), world.together():
        plan = make_plan(
            recipe, registry, directory=directory if world.main else None, estimates=False
        )
        plan.raise_if_problems()
        world.barrier()
        with (
            RunStore(directory) if world.main else nullcontext() as store,
            quiet_libraries(),
            trusting(recipe.trust_remote_code),
        ):
            return _Runner(plan, registry, directory, store, listeners, callbacks, world).run()


@attrs.define
class _Runner:
    plan: Plan
    registry: Registry
    path: Path
    """The run directory: what listeners may read of a run."""
    owned: RunStore | None
    """None in a process that does not own the directory."""
    listeners: Sequence[Listener]
    callbacks: Sequence[Any]
    world: World

    @property
    def store(self) -> RunStore:
        """The directory, for the process that owns it."""
        assert self.owned is not None
        return self.owned

    def run(self) -> RunResult:
        began = time.perf_counter()
        assert self.plan.model is not None
        kept = [step for step in self.plan.steps if step.verb.leaves_stage]
        if self.owned is not None:
            self.owned.warn = lambda text: self.emit(Warned(text))
        self.emit(RunStarted(tuple(step.name for step in kept)))
        for note in self.plan.notes:
            self.emit(Warned(note))
        base = self._base(self.plan.model)
        check_base(self.plan, base)
        hashes = self._resolve(base, kept)
        session = self._open(base, hashes)
        stages: list[Stage] = []
        for step in self.plan.steps:
            current().check()
            work = work_of(step.step.verb)
            stage = None
            if step.verb.leaves_stage:
                stage = self._shared(partial(self._found, step.name, hashes[step.number]))
                if stage is not None:
                    self.emit(StageReused(step.name))
                else:
                    stage = self._make(step, hashes[step.number], session, work)
                stages.append(stage)
                session = session.with_stage(
                    step.name, artefacts=stage.paths, metrics=stage.metrics
                )
            session = work.then(step.step, step.name, session, stage, self.registry)
        session.unload()
        self.emit(RunFinished(self.path, time.perf_counter() - began))
        return RunResult.from_stages(self.path, tuple(stages))

    def _base(self, model: ModelSource) -> Path:
        """Return the directory of the model: fetched, converted, written once for all processes."""
        base = local_directory(model) if self.world.main else None
        self.world.barrier()
        base = base or local_directory(model)
        if model.given is not None:
            main = Path(self.world.share(lambda: str(base)))
            if base != main:
                raise RunError(
                    f"the {model.name} of this process is another than that of the main one, "
                    f"which is kept in {main}; give every process the same weights"
                )
            # what is left of the run in its directory is to name what outlives this process
            recipe = attrs.evolve(self.plan.recipe, model=str(base))
            self.plan = attrs.evolve(self.plan, recipe=recipe)
        return base

    def emit(self, event: Event) -> None:
        """Tell the listeners and the plugins; one that fails is named and passed over."""
        if not self.world.main:
            return
        for listener in self.listeners:
            listener(self, event)
        answers = self.registry.each_hook("tunesmith_on_event", run=self, event=event)
        for distribution, answer in answers:
            if isinstance(answer, Exception) and not isinstance(event, Warned):
                self.emit(
                    Warned(f"plugin {distribution} failed on {type(event).__name__}: {answer}")
                )

    def _resolve(self, base: Path, kept: Sequence[PlannedStep]) -> Mapping[int, str]:
        """Write down what the run is resolved to; return each step's fingerprint by its number."""
        return dict(self.world.share(lambda: list(self._written(base, kept).items())))

    def _written(self, base: Path, kept: Sequence[PlannedStep]) -> Mapping[int, str]:
        lock = lock_of(self.plan, base)
        hashes = fingerprints(self.plan, lock)
        wanted = {step.name: hashes[step.number] for step in kept}
        for name, target in self.store.supersede(wanted):
            self.emit(Warned(f"{name} was made by another recipe; it is kept in {target}"))
        self.store.write_recipe(recipe_text(self.plan.recipe))
        self.store.write_lock({**lock, "fingerprints": wanted})
        return hashes

    def _open(self, base: Path, hashes: Mapping[int, str]) -> Session:
        """Return the session to begin with, if there is room for what is still to be made."""
        device = self.plan.device
        assert device is not None
        if self.world.main:
            self._require_room(base, hashes, device.precision)
        name = self.world.device(device.name)
        return open_session(self.plan.recipe, base, name, device.precision)

    def _require_room(self, base: Path, hashes: Mapping[int, str], precision: str) -> None:
        done = {stage.name: stage.fingerprint for stage in finished_stages(self.path)}
        unfinished = [
            step
            for step in self.plan.steps
            if not step.verb.leaves_stage or done.get(step.name) != hashes[step.number]
        ]
        require_room_for_run(self.path, unfinished, base, precision)

    def _found(self, name: str, fingerprint: str) -> Stage | None:
        return self.store.find(name, fingerprint)

    def _shared(self, make: Callable[[], Stage | None]) -> Stage | None:
        """Return the stage that the owner of the directory makes or finds."""
        made: list[Stage | None] = []

        def record() -> dict[str, Any] | None:
            made.append(make())
            return None if made[0] is None else {**made[0].to_dict(), "path": str(made[0].path)}

        told = self.world.share(record)
        if self.world.main or told is None:
            return made[0] if made else None
        path = Path(told.pop("path"))
        self.world.sees(path)
        return Stage(path=path, **told)

    def _make(self, step: PlannedStep, fingerprint: str, session: Session, work: Work) -> Stage:
        """Do a step's work in its own directory and keep it as a stage."""
        self.emit(StageStarted(step.name))
        began = time.perf_counter()
        directory = Path(self.world.share(lambda: str(self.store.begin(step.name, fingerprint))))
        current().outlook = partial(outlook_of, step.name, directory / "checkpoints")
        aside = self.owned.put_aside if self.owned is not None else _not_owned
        place = Place(
            directory, self.path, self.registry, self.emit, aside, self.plan.steps, self.callbacks
        )
        made = Made()
        try:
            with told(directory, within=directory):
                if self.world.main or work.in_all_processes:
                    made = work.do(step, session, place)
        except Exception as error:
            note = f"in stage {step.name} of {self.path}"
            if note not in getattr(error, "__notes__", ()):  # another process may have said so
                error.add_note(note)
            raise
        stage = self._shared(
            lambda: self.store.finish(self._record(step, fingerprint, directory, made, began))
        )
        assert stage is not None
        current().outlook = lambda: f"run the same again, which goes on after {step.name}"
        self.emit(StageFinished(step.name, stage.seconds, stage.metrics))
        return stage

    def _record(
        self, step: PlannedStep, fingerprint: str, directory: Path, made: Made, began: float
    ) -> Stage:
        return Stage(
            name=step.name,
            path=directory,
            verb=step.step.verb,
            plugin=step.plugin.key if step.plugin else step.step.plugin,
            fingerprint=fingerprint,
            options=step.effective,
            setup=setup_before(self.plan.steps, step),
            metrics=made.metrics,
            artefacts={
                name: path.relative_to(directory).as_posix()
                for name, path in made.artefacts.items()
            },
            adapter_name=made.adapter_name,
            seconds=round(time.perf_counter() - began, 3),
        )


def _check_callbacks(callbacks: Sequence[Any]) -> None:
    """Raise for what no trainer can tell anything, before any work is done."""
    wrong = [each for each in callbacks if isinstance(each, type) or not hasattr(each, EVENT)]
    if wrong:
        raise OptionError(
            [
                f"callbacks: got {each!r}; expected an object of a class of "
                "transformers.TrainerCallback; a function (run, event) goes to listeners"
                for each in wrong
            ]
        )


def _not_owned(path: Path) -> Path:
    raise AssertionError(f"{path} belongs to the main process")
