"""A warm-up whose first step learns.

transformers' schedules begin at a learning rate of 0, so that the first step of each training moves
nothing. Here the first of W steps of warm-up has 1 / (W + 1) of the peak, the last one W / (W + 1),
and the step after them all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

__all__ = ["warms_up_from_the_first_step"]


def warms_up_from_the_first_step(trainer: Any) -> None:
    """Have a `transformers.Trainer` do so, if its schedule turns out to warm up as transformers do.

    What a schedule does is seen by trying; any other is left alone. Nothing of it is kept in a
    checkpoint but the step, as before.
    """
    stock: Callable[..., Any] | None = getattr(trainer, "create_scheduler", None)
    if stock is None:
        return

    def create_scheduler(num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        assert stock is not None
        scheduler = stock(num_training_steps, *args, **kwargs)
        _shift(scheduler, trainer.args.get_warmup_steps(num_training_steps))
        return scheduler

    vars(trainer)["create_scheduler"] = create_scheduler


def _shift(scheduler: Any, warmup: int) -> None:
    shares: list[Callable[[int], float]] | None = getattr(scheduler, "lr_lambdas", None)
    if not shares or warmup < 1 or not all(_rises(share, warmup) for share in shares):
        return
    scheduler.lr_lambdas = [_ahead(share, warmup) for share in shares]
    # it has set the rates of step 0 when it was made
    rates = [
        base * share(0)
        for base, share in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def _rises(share: Callable[[int], float], warmup: int) -> bool:
    """Whether a schedule goes straight from 0 to its peak."""
    return all(
        math.isclose(share(step), step / warmup, rel_tol=1e-9, abs_tol=1e-12)
        for step in {0, warmup // 2, warmup - 1}
    )


def _ahead(share: Callable[[int], float], warmup: int) -> Callable[[int], float]:
    def ahead(step: int) -> float:
        return (step + 1) / (warmup + 1) if step < warmup else share(step)

    return ahead
