"""Runs a plan: folds its steps over a session, and keeps what each has done."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import attrs

from tunesmith.engine.alone import alone
from tunesmith.engine.durable import told
from tunesmith.engine.models import describe_model, local_directory
from tunesmith.engine.plan import Plan, PlannedStep, check_base, make_plan
from tunesmith.engine.quiet import quiet_libraries
from tunesmith.engine.result import RunResult
from tunesmith.engine.room import require_room_for_run
from tunesmith.engine.session import open_session
from tunesmith.engine.signals import current, outlook_of
from tunesmith.engine.store import RunStore, Stage, finished_stages
from tunesmith.engine.traces import recipe_text
from tunesmith.engine.training import StageTraining
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
from tunesmith.recipe import Recipe, plain

__all__ = ["Listener", "run"]

Listener = Callable[[Any, Event], None]

VERSIONED = ("tunesmith", "torch", "transformers", "peft", "accelerate", "tokenizers")
"""Packages whose version decides whether a finished stage is still what would be made today."""

NEUTRAL_OPTIONS = frozenset({"loggers", "logging_steps", "save_steps"})
"""Options that say how a stage is watched and not what it makes."""


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
        kept = [step for step in self.plan.steps if step.step.verb in _STAGES]
        self.store.warn = lambda text: self.emit(Warned(text))
        self.emit(RunStarted(tuple(step.name for step in kept)))
        assert self.plan.model is not None
        base = local_directory(self.plan.model)
        check_base(self.plan, base)
        lock = self._lock(base)
        fingerprints = self._fingerprints(lock)
        for name, target in self.store.supersede(
            {step.name: fingerprints[step.number] for step in kept}
        ):
            self.emit(Warned(f"{name} was made by another recipe; it is kept in {target}"))
        self.store.write_recipe(recipe_text(self.plan.recipe))
        self.store.write_lock(
            {**lock, "fingerprints": {s.name: fingerprints[s.number] for s in kept}}
        )
        device = self.plan.device
        assert device is not None
        require_room_for_run(self.path, self._unfinished(fingerprints), base, device.precision)
        session = open_session(self.plan.recipe, base, device.name, device.precision)
        stages: list[Stage] = []
        for step in self.plan.steps:
            current().check()
            work = getattr(self, step.step.verb)
            if step.step.verb not in _STAGES:
                work(step, session)
                continue
            stage = self.store.find(step.name, fingerprints[step.number])
            if stage is not None:
                self.emit(StageReused(step.name))
            else:
                stage = self._make(step, fingerprints[step.number], session, work)
            self._take(step, stage, session)
            stages.append(stage)
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

    def _unfinished(self, fingerprints: Mapping[int, str]) -> list[PlannedStep]:
        """Return the steps that are still to be done; those that leave no stage are among them."""
        done = {stage.name: stage.fingerprint for stage in finished_stages(self.path)}
        return [
            step
            for step in self.plan.steps
            if step.step.verb not in _STAGES or done.get(step.name) != fingerprints[step.number]
        ]

    def _make(
        self, step: PlannedStep, fingerprint: str, session: Session, work: Callable[..., Any]
    ) -> Stage:
        """Do a step's work in its own directory and keep it as a stage."""
        self.emit(StageStarted(step.name))
        began = time.perf_counter()
        directory = self.store.begin(step.name, fingerprint)
        current().outlook = partial(outlook_of, step.name, directory / "checkpoints")
        try:
            with told(directory, within=directory):
                metrics = work(step, session, directory)
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
                options=plain(attrs.asdict(step.config)),
                metrics=metrics,
                seconds=round(time.perf_counter() - began, 3),
            )
        )
        current().outlook = lambda: f"run the same again, which goes on after {step.name}"
        self.emit(StageFinished(step.name, stage.seconds, stage.metrics))
        return stage

    def _take(self, step: PlannedStep, stage: Stage, session: Session) -> None:
        """Let the session go on from a finished stage."""
        session.metrics[step.name] = stage.metrics
        if step.step.verb == "train":
            if stage.adapter is not None:
                session.use_adapter(_adapter_label(step, session), stage.adapter)
            elif stage.model is not None:
                session.use_directory(stage.model)
        elif step.step.verb == "export" and stage.model is not None:
            session.use_directory(stage.model)

    # one method a verb

    def quantize(self, step: PlannedStep, session: Session) -> None:
        session.use_quantizer(self.registry.build(step.step))

    def peft(self, step: PlannedStep, session: Session) -> None:
        session.use_method(self.registry.build(step.step))

    def train(self, step: PlannedStep, session: Session, directory: Path) -> Mapping[str, float]:
        training = StageTraining(
            step, session, directory, self.registry, self.emit, self.path, self.store.put_aside
        )
        return training.run()

    def evaluate(self, step: PlannedStep, session: Session, directory: Path) -> Mapping[str, float]:
        import torch
        from transformers import set_seed

        from tunesmith.engine.guards import check_measured

        assert step.data is not None
        metric = self.registry.build(step.step)
        model = session.model
        model.eval()
        set_seed(session.seed)
        with torch.no_grad():
            measured = metric.measure(session, [row.example for row in step.data.examples])
        values = {name: float(value) for name, value in measured.items()}
        check_measured(step.name, values, model)
        return values

    def export(self, step: PlannedStep, session: Session, directory: Path) -> Mapping[str, float]:
        target = directory / "model"
        target.mkdir()
        session.unload()
        session.samples = _samples(self.plan.steps)
        self.registry.build(step.step).export(session, target)
        session.unload()
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
        return {"bytes": float(size)}

    # what the run is resolved to

    def _lock(self, base: Path) -> dict[str, Any]:
        """Return what decides the outcome of the run, as lock.json keeps it."""
        assert self.plan.device is not None
        versions = {name: _version(name) for name in VERSIONED}
        plugins = {}
        for step in self.plan.steps:
            if step.plugin is not None:
                plugins[step.plugin.key] = step.plugin.version
                versions |= {name: _version(name) for name in step.plugin.spec.requires}
        return {
            "versions": versions,
            "python": platform.python_version(),
            "platform": sys.platform,
            "device": self.plan.device.name,
            "precision": self.plan.device.precision,
            "model": describe_model(base, self.plan.recipe),
            "plugins": plugins,
            "data": {
                step.name: {
                    "description": data.description,
                    "format": data.format,
                    "rows": len(data.examples),
                    "sha256": data.fingerprint,
                }
                for step in self.plan.steps
                for data in (step.data,)
                if data is not None
            },
        }

    def _fingerprints(self, lock: Mapping[str, Any]) -> dict[int, str]:
        """Return a hash for each step over all that its outcome depends on, earlier steps included.

        An evaluation changes nothing for what comes after it, so it is no link of the chain.
        """
        recipe = self.plan.recipe
        shared = {key: lock[key] for key in ("versions", "device", "precision")} | {
            "model": lock["model"]["sha256"],
            "code": lock["model"]["code"],
            "seed": recipe.seed,
            "template": recipe.chat_template,
        }
        chain = _digest(shared)
        found: dict[int, str] = {}
        for step in self.plan.steps:
            assert step.plugin is not None
            options = {
                key: value
                for key, value in plain(attrs.asdict(step.config)).items()
                if key not in NEUTRAL_OPTIONS
            }
            own = {
                "verb": step.step.verb,
                "plugin": step.plugin.key,
                "version": step.plugin.version,
                "options": options,
                "data": step.data.fingerprint if step.data else None,
                "format": step.data.format if step.data else None,
                "eval_data": step.eval_data.fingerprint if step.eval_data else None,
            }
            found[step.number] = _digest({"before": chain, **own})
            if step.step.verb != "evaluate":
                chain = found[step.number]
        return found


_STAGES = frozenset({"train", "evaluate", "export"})
"""Verbs whose work is kept; the others only say how the model is loaded."""


def _adapter_label(step: PlannedStep, session: Session) -> str:
    """Return the step's label, or its numbered name where the label is taken."""
    return step.step.label if step.step.label not in session.adapters else step.name


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


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
