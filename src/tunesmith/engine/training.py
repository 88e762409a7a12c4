"""Trains one stage: rows, trainer, callbacks, where it goes on from, what is kept."""

from __future__ import annotations

import gc
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from tunesmith.data.clean import DropLog
from tunesmith.data.examples import Sourced
from tunesmith.engine.checkpoints import Checkpoint, Checkpoints
from tunesmith.engine.evaluations import evaluated_from_the_start
from tunesmith.engine.guards import guarded
from tunesmith.engine.memory import StageMemory
from tunesmith.engine.plan import PlannedStep
from tunesmith.engine.progress import ProgressCallback
from tunesmith.engine.resuming import Keeper, Pace, keep_checkpoints
from tunesmith.engine.room import paced_by_room
from tunesmith.engine.signals import current, stops_after_step
from tunesmith.engine.steps import Made, Place
from tunesmith.engine.warmup import warms_up_from_the_first_step
from tunesmith.engine.world import World
from tunesmith.engine.world import current as current_world
from tunesmith.errors import RunError
from tunesmith.plugin.events import RowsCut, Warned
from tunesmith.plugin.session import Session
from tunesmith.plugin.trainers import TrainingData

__all__ = ["StageTraining"]


@attrs.define
class StageTraining:
    """One training stage at work in its directory."""

    step: PlannedStep
    session: Session
    place: Place
    cuts: DropLog = attrs.field(factory=DropLog, init=False)
    """Rows that are used without the end of their answer."""
    world: World = attrs.field(factory=current_world, init=False)

    @property
    def seed(self) -> int:
        """Seed of the step: its option, or the recipe's."""
        own: int | None = self.step.config.seed
        return self.session.seed if own is None else own

    @property
    def directory(self) -> Path:
        """The stage's own."""
        return self.place.directory

    @property
    def checkpoints(self) -> Path:
        """Directory that the trainer writes into."""
        return self.directory / "checkpoints"

    def run(self) -> Made:
        """Train, keep the weights in the stage's directory, and return what was made."""
        from transformers import set_seed

        # loaded anew, before and after: what a stage does to a model in memory stays in it
        self.session.unload()
        plugin = self.place.registry.build(self.step.step)
        self.session = self.session.at_work(task=plugin.task, trains=True)
        memory = StageMemory()
        trainer = self._trainer(plugin)
        progress = self._listen(trainer, memory)
        keeper = self._keeper(trainer)
        warms_up_from_the_first_step(trainer)
        evaluated_from_the_start(
            trainer, self.step.name, self._warn, resumed=keeper.resumed is not None
        )
        resumed = str(keeper.resumed.path) if keeper.resumed is not None else None
        set_seed(self.seed)  # however many numbers rendering and building have drawn
        with guarded(trainer, self.step.name, self._rate()) as guard:
            keeper.check = lambda over: guard.check_result() if over else guard.check_weights()
            with stops_after_step(trainer):
                trainer.train(resume_from_checkpoint=resumed)
            current().check()
            guard.check_result()
        metrics = progress.metrics()
        if len(self.cuts):
            metrics["rows_cut"] = float(len(self.cuts))
        self._check_objective(plugin, metrics)
        try:
            # the others have the same weights, and wait for the stage to be kept
            artefacts = self._keep_weights(trainer.model) if self.world.main else {}
        except Exception as error:
            error.add_note(
                f"the trained weights are kept in {self.checkpoints}; run the same again, which "
                "goes on from there"
            )
            raise
        self.session.unload()
        if self.world.main:
            self._tidy()
        del trainer
        _release()
        return Made(metrics, artefacts)

    def _trainer(self, plugin: Any) -> Any:
        """Return the plugin's trainer, with every row that it cannot use told."""
        from transformers import set_seed

        assert self.step.data is not None
        drops = DropLog()
        train, evaluation = self._rows(drops)
        if self.world.main:
            self.checkpoints.mkdir(exist_ok=True)
        self.world.barrier()
        self.world.sees(self.checkpoints)
        set_seed(self.seed)
        trainer = plugin.build(
            self.session,
            TrainingData(train, evaluation, drops.add, self.cuts.add),
            self.checkpoints,
        )
        self._check_evaluates(trainer, evaluation)
        if self.world.several:
            self._check_shares(trainer)
        if self.world.main:
            self.place.list_drops(self.step.name, drops, self.step.data.rows)
            self._tell_cuts(self.step.data.rows)
        return trainer

    def _listen(self, trainer: Any, memory: StageMemory) -> ProgressCallback:
        """Add the callbacks; return the one that gathers the metrics."""
        from transformers import EarlyStoppingCallback, PrinterCallback

        log = self.directory / "log.jsonl" if self.world.main else Path(os.devnull)
        progress = ProgressCallback(self.step.name, self.place.emit, log, memory)
        # transformers' own printer writes each log to stdout, with its numbers turned into text
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(progress)
        for callback in self.place.callbacks:
            trainer.add_callback(callback)
        if self.step.config.early_stopping is not None:
            trainer.add_callback(EarlyStoppingCallback(self.step.config.early_stopping))
        return progress

    def _keeper(self, trainer: Any) -> Keeper:
        """Let the trainer keep checkpoints, and go on from the newest one there is."""
        config = self.step.config
        checkpoints = Checkpoints(
            self.checkpoints, self.place.put_aside, self._warn, config.checkpoints_kept
        )
        found = self._newest(checkpoints)
        # whoever asks for some gets those, and no others between them
        pace = Pace() if config.save_strategy is None and not config.save_steps else None
        short = None
        if self.world.main:
            short = paced_by_room(self.checkpoints, trainer.model, self.step.config)
        else:
            pace = None  # the main process says when
        if short is not None and pace is not None:
            self._warn(f"{self.step.name}: {short}")
            pace = None
        if found is not None:
            self._warn(f"{self.step.name} goes on from {found.path.name}")
        return keep_checkpoints(trainer, checkpoints, found, self._warn, pace)

    def _newest(self, checkpoints: Checkpoints) -> Checkpoint | None:
        """Return the checkpoint to go on from, which the main process has chosen."""
        known: list[list[Any]] = self.world.share(lambda: _found_by(checkpoints))
        if not self.world.main:
            for step, over, best_step in known:
                checkpoints.know(step, over=over, best_step=best_step)
        return checkpoints.at(known[0][0]) if known else None

    def _check_evaluates(self, trainer: Any, evaluation: Sequence[Sourced]) -> None:
        """Refuse a training that would not look at the rows that are held out for it."""
        strategy: Any = getattr(getattr(trainer, "args", None), "eval_strategy", "no")
        if not evaluation or getattr(strategy, "value", strategy) != "no":
            return
        raise RunError(
            f"{self.step.name}: {len(evaluation)} rows are held out to evaluate on, and the "
            f"trainer '{self.step.step.plugin}' does not evaluate; leave out eval_split, eval_data "
            "and splits of its data, or measure by an evaluate step"
        )

    def _check_shares(self, trainer: Any) -> None:
        """Refuse a training that is not of all processes; say what that makes of an update."""
        here = f"{self.step.name}: {self.world.size} processes"
        arguments: Any = getattr(trainer, "args", None)
        size = getattr(arguments, "world_size", None)
        if size != self.world.size:
            raise RunError(
                f"{here} were asked for, and the trainer '{self.step.step.plugin}' would train "
                f"{'in one' if size is None else f'in {size}'}, each the same; run it in one "
                "process, without torchrun"
            )
        batch, times = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
        self._warn(
            f"{here} with batch_size={batch} and gradient_accumulation={times}: an update is over "
            f"{size * batch * times} rows"
        )
        rows: Any = getattr(trainer, "train_dataset", None)
        count = len(rows) if hasattr(rows, "__len__") else 0
        if not getattr(trainer, "shares_rows", False) and count % (size * batch):
            self._warn(
                f"{here} do not divide {count} rows by batches of {batch}: up to "
                f"{size * batch - count % (size * batch)} rows are trained twice in each epoch"
            )

    def _warn(self, text: str) -> None:
        self.place.emit(Warned(text))

    def _keep_weights(self, model: Any) -> Mapping[str, Path]:
        """Save what was trained: an adapter, or the whole model; return it by name."""
        session = self.session
        model.eval()
        if session.method is not None and not session.method.saves_model:
            target = self.directory / "adapter"
            session.method.save(model, target)
            return {"adapter": target}
        from tunesmith.nn.saving import save_model

        target = self.directory / "model"
        target.mkdir(exist_ok=True)
        save_model(model, session.tokenizer, target, base=session.base)
        return {"model": target}

    def _tidy(self) -> None:
        logs = self.checkpoints / "runs"
        if logs.is_dir():  # where transformers' tensorboard callback writes
            logs.rename(self.directory / "tensorboard")

    def _check_objective(self, plugin: Any, metrics: Mapping[str, float]) -> None:
        """Refuse a training that has not logged what it optimizes, or not as a number."""
        name = plugin.objective
        if name is None:
            return
        value = metrics.get(name)
        if value is None or not math.isfinite(value):
            shutil.rmtree(self.checkpoints)
            raise RunError(
                f"{self.step.name}: the training {name} is {value}; nothing is kept of it; lower "
                f"learning_rate (now {self._rate():g}), or look at the data"
            )

    def _rate(self) -> float:
        """Return the learning rate the step runs with."""
        assert self.step.plugin is not None
        trainer = self.step.plugin.load()(self.step.config)
        rate: float = trainer.learning_rate(peft=not self.session.trains_base)
        return rate

    def _rows(self, drops: DropLog) -> tuple[Sequence[Sourced], Sequence[Sourced]]:
        """Return the rows to train on and to evaluate on, as the plan has found them."""
        data, held_out = self.step.data, self.step.eval_data
        assert data is not None
        drops.entries += data.dropped
        if held_out is None:
            return data.examples, data.held_out
        drops.entries += held_out.dropped
        return data.examples, held_out.examples

    def _tell_cuts(self, total: int) -> None:
        cuts = self.cuts
        if len(cuts):
            cuts.write(self.directory / "cut.jsonl")
            path = self.place.run / "stages" / self.step.name / "cut.jsonl"
            self.place.emit(RowsCut(self.step.name, len(cuts), total, cuts.reasons, path))


def _found_by(checkpoints: Checkpoints) -> list[list[Any]]:
    """Return (step, over, best step) of the checkpoint to go on from, and of those it needs."""
    found = checkpoints.begin()
    if found is None:
        return []
    others = [each for each in checkpoints.complete.values() if each is not found]
    return [[each.step, each.over, each.best_step] for each in (found, *others)]


def _release() -> None:
    """Let go of optimizer states and graph before the next stage."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
