"""Listens to a transformers.Trainer and turns what it logs into events and a log file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
from transformers import TrainerCallback

from tunesmith.engine.memory import StageMemory
from tunesmith.plugin.events import Event, Progress

__all__ = ["ProgressCallback"]

CLOCKS = frozenset({"train_runtime", "train_tokens_per_second", "total_flos"})
"""What transformers logs of its own clock; the events carry theirs."""

LAST_SHARE = 0.1
"""The reported figures of a training are means over this last share of the steps."""

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

    def __init__(
        self,
        stage: str,
        emit: Callable[[Event], None],
        path: Path,
        memory: StageMemory | None = None,
    ) -> None:
        self.stage = stage
        self.emit = emit
        self.path = path
        self.memory = memory or StageMemory()
        self.began = time.perf_counter()
        self.first_step = 0
        self.first_tokens = 0
        self.logged: list[_Logged] = []
        self.evaluated: list[tuple[int, dict[str, float]]] = []
        self.kept_step: int | None = None
        self.tokens = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock; a resumed training starts at the step it stopped at."""
        self.began = time.perf_counter()
        self.memory.begin()
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
                eta_seconds=left * elapsed / done if done else -1.0,
                memory_bytes=self.memory.peak(),
                metrics={k: v for k, v in row.items() if k not in ("loss", "step", LOSS_OVER)},
            )
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note of which step the weights are, where the best ones are put back."""
        self.kept_step = state.best_global_step if args.load_best_model_at_end else None

    def metrics(self) -> dict[str, float]:
        """Return the training's figures, speed and peak memory.

        What is logged of the training is a mean over the last tenth of its steps, `loss_first` the
        first loss. Of the evaluations it is that of the weights which are kept, the last one or the
        best; `eval_loss_first` is the loss before the first step.
        """
        elapsed = max(1e-9, time.perf_counter() - self.began)
        found: dict[str, float] = {}
        if self.logged and "loss" in self.logged[0].means:
            found["loss_first"] = self.logged[0].means["loss"]
        found |= _means_of_last(self.logged)
        if self.evaluated:
            step, first = self.evaluated[0]
            if step == 0 and "eval_loss" in first:
                found["eval_loss_first"] = first["eval_loss"]
            found |= next(
                (values for step, values in self.evaluated if step == self.kept_step),
                self.evaluated[-1][1],
            )
        found["tokens"] = float(self.tokens)
        found["tokens_per_second"] = (self.tokens - self.first_tokens) / elapsed
        found["memory_bytes"] = float(self.memory.peak())
        return found

    def _recall(self, state: Any) -> None:
        """Take up the log of the steps before an interruption, and forget any beyond it."""
        self.logged.clear()
        self.evaluated.clear()
        kept = [_row(row["step"], row) for row in state.log_history]
        self._write(kept, "w")
        for row in kept:
            self._note(row)
            self.tokens = int(row.get("num_input_tokens_seen", self.tokens))

    def _note(self, logs: dict[str, float]) -> None:
        step = int(logs["step"])
        told = {
            key: float(value)
            for key, value in logs.items()
            if isinstance(value, (int, float))
            and (key == "loss" or key not in BESIDE)
            and not key.endswith(("per_second", "runtime"))
        }
        measured = {key: value for key, value in told.items() if key.startswith("eval_")}
        means = {key: value for key, value in told.items() if key not in measured}
        if measured:
            self.evaluated.append((step, measured))
        if means:
            steps = step - (self.logged[-1].step if self.logged else 0)
            self.logged.append(_Logged(step, steps, means, float(logs.get(LOSS_OVER, steps))))

    def _write(self, rows: list[dict[str, float]], mode: str) -> None:
        with self.path.open(mode, encoding="utf-8") as stream:
            for row in rows:
                stream.write(json.dumps(row) + "\n")


def _row(step: int, logs: dict[str, float]) -> dict[str, float]:
    """Return what was logged at a step as log.jsonl holds it, which is no clock."""
    return {"step": step, **{key: value for key, value in logs.items() if key not in CLOCKS}}


@attrs.frozen
class _Logged:
    """What a training has logged at a step: means over all the steps since the log before."""

    step: int
    steps: int
    means: Mapping[str, float]
    over: float
    """What they weigh beside others: trained tokens, pairs, or steps where nothing is counted."""


def _means_of_last(logged: Sequence[_Logged]) -> dict[str, float]:
    """Return each mean over the last share of the steps, or over a little more if logs are rare."""
    if not logged:
        return {}
    wanted = max(1, round(logged[-1].step * LAST_SHARE))
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for each in logged for name in each.means):
        taken: list[_Logged] = []
        for each in reversed(logged):
            if sum(other.steps for other in taken) >= wanted:
                break
            if name in each.means:
                taken.append(each)
        weight = sum(each.over for each in taken)
        if weight:
            found[name] = sum(each.means[name] * each.over for each in taken) / weight
        else:
            found[name] = taken[0].means[name]
    return found
