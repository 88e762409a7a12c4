"""Checkpoints for any `transformers.Trainer`: when one is taken, what it holds, how it goes on.

A trainer plugin hands back a Trainer of its own or of a library; `keep_checkpoints` puts a class
over the trainer's that saves and loads in the host's way, so that a training which goes on from a
checkpoint makes the very bytes of one that was never stopped. It overrides methods that
transformers keeps for itself (`OVERRIDDEN`); a release that has others is refused by name.
"""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from tunesmith.engine.checkpoints import Checkpoint, Checkpoints, Contents
from tunesmith.engine.states import StateError, encode
from tunesmith.engine.world import World, current
from tunesmith.errors import RunError

if TYPE_CHECKING:
    import torch

__all__ = ["Keeper", "Pace", "keep_checkpoints"]

OVERRIDDEN = (
    "_save_checkpoint",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_scaler",
    "_load_rng_state",
    "_load_callback_state",
    "_load_best_model",
    "_maybe_log_save_evaluate",
    "_run_epoch",
)

GATHERED = ("_measured", "_metrics", "_total_train_tokens")
"""Attributes in which trainers, TRL's among them, gather what they log until the next log."""


@attrs.define
class Pace:
    """When a checkpoint is taken that nobody asked for: by time, and never dearly."""

    seconds: float = 600.0
    """At most so long between two."""
    share: float = 0.1
    """After this share of the steps, if `least` has passed since the last one."""
    least: float = 60.0
    dearest: float = 0.05
    """At most this share of the time is spent on them."""
    _last: float = attrs.field(factory=time.monotonic, init=False)
    _last_step: int = attrs.field(default=0, init=False)
    _cost: float = attrs.field(default=0.0, init=False)

    def start(self, step: int) -> None:
        """Count from now and from this step."""
        self._last, self._last_step = time.monotonic(), step

    def due(self, step: int, steps: int) -> bool:
        """Return whether one is due after this step of so many."""
        passed = time.monotonic() - self._last
        if passed * self.dearest < self._cost:
            return False
        shared = step - self._last_step >= self.share * steps and passed >= self.least
        return passed >= self.seconds or shared

    def taken(self, step: int, began: float) -> None:
        """Note one that was begun at a time of `time.monotonic`."""
        self._cost = time.monotonic() - began
        self.start(step)


@attrs.define
class Keeper:
    """What a trainer's checkpoints need beside the trainer."""

    checkpoints: Checkpoints
    warn: Callable[[str], None]
    pace: Pace | None
    """None where only those are taken that the options ask for."""
    resumed: Checkpoint | None = None
    check: Callable[[bool], None] = lambda over: None
    """Called before a save, with whether the training is over; raises if nothing is to be kept."""
    states: Mapping[str, Any] = attrs.field(factory=dict)
    """States of the checkpoint that the training goes on from, until they are taken up."""
    buffers: dict[str, tuple[int, int]] = attrs.field(factory=dict)
    """Identity and version of each buffer before the first step."""
    steps_in_epoch: int = 0
    epoch_generators: Any = None
    """The random number generators as the epoch began: its order is drawn from them."""
    at_epoch_end: bool = False
    deferred: bool = False
    within_step: bool = False
    """Whether some of an optimizer step's forward passes are done."""
    stopped: bool = False
    """Whether a callback has stopped the training before its end, as a signal does."""
    ended: bool = False
    """Whether the training has come to its own end, as it does when patience is spent."""
    saved_step: int = -1
    world: World = attrs.field(factory=current)

    def over(self, trainer: Any) -> bool:
        """Return whether the training has come to its own end."""
        state, control = trainer.state, trainer.control
        if state.global_step >= state.max_steps or _patience_is_spent(trainer):
            return True
        return bool(control.should_training_stop and not self.stopped)


