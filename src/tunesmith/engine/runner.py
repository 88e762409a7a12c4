"""Runs a plan: folds its steps over a session, and keeps what each has done."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import attrs

from tunesmith.engine.alone import alone
from tunesmith.engine.durable import told
from tunesmith.engine.identity import fingerprints, lock_of
from tunesmith.engine.models import local_directory
from tunesmith.engine.plan import Plan, PlannedStep, check_base, make_plan
from tunesmith.engine.quiet import quiet_libraries
from tunesmith.engine.result import RunResult
from tunesmith.engine.room import require_room_for_run
from tunesmith.engine.session import open_session
from tunesmith.engine.signals import current, outlook_of
from tunesmith.engine.steps import Place, Work, work_of
from tunesmith.engine.store import RunStore, Stage, finished_stages
from tunesmith.engine.traces import recipe_text
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
from tunesmith.plugin.options import plain_options
from tunesmith.plugin.registry import Registry
from tunesmith.plugin.session import Session
from tunesmith.recipe import Recipe

__all__ = ["Listener", "run"]

Listener = Callable[[Any, Event], None]


def run(
    recipe: Recipe, directory: Path, registry: Registry, listeners: Sequence[Listener] = ()
) -> RunResult:
    """Do what a recipe says in a run directory, reusing stages that are already done.

    Errors: `PlanError` with every problem, before anything is written; `RunError` for a directory
    that is in use, or beside another run of this process; what a plugin raises, with the stage
    named in a note.
    """
    with alone(f"the run in {directory}"):
        plan = make_plan(recipe, registry, directory=directory, estimates=False)
        plan.raise_if_problems()
        with (
            RunStore(directory) as store,
            quiet_libraries(),
            trusting(recipe.trust_remote_code),
        ):
            return _Runner(plan, registry, store, listeners).run()


@attrs.define
class _Runner:
    plan: Plan
    registry: Registry
    store: RunStore
    listeners: Sequence[Listener]

    @property
    def path(self) -> Path:
        """The run directory: what listeners may read of a run."""
        return self.store.path

    def run(self) -> RunResult:
        began = time.perf_counter()
        assert self.plan.model is not None
        kept = [step for step in self.plan.steps if step.verb.leaves_stage]
        self.store.warn = lambda text: self.emit(Warned(text))
        self.emit(RunStarted(tuple(step.name for step in kept)))
        base = local_directory(self.plan.model)
        check_base(self.plan, base)
        hashes = self._resolve(base, kept)
        session = self._open(base, hashes)
        stages: list[Stage] = []
        for step in self.plan.steps:
            current().check()
            work = work_of(step.step.verb)
            stage = None
            if step.verb.leaves_stage:
                stage = self.store.find(step.name, hashes[step.number])
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

    def emit(self, event: Event) -> None:
        """Tell the listeners and the plugins; one that fails is named and passed over."""
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
        done = {stage.name: stage.fingerprint for stage in finished_stages(self.path)}
        unfinished = [
            step
            for step in self.plan.steps
            if not step.verb.leaves_stage or done.get(step.name) != hashes[step.number]
        ]
        require_room_for_run(self.path, unfinished, base, device.precision)
        return open_session(self.plan.recipe, base, device.name, device.precision)

    def _make(self, step: PlannedStep, fingerprint: str, session: Session, work: Work) -> Stage:
        """Do a step's work in its own directory and keep it as a stage."""
        self.emit(StageStarted(step.name))
        began = time.perf_counter()
        directory = self.store.begin(step.name, fingerprint)
        current().outlook = partial(outlook_of, step.name, directory / "checkpoints")
        place = Place(
            directory, self.path, self.registry, self.emit, self.store.put_aside, self.plan.steps
        )
        try:
            with told(directory, within=directory):
                made = work.do(step, session, place)
        except Exception as error:
            error.add_note(f"in stage {step.name} of {self.path}")
            raise
        stage = self.store.finish(
            Stage(
                name=step.name,
                path=directory,
                verb=step.step.verb,
                plugin=step.plugin.key if step.plugin else step.step.plugin,
                fingerprint=fingerprint,
                options=plain_options(step.config),
                metrics=made.metrics,
                artefacts={
                    name: path.relative_to(directory).as_posix()
                    for name, path in made.artefacts.items()
                },
                seconds=round(time.perf_counter() - began, 3),
            )
        )
        current().outlook = lambda: f"run the same again, which goes on after {step.name}"
        self.emit(StageFinished(step.name, stage.seconds, stage.metrics))
        return stage
