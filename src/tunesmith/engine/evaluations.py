"""Evaluations within a training: before its first step, after its last, and when they get worse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from transformers import TrainerCallback

__all__ = ["evaluated_from_the_start"]

WORSE = 0.005
"""Share by which an eval loss may rise above the best so far without a word."""
LOSS = "eval_loss"


def evaluated_from_the_start(
    trainer: Any, stage: str, warn: Callable[[str], None], *, resumed: bool
) -> None:
    """Have a `transformers.Trainer` with held-out rows evaluate at both ends of its training.

    Before the first step, so that there is something to compare with, and after the last one. One
    that goes on from a checkpoint has done the former already. `warn` is told of an eval loss that
    rises, once, and of one that ends above where it began.
    """
    arguments: Any = getattr(trainer, "args", None)
    rows: Any = getattr(trainer, "eval_dataset", None)
    strategy = str(getattr(getattr(arguments, "eval_strategy", "no"), "value", "no"))
    if rows is None or strategy == "no":
        return
    arguments.eval_on_start = not resumed
    trainer.add_callback(_Evaluations(stage, warn))


class _Evaluations(TrainerCallback):  # type: ignore[misc]
    def __init__(self, stage: str, warn: Callable[[str], None]) -> None:
        self.stage = stage
        self.warn = warn
        self.losses: list[tuple[int, float]] = []
        """(step, eval loss) so far."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take up those of the steps before an interruption."""
        self.losses = list(_losses(state.log_history))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have the last step evaluated too, where the steps between do not end there."""
        if state.global_step >= state.max_steps and args.eval_strategy == "steps":
            control.should_evaluate = True

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        """Say so where an eval loss is worse than the best so far."""
        row: dict[str, Any] = {**(metrics or {}), "step": state.global_step}
        for step, loss in _losses([row]):
            before, self.losses = self.losses, [*self.losses, (step, loss)]
            if not before or _risen(before):
                continue  # nothing to compare with, or said already
            best_step, best = min(before, key=lambda each: each[1])
            if _worse(loss, best):
                self.warn(
                    f"{self.stage}: eval_loss has risen from {best:.4g} (step {best_step}) to "
                    f"{loss:.4g} (step {step}): what is learnt no longer helps on held-out rows; "
                    "early_stopping=1 keeps the best weights, fewer epochs or a lower "
                    "learning_rate may do as well"
                )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say so where the training has made the model worse on held-out rows."""
        if not self.losses or state.global_step < state.max_steps:
            return
        first_step, first = self.losses[0]
        last = self.losses[-1][1]
        if first_step == 0 and not args.load_best_model_at_end and _worse(last, first):
            self.warn(
                f"{self.stage}: the model ends with eval_loss {last:.4g}, and began with "
                f"{first:.4g}: on held-out rows it is worse than before; look at the data, or "
                "lower learning_rate"
            )


def _losses(history: Iterable[Mapping[str, Any]]) -> Iterable[tuple[int, float]]:
    for row in history:
        if isinstance(row.get(LOSS), (int, float)):
            yield int(row.get("step", 0)), float(row[LOSS])


def _worse(loss: float, than: float) -> bool:
    return loss > than + WORSE * abs(than)


def _risen(losses: list[tuple[int, float]]) -> bool:
    """Whether a loss has been worse than the best before it."""
    best = losses[0][1]
    for _, loss in losses[1:]:
        if _worse(loss, best):
            return True
        best = min(best, loss)
    return False