def keep_checkpoints(
    trainer: Any,
    checkpoints: Checkpoints,
    resumed: Checkpoint | None,
    warn: Callable[[str], None],
    pace: Pace | None,
) -> Keeper:
    """Let a trainer save to, and go on from, checkpoints that are complete or not there."""
    import transformers

    missing = [name for name in OVERRIDDEN if not hasattr(trainer, name)]
    if missing:
        raise RunError(
            f"transformers {transformers.__version__} has no Trainer.{missing[0]}, by which "
            "checkpoints are kept; install the release that constraints.txt names"
        )
    keeper = Keeper(checkpoints, warn, pace, resumed)
    kind = type(trainer)
    trainer.__class__ = type(kind.__name__, (_mixin(), kind), {"__module__": kind.__module__})
    trainer.tunesmith_keeper = keeper
    trainer.add_callback(_callback(keeper, trainer))
    keeper.buffers = {name: _mark(buffer) for name, buffer in _model(trainer).named_buffers()}
    return keeper


def _mixin() -> type:
    """Return the class that goes over a trainer's; a function, so that listing imports no torch."""

    class KeepsCheckpoints:
        """Saves and loads checkpoints in the host's way."""

        tunesmith_keeper: Keeper

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            _save(self, self.tunesmith_keeper)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            keeper = self.tunesmith_keeper
            assert keeper.resumed is not None
            keeper.states = _own_states(keeper.checkpoints.states(keeper.resumed), keeper)
            _put_weights(_model(self), keeper.checkpoints.weights(keeper.resumed), keeper)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            keeper: Any = self.tunesmith_keeper
            trainer: Any = self
            if checkpoint is None or keeper.resumed.over:
                return
            trainer.optimizer.load_state_dict(keeper.states["optimizer"])
            trainer.lr_scheduler.load_state_dict(keeper.states["scheduler"])

        def _load_scaler(self, checkpoint: str | None) -> None:
            scaler = _scaler(self)
            held = self.tunesmith_keeper.states.get("scaler")
            if checkpoint is not None and scaler is not None and held is not None:
                scaler.load_state_dict(held)

        def _load_rng_state(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                _set_generators(self.tunesmith_keeper.states["generators"])

        def _load_callback_state(self) -> None:
            _put_callback_states(self)

        def _load_best_model(self) -> None:
            keeper = self.tunesmith_keeper
            trainer: Any = self
            keeper.world.barrier()  # the main process may be writing it
            best = keeper.checkpoints.at(trainer.state.best_global_step)
            if best is None:
                raise RunError(
                    f"{keeper.checkpoints.directory}: the best weights, of step "
                    f"{trainer.state.best_global_step}, are not there; run the same again"
                )
            _put_weights(_model(self), keeper.checkpoints.weights(best), keeper)

        def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
            keeper = self.tunesmith_keeper
            trainer: Any = self
            if _decide(trainer, keeper):
                super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
                keeper.ended = keeper.over(trainer)

        def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
            keeper = self.tunesmith_keeper
            trainer: Any = self
            if keeper.resumed is not None and keeper.resumed.over:
                trainer.control.should_training_stop = True
                return
            keeper.steps_in_epoch = kwargs["num_update_steps_per_epoch"]
            if keeper.states:
                # the order of the rows is drawn when the epoch begins
                within = kwargs["steps_trained_in_current_epoch"] > 0
                _set_generators(keeper.states["epoch_generators" if within else "generators"])
            keeper.epoch_generators = _generators()
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]
            keeper.states = {}

    return KeepsCheckpoints


