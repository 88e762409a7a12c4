"""A run that goes on from a checkpoint makes the bytes of one that was never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.runs import at_every_step, copies_at_checkpoints, differences, made
from tunesmith import Tuner
from tunesmith.engine.runner import run
from tunesmith.plugin.events import StageReused, Warned
from tunesmith.plugin.registry import registry

QUICK = {"batch_size": 2, "gradient_accumulation": 1, "learning_rate": 1e-2, "warmup": 0}
KINDS = {
    "constant, one step left over": {"max_steps": 4, "scheduler": "constant"},
    "dropout, accumulation": {"epochs": 2, "gradient_accumulation": 4, "method": {"dropout": 0.2}},
    "early stopping": {
        "epochs": 6,
        "learning_rate": 0.3,
        "eval_split": 3,
        "early_stopping": 1,
        "batch_size": 4,
    },
    "early stopping by steps": {
        "max_steps": 9,
        "learning_rate": 0.1,
        "scheduler": "constant",
        "eval_split": 3,
        "early_stopping": 2,
        "eval_steps": 1,
    },
    "evaluated each epoch": {"epochs": 2, "eval_split": 2, "batch_size": 4},
    "packing": {"epochs": 3, "packing": True, "max_length": 64},
    "full fine-tuning": {"max_steps": 4, "method": None},
    "logged every third step": {"max_steps": 7, "logging_steps": 3},
    "warmup, cosine": {"max_steps": 5, "warmup": 2, "scheduler": "cosine"},
    "warmup, evaluated at both ends": {
        "max_steps": 5,
        "warmup": 3,
        "scheduler": "linear",
        "eval_split": 3,
        "eval_steps": 2,
    },
    "sgd": {"max_steps": 3, "optimizer": "sgd"},
    "adafactor": {"max_steps": 3, "optimizer": "adafactor"},
    "linear with checkpointing": {
        "max_steps": 3,
        "scheduler": "linear",
        "gradient_checkpointing": True,
        "weight_decay": 0.1,
    },
    "warmup_stable_decay": {"max_steps": 5, "scheduler": "inverse_sqrt", "warmup": 1},
    "own seed": {"max_steps": 7, "seed": 7, "epochs": 2},
}
PAIRS = {
    "dpo": {"max_steps": 3},
    "dpo, logged every second step": {"epochs": 2, "logging_steps": 2, "batch_size": 4},
    "dpo, evaluated": {"epochs": 2, "eval_split": 2, "batch_size": 4},
}
SAMPLE = {
    "constant, one step left over",
    "dropout, accumulation",
    "early stopping by steps",
    "warmup, evaluated at both ends",
}


def recipe_of(kind: str, model: Path, rows: Path, pairs: Path):
    options = {**QUICK, **(KINDS.get(kind) or PAIRS[kind])}
    method = options.pop("method", {})
    tuner = Tuner(model)
    if method is not None:
        tuner = tuner.lora(r=2, **method)
    tuner = tuner.dpo(pairs, **options) if kind in PAIRS else tuner.sft(rows, **options)
    return tuner.recipe


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in SAMPLE else pytest.mark.slow)
        for kind in (*KINDS, *PAIRS)
    ],
)
def test_a_run_goes_on_from_every_checkpoint_to_the_same_bytes(
    kind, tiny_model, alpaca_file, preference_file, tmp_path, monkeypatch
):
    at_every_step(monkeypatch)
    recipe = recipe_of(kind, tiny_model, alpaca_file, preference_file)
    whole = tmp_path / "whole"
    copies = copies_at_checkpoints(monkeypatch, recipe, whole)
    assert len(copies) >= 2
    for name, copy in copies.items():
        events: list = []
        run(recipe, copy, registry(), [lambda run, event, events=events: events.append(event)])
        told = [event.text for event in events if isinstance(event, Warned)]
        assert any("goes on from checkpoint-" in text for text in told), told
        assert differences(made(copy), made(whole)) == [], name


def test_a_finished_run_keeps_no_checkpoint_that_was_not_asked_for(
    tiny_model, alpaca_file, tmp_path, monkeypatch
):
    at_every_step(monkeypatch)
    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file, max_steps=2, **QUICK)
    run(tuner.recipe, tmp_path / "run", registry())
    assert not list((tmp_path / "run").rglob("checkpoint*"))
    events: list = []
    run(tuner.recipe, tmp_path / "run", registry(), [lambda run, event: events.append(event)])
    assert any(isinstance(event, StageReused) for event in events)
