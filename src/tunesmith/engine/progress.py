"""Listens to a transformers.Trainer and turns what it logs into events and a log file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from transformers import TrainerCallback

from tunesmith.plugin.events import Event, Progress

__all__ = ["ProgressCallback", "peak_memory_bytes"]

CLOCKS = frozenset({"train_runtime", "train_tokens_per_second", "total_flos"})
"""What transformers logs of its own clock; the events carry theirs."""

LAST_SHARE = 0.1
"""The reported loss is the mean over this last share of the steps."""

LOSS_OVER = "loss_over"
"""Logged by a trainer that counts: how many trained tokens or pairs `loss` is the mean over."""

BESIDE = CLOCKS | {
    "epoch",
    "grad_norm",
    "learning_rate",
    "loss",
    LOSS_OVER,
    "num_input_tokens_seen",
    "step",
    "step_time",
    "train_loss",
}
"""What is logged beside a training's figures; of these the loss is told as a mean."""


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Emits a Progress event at each log and writes it to log.jsonl."""

    def __init__(self, stage: str, emit: Callable[[Event], None], path: Path) -> None:
        self.stage = stage
        self.emit = emit
        self.path = path
        self.began = time.perf_counter()
        self.first_step = 0
        self.first_tokens = 0
        self.losses: list[_Loss] = []
        self.last: dict[str, float] = {}
        self.tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; a resumed training starts at the step it stopped at."""
        self.began = time.perf_counter()
        self.first_step = state.global_step
        self.first_tokens = int(state.num_input_tokens_seen)
        if state.global_step:
            self._recall(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Have the last steps logged too, where they fill no window."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Pass on what was logged; the closing summary of a training is not a step."""
        if not logs or "train_loss" in logs:
            return
        row = _row(state.global_step, logs)
        self._write([row], "a")
        self._note(row)
        self.tokens = int(state.num_input_tokens_seen)
        elapsed = max(1e-9, time.perf_counter() - self.began)
        done = state.global_step - self.first_step
        left = state.max_steps - state.global_step
        self.emit(
            Progress(
                stage=self.stage,
                step=state.global_step,
                total=state.max_steps,
                loss=row.get("loss"),
                tokens=self.tokens,
                tokens_per_second=(self.tokens - self.first_tokens) / elapsed,
                eta_seconds=left * elapsed / done if done else 0.0,
                memory_bytes=peak_memory_bytes(),
                metrics={k: v for k, v in row.items() if k not in ("loss", "step", LOSS_OVER)},
            )
        )

    def metrics(self) -> dict[str, float]:
        """Return the training's figures: loss at its start and end, last evaluation, speed."""
        elapsed = max(1e-9, time.perf_counter() - self.began)
        found: dict[str, float] = {}
        if self.losses:
            found["loss_first"] = self.losses[0].mean
            found["loss"] = _mean_of_last(self.losses)
        found |= {
            key: value
            for key, value in self.last.items()
            if key not in BESIDE and not key.endswith(("per_second", "runtime"))
        }
        found["tokens"] = float(self.tokens)
        found["tokens_per_second"] = (self.tokens - self.first_tokens) / elapsed
        return found

    def _recall(self, state: Any) -> None:
        """Take up the log of the steps before an interruption, and forget any beyond it."""
        self.losses.clear()
        kept = [_row(row["step"], row) for row in state.log_history]
        self._write(kept, "w")
        for row in kept:
            self._note(row)
            self.tokens = int(row.get("num_input_tokens_seen", self.tokens))

    def _note(self, logs: dict[str, float]) -> None:
        if "loss" in logs:
            step = int(logs["step"])
            before = self.losses[-1].step if self.losses else 0
            steps = step - before
            self.losses.append(_Loss(step, steps, float(logs["loss"]), logs.get(LOSS_OVER, steps)))
        self.last |= {key: float(v) for key, v in logs.items() if isinstance(v, (int, float))}

    def _write(self, rows: list[dict[str, float]], mode: str) -> None:
        with self.path.open(mode, encoding="utf-8") as stream:
            for row in rows:
                stream.write(json.dumps(row) + "\n")


def _row(step: int, logs: dict[str, float]) -> dict[str, float]:
    """Return what was logged at a step as log.jsonl holds it, which is no clock."""
    return {"step": step, **{key: value for key, value in logs.items() if key not in CLOCKS}}


@attrs.frozen
class _Loss:
    """A logged loss: a mean over all the steps since the one logged before."""

    step: int
    steps: int
    mean: float
    over: float
    """What it weighs beside others: trained tokens, pairs, or steps where nothing is counted."""


def _mean_of_last(losses: list[_Loss]) -> float:
    """Return the mean over the last share of the steps, or over a little more if logs are rare."""
    wanted = max(1, round(losses[-1].step * LAST_SHARE))
    taken = losses[-1:]
    for each in reversed(losses[:-1]):
        if sum(loss.steps for loss in taken) >= wanted:
            break
        taken.append(each)
    return sum(loss.mean * loss.over for loss in taken) / sum(loss.over for loss in taken)


def peak_memory_bytes() -> int:
    """Return the peak so far: device memory on CUDA, else this process's resident set."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return int(torch.cuda.max_memory_allocated())
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
