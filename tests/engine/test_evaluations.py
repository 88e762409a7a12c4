"""A training with held-out rows is measured at both ends, and told when it gets worse."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tunesmith import Tuner
from tunesmith.engine.evaluations import _Evaluations
from tunesmith.plugin.events import Progress, Warned

QUICK: dict[str, Any] = {"batch_size": 2, "gradient_accumulation": 1, "warmup": 0}


def run(tuner: Tuner, directory: Any) -> tuple[Any, list[Any], list[dict[str, Any]]]:
    events: list[Any] = []
    result = tuner.run(
        directory, progress=False, listeners=[lambda run, event: events.append(event)]
    )
    [stage] = [each.path for each in result.stages]
    rows = [json.loads(row) for row in (stage / "log.jsonl").read_text().splitlines()]
    return result, events, rows


def evaluated(rows: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in rows if "eval_loss" in row]


def test_it_is_evaluated_before_the_first_step_and_after_the_last(
    tiny_model, alpaca_file, tmp_path
):
    tuner = Tuner(tiny_model).lora(r=2)
    tuner = tuner.sft(alpaca_file, max_steps=5, eval_split=3, eval_steps=2, **QUICK)
    result, events, rows = run(tuner, tmp_path / "run")
    assert evaluated(rows) == [0, 2, 4, 5]
    metrics = result.metrics["02-sft"]
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert metrics["eval_loss_first"] == losses[0]
    assert metrics["eval_loss"] == losses[-1]
    first = next(event for event in events if isinstance(event, Progress))
    assert (first.step, first.loss, first.metrics["eval_loss"]) == (0, None, losses[0])
    assert first.eta_seconds < 0  # nothing is known of the time yet


def test_what_it_begins_with_is_what_the_model_says_without_training(
    tiny_model, alpaca_file, tmp_path
):
    tuner = Tuner(tiny_model).evaluate("loss", alpaca_file)
    untrained = tuner.run(tmp_path / "base", progress=False).metrics["01-evaluate-loss"]["loss"]
    tuner = Tuner(tiny_model).lora(r=2)
    tuner = tuner.sft(alpaca_file, epochs=1, eval_data=str(alpaca_file), **QUICK)
    result, _, rows = run(tuner, tmp_path / "run")
    assert evaluated(rows) == [0, 6]
    assert result.metrics["02-sft"]["eval_loss_first"] == pytest.approx(untrained, rel=1e-3)


def test_without_held_out_rows_nothing_is_evaluated(tiny_model, alpaca_file, tmp_path):
    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file, max_steps=1, **QUICK)
    result, _, rows = run(tuner, tmp_path / "run")
    assert evaluated(rows) == []
    assert "eval_loss_first" not in result.metrics["02-sft"]


def test_what_is_told_is_of_the_weights_that_are_kept(tiny_model, alpaca_file, tmp_path):
    tuner = Tuner(tiny_model).lora(r=2)
    tuner = tuner.sft(
        alpaca_file, epochs=10, eval_split=3, early_stopping=1, learning_rate=0.1, **QUICK
    )
    result, events, rows = run(tuner, tmp_path / "run")
    losses = [row["eval_loss"] for row in rows if "eval_loss" in row and row["step"]]
    assert losses[-1] > min(losses), "this is no test unless the last one is worse"
    assert result.metrics["02-sft"]["eval_loss"] == min(losses)
    [told] = [event.text for event in events if isinstance(event, Warned)]
    assert "02-sft: eval_loss has risen from" in told


class _State:
    log_history: tuple[Any, ...] = ()
    max_steps = 40

    def __init__(self, step: int) -> None:
        self.global_step = step


class _Arguments:
    load_best_model_at_end = False


def warned(*losses: float) -> list[str]:
    """Return what is said of eval losses at step 0, 10, 20, ..."""
    told: list[str] = []
    callback = _Evaluations("02-sft", told.append)
    callback.on_train_begin(_Arguments(), _State(0), None)
    for number, loss in enumerate(losses):
        callback.on_evaluate(_Arguments(), _State(10 * number), None, {"eval_loss": loss})
    callback.on_train_end(_Arguments(), _State(40), None)
    return told


def test_a_loss_that_falls_is_no_reason_to_warn():
    assert warned(2.0, 1.5, 1.2, 1.204) == []


def test_a_loss_that_rises_is_told_once_with_both_steps():
    [told] = warned(2.0, 1.5, 1.6, 1.7)
    assert "eval_loss has risen from 1.5 (step 10) to 1.6 (step 20)" in told
    assert "early_stopping=1" in told


def test_a_loss_that_ends_above_where_it_began_is_told():
    rose, ends = warned(2.0, 1.5, 2.5)
    assert "has risen from 1.5" in rose
    assert "the model ends with eval_loss 2.5, and began with 2" in ends
