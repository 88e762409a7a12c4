"""Stops a training at the first number that is none, and lets no broken weight be saved.

What is looked at is computed anyway: each loss, the norm of the gradients, what an evaluation
returns. All trained weights are looked at before a save, which reads them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tunesmith.engine.world import current as world
from tunesmith.errors import RunError

__all__ = ["Guard", "broken_base", "check_measured", "guarded"]

ROWS_NAMED = 8
TOKENS_TRIED = 64
"""Tokens that a trained model is asked about before it is kept."""


def check_measured(stage: str, values: Mapping[str, float], model: Any) -> None:
    """Raise `RunError` if a measured value is infinite or no number."""
    wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
    if wrong:
        said = ", ".join(f"{name} is {value}" for name, value in wrong.items())
        cause = broken_base(model) or (
            "the model's weights are finite numbers, so they overflow on the way through it: look "
            "at the data, or take another precision"
        )
        raise RunError(f"{stage}: {said}; {cause}")


def broken_base(model: Any) -> str | None:
    """Say which weights hold values that are no finite numbers; None if all are sound."""
    broken = _broken(model, trained=None)
    if not broken:
        return None
    return (
        f"{_listed(broken, 'tensor', 'tensors')} of the model's own weights hold values that are "
        "not finite numbers: the checkpoint is broken; get it anew, or take another one"
    )


@contextmanager
def guarded(trainer: Any, stage: str, rate: float) -> Iterator[Guard]:
    """Watch a `transformers.Trainer` of whatever kind while it trains.

    `rate` is its learning rate, for messages. Errors, all `RunError` with the step and the rows of
    its batches, where the trainer can name these: a loss or a gradient that is not finite (the
    update is then not made), an evaluation's value that is not, weights that are not before a save.
    """
    guard = Guard(trainer, stage, rate)
    stock_step: Callable[..., Any] = trainer.training_step
    stock_clip: Callable[..., Any] | None = getattr(trainer, "_clip_grad_norm", None)

    def training_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        guard.batches.append(inputs)
        loss = stock_step(model, inputs, *args, **kwargs)
        broken = not bool(torch.isfinite(loss).all())
        if world().most(broken):  # all stop here, with the rows of the process that has them
            if not broken:
                world().hear()
            guard.refuse_loss(float(loss.mean()), inputs)
        return loss

    def clip(*args: Any, **kwargs: Any) -> Any:
        assert stock_clip is not None
        norm = stock_clip(*args, **kwargs)
        # with a GradScaler a gradient may overflow: it skips that update, and scales less
        if getattr(trainer.accelerator, "scaler", None) is None and norm is not None:
            value = float(norm)
            if not math.isfinite(value):
                guard.refuse_gradient(value)
        return norm

    callback = _Watch(guard)
    vars(trainer)["training_step"] = training_step
    if stock_clip is not None:
        vars(trainer)["_clip_grad_norm"] = clip
    # the last one, so that it sees what the others want saved
    trainer.add_callback(callback)
    try:
        yield guard
    finally:
        trainer.remove_callback(callback)
        for name in ("training_step", "_clip_grad_norm"):
            vars(trainer).pop(name, None)


@attrs.define(eq=False)
class Guard:
    """What is known of the step at work, and how to say what is wrong with it."""

    trainer: Any
    stage: str
    rate: float
    batches: list[Any] = attrs.field(factory=list)
    """Batches of the optimizer step at work, or of the last one."""
    begun: bool = False
    """Whether an update has been made since the training began, or went on."""

    def refuse_loss(self, loss: float, batch: Any) -> None:
        """Raise for a loss that is not finite."""
        raise RunError(f"{self._here()}: the loss is {loss}{self._rows([batch])}; {self._cause()}")

    def refuse_gradient(self, norm: float) -> None:
        """Raise for gradients that are not finite, before they reach a weight."""
        raise RunError(
            f"{self._here()}: the loss is finite and the norm of its gradient is {norm}, so the "
            f"update is not made{self._rows(self.batches)}; {self._cause()}"
        )

    def check_weights(self) -> None:
        """Raise if a trained weight is not finite, as it must be before any save."""
        broken = _broken(self.trainer.model, trained=True)
        if broken:
            raise RunError(
                f"{self.stage}, after step {self.trainer.state.global_step}: "
                f"{self._overflow(broken)}"
            )

    def check_values(self, values: Mapping[str, Any]) -> None:
        """Raise if an evaluation's value is not finite."""
        wrong = [
            f"{name} is {value}"
            for name, value in values.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        if wrong:
            raise RunError(
                f"{self.stage}, evaluation after step {self.trainer.state.global_step}: "
                f"{', '.join(wrong)}; {self._cause()}"
            )

    def check_result(self) -> None:
        """Raise if the trained model is not fit to be kept: its weights, and what it makes of a few
        tokens, for the last loss was taken before the last update.
        """
        self.check_weights()
        ids = _few_tokens(self.batches[-1]) if self.batches else None
        if ids is None:
            return
        model = self.trainer.model
        model.eval()
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            logits = getattr(model(input_ids=ids, use_cache=False), "logits", None)
        # -inf may well stand for tokens that a model never says
        if logits is not None and bool((logits.isnan() | logits.isposinf()).any()):
            raise RunError(
                f"{self.stage}, after step {self.trainer.state.global_step}, the last one: what "
                f"the model says is not a number{self._rows(self.batches[-1:])}; {self._cause()}"
            )

    def _here(self) -> str:
        state = self.trainer.state
        return f"{self.stage}, step {state.global_step + 1} of {state.max_steps}"

    def _rows(self, batches: list[Any]) -> str:
        rows_of = getattr(self.trainer, "rows_of", None)
        names = [name for batch in batches for name in rows_of(batch)] if rows_of else []
        if not names:
            return ""
        more = f" and {len(names) - ROWS_NAMED} more" if len(names) > ROWS_NAMED else ""
        return f" on {', '.join(names[:ROWS_NAMED])}{more}"

    def _cause(self) -> str:
        model = self.trainer.model
        trained = _broken(model, trained=True)
        if trained and self.begun:
            return self._overflow(trained)
        if (base := broken_base(model)) is not None:
            return base
        return (
            "all weights are finite numbers, so they overflow on the way through the model; lower "
            f"learning_rate (now {self.rate:g}), take another precision, or look at these rows; "
            f"{self._kept()}"
        )

    def _overflow(self, broken: list[str]) -> str:
        return (
            f"an update has made {_listed(broken, 'trained tensor', 'trained tensors')} hold "
            f"values that are not finite numbers; lower learning_rate (now {self.rate:g}); "
            f"{self._kept()}"
        )

    def _kept(self) -> str:
        directory = Path(self.trainer.args.output_dir)
        last = get_last_checkpoint(str(directory)) if directory.is_dir() else None
        if last is None:
            return "nothing of it is saved"
        return f"nothing of it is saved, and {Path(last).name} is as it was"


class _Watch(TrainerCallback):  # type: ignore[misc]
    def __init__(self, guard: Guard) -> None:
        self.guard = guard

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.guard.batches.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.guard.begun = True
        if control.should_save:
            self.guard.check_weights()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            self.guard.check_weights()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        self.guard.check_values(metrics or {})


def _broken(model: Any, *, trained: bool | None) -> list[str]:
    """Return names of weights that are not finite: all, or those that are trained, or are not."""
    found = [
        name
        for name, weight in model.named_parameters()
        if trained in (None, weight.requires_grad) and not _sound(weight, torch.isfinite)
    ]
    if trained is not True:
        # an infinity may well stand in a mask that a model keeps
        found += [
            name
            for name, buffer in model.named_buffers()
            if not _sound(buffer, lambda each: ~torch.isnan(each))
        ]
    # as the checkpoint calls them, and not as PEFT does
    names = [name.removeprefix("base_model.model.") for name in found]
    return [name.replace(".base_layer.", ".") for name in names]


def _sound(tensor: torch.Tensor, holds: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    if tensor.device.type == "meta" or not tensor.is_floating_point():
        return True
    return bool(holds(tensor.detach()).all())


def _listed(names: list[str], one: str, many: str) -> str:
    if len(names) == 1:
        return f"1 {one} ({names[0]})"
    return f"{len(names)} {many} ({names[0]} first)"


def _few_tokens(batch: Any) -> torch.Tensor | None:
    """Return the first tokens of a batch's first row, int64 [1, length], if there are such."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or not ids.numel():
        return None
    mask = batch.get("attention_mask")
    row = ids[0] if mask is None else ids[0][mask[0].bool()]
    return row[None, :TOKENS_TRIED] if len(row) else None