def _callback(keeper: Keeper, trainer: Any) -> Any:
    from transformers import TrainerCallback

    class Listens(TrainerCallback):  # type: ignore[misc]
        """Notes where the loop stands, and takes up what was gathered before an interruption."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            state.compute_steps(args, state.max_steps)
            best = keeper.checkpoints.at(state.best_global_step)
            state.best_model_checkpoint = None if best is None else str(best.path)
            if keeper.pace is not None:
                keeper.pace.start(state.global_step)
            if keeper.states:
                _put_gathered(trainer, keeper.states["gathered"])

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            keeper.at_epoch_end = False

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            keeper.at_epoch_end = True

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            keeper.within_step = True

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            keeper.within_step = False

    return Listens()


def _decide(trainer: Any, keeper: Keeper) -> bool:
    """Decide whether a checkpoint is taken now; return whether the loop reports and evaluates.

    At the end of an epoch, and of the training, it waits for the evaluation that comes then: a
    training that goes on from there must not evaluate again, nor leave it out.
    """
    state, control = trainer.state, trainer.control
    ends_epoch = bool(keeper.steps_in_epoch) and state.global_step % keeper.steps_in_epoch == 0
    if keeper.at_epoch_end:
        reached = state.global_step >= state.max_steps
        if control.should_training_stop and not (reached or keeper.ended):
            keeper.stopped = True
        if keeper.stopped and (keeper.within_step or not ends_epoch):
            return False  # cut short: an undisturbed training evaluates nothing here
        if keeper.deferred or control.should_training_stop:
            control.should_save = True
        keeper.deferred = False
    else:
        reached = state.global_step >= state.max_steps
        if control.should_training_stop and not reached:
            keeper.stopped = True
        due = keeper.pace is not None and keeper.pace.due(state.global_step, state.max_steps)
        due = bool(keeper.world.most(due))  # the main process has the clock
        if due or reached or keeper.stopped:
            control.should_save = True
        if control.should_save and (ends_epoch or reached):
            keeper.deferred, control.should_save = True, False
    return True


def _save(trainer: Any, keeper: Keeper) -> None:
    state = trainer.state
    if keeper.saved_step == state.global_step:
        return
    keeper.saved_step = state.global_step
    began = time.monotonic()
    over = keeper.over(trainer)
    keeper.check(over)
    trainer.store_flos()
    best = state.best_global_step if trainer.args.load_best_model_at_end else None
    own, *others = keeper.world.gather(
        {
            "generators": _generators(),
            "epoch_generators": keeper.epoch_generators,
            "gathered": _gathered(trainer),
        }
    )
    if not keeper.world.main:
        written = keeper.checkpoints.know(state.global_step, over=over, best_step=best)
        if best == state.global_step:  # each has to know, for all wait for it at the end
            state.best_model_checkpoint = str(written.path)
        return
    states: dict[str, Any] = {**own, "others": others} if others else own
    if not over:
        scaler = _scaler(trainer)
        states |= {
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
    contents = Contents(_trained(_model(trainer), keeper), states, _trainer_state(trainer))
    try:
        written = keeper.checkpoints.write(state.global_step, contents, over=over, best_step=best)
    except StateError as error:
        if trainer.args.load_best_model_at_end:
            raise RunError(
                f"the best weights cannot be kept: {error}, and nothing is pickled; leave "
                "early_stopping out, or choose another optimizer"
            ) from error
        keeper.warn(
            f"no checkpoint is kept of this training: {error}, and nothing is pickled; an "
            "interrupted run begins this stage anew"
        )
        keeper.pace = None
        return
    if best == state.global_step:
        state.best_model_checkpoint = str(written.path)
    if keeper.pace is not None:
        keeper.pace.taken(state.global_step, began)


def _own_states(states: dict[str, Any], keeper: Keeper) -> dict[str, Any]:
    """Return what a process of several is to go on with: each has its own random numbers."""
    others = states.pop("others", [])
    if len(others) + 1 != keeper.world.size:
        raise RunError(
            f"{keeper.checkpoints.directory}: the checkpoint is of {len(others) + 1} processes, "
            f"and there are {keeper.world.size}; start as many, or delete it to begin anew"
        )
    return states if keeper.world.main else {**states, **others[keeper.world.rank - 1]}


def _model(trainer: Any) -> torch.nn.Module:
    model: torch.nn.Module = trainer.model
    return model


def _mark(buffer: torch.Tensor) -> tuple[int, int]:
    return id(buffer), -1 if buffer.is_inference() else buffer._version


def _trained(model: torch.nn.Module, keeper: Keeper) -> dict[str, torch.Tensor]:
    """Return what training changes: weights that learn, and buffers that are not as they were."""
    found: dict[str, torch.Tensor] = {
        name: weight for name, weight in model.named_parameters() if weight.requires_grad
    }
    for name, buffer in model.named_buffers():
        if keeper.buffers.get(name) != _mark(buffer):
            found[name] = buffer
    return found


def _put_weights(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], keeper: Keeper
) -> None:
    """Put weights of a checkpoint into the model; they must be just those that it trains."""
    import torch

    parameters = dict(model.named_parameters())
    buffers = dict(model.named_buffers())
    wanted = {name for name, weight in parameters.items() if weight.requires_grad}
    strange = (wanted - set(weights)) | (set(weights) - set(parameters) - set(buffers))
    strange |= {
        name
        for name, weight in weights.items()
        if name not in strange and weight.shape != (parameters.get(name, buffers.get(name))).shape  # type: ignore[union-attr]
    }
    if strange:
        raise RunError(
            f"{keeper.checkpoints.directory}: the checkpoint is of another model: "
            f"{sorted(strange)[0]} does not fit; delete it to begin the stage anew"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            (parameters[name] if name in parameters else buffers[name]).copy_(weight)


def _generators() -> dict[str, Any]:
    """Return the states of every generator that a training draws from."""
    import numpy as np
    import torch

    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_generators(states: Mapping[str, Any]) -> None:
    import numpy as np
    import torch

    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["torch"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def _scaler(trainer: Any) -> Any:
    return getattr(trainer.accelerator, "scaler", None)


def _gathered(trainer: Any) -> dict[str, Any]:
    """Return what is summed up between two logs."""
    loss = trainer._tr_loss
    return {
        "loss": float(loss),
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        "attributes": {
            name: getattr(trainer, name)
            for name in GATHERED
            if hasattr(trainer, name) and _has_a_form(getattr(trainer, name))
        },
    }


def _has_a_form(value: Any) -> bool:
    try:
        encode(value, {})
    except StateError:
        return False
    return True


def _put_gathered(trainer: Any, gathered: Mapping[str, Any]) -> None:
    trainer._tr_loss += gathered["loss"]
    trainer._total_loss_scalar = gathered["total_loss"]
    trainer._globalstep_last_logged = gathered["last_logged"]
    for name, value in gathered["attributes"].items():
        _put(trainer, name, value)


def _put(holder: Any, name: str, value: Any) -> None:
    """Set an attribute; a dictionary keeps its kind, such as one with a default."""
    present = getattr(holder, name)
    if not isinstance(present, dict) or not isinstance(value, dict):
        setattr(holder, name, value)
        return
    for key, item in value.items():
        if isinstance(present.get(key), dict) and isinstance(item, dict):
            present[key].clear()
            present[key].update(item)
        else:
            present[key] = item


def _trainer_state(trainer: Any) -> str:
    """Return the trainer's state as JSON, the states of its callbacks in it; no path of a disk."""
    from transformers.trainer_callback import ExportableState

    states: dict[str, Any] = {}
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    held = dataclasses.asdict(
        dataclasses.replace(
            trainer.state, best_model_checkpoint=None, stateful_callbacks={}, log_history=[]
        )
    )
    held |= {"log_history": trainer.state.log_history, "stateful_callbacks": states}
    return json.dumps(held, indent=2, sort_keys=True) + "\n"


def _put_callback_states(trainer: Any) -> None:
    """Give the callbacks back what they had counted; only what they say themselves is set."""
    from transformers.trainer_callback import ExportableState

    held = {name: list(rows) for name, rows in trainer.state.stateful_callbacks.items()}
    for callback in trainer.callback_handler.callbacks:
        rows = held.get(type(callback).__name__)
        if not isinstance(callback, ExportableState) or not rows:
            continue
        own = callback.state().get("attributes", {})
        for name, value in rows.pop(0).get("attributes", {}).items():
            if name in own:
                setattr(callback, name, value)


def _patience_is_spent(trainer: Any) -> bool:
    from transformers import EarlyStoppingCallback

    return any(
        callback.early_stopping_patience_counter >= callback.early_stopping_patience
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, EarlyStoppingCallback)
    )
