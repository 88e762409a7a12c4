"""Whether a run fits on the disk is known before it begins, and before each checkpoint."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

from tests.engine.runs import at_every_step
from tunesmith import Tuner
from tunesmith.engine.runner import run
from tunesmith.errors import RunError
from tunesmith.plugin.events import StageStarted, Warned
from tunesmith.plugin.registry import registry

QUICK = {"batch_size": 4, "gradient_accumulation": 1, "max_steps": 3}
MIB = 1 << 20


@pytest.fixture
def free(monkeypatch):
    """Set how many bytes are free."""
    room = SimpleNamespace(total=10**12, used=0, free=10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    return room


def recorded(tuner, directory) -> list:
    events: list = []
    run(tuner.recipe, directory, registry(), [lambda run, event: events.append(event)])
    return events


@pytest.mark.parametrize("kind", ["full fine-tuning", "merge"])
def test_a_run_that_does_not_fit_is_refused_before_a_stage_begins(
    kind, free, tiny_model, alpaca_file, tmp_path
):
    tuner = Tuner(tiny_model)
    if kind == "merge":
        tuner = tuner.lora(r=2)
    tuner = tuner.sft(alpaca_file, **QUICK).merge()
    free.free = MIB + 1000
    events: list = []
    with pytest.raises(
        RunError, match=r"what the run makes needs .* KiB and .* are free.*make room"
    ):
        run(tuner.recipe, tmp_path / "run", registry(), [lambda run, event: events.append(event)])
    assert not any(isinstance(event, StageStarted) for event in events)
    free.free = 10**12
    recorded(tuner, tmp_path / "run")
    free.free = MIB + 1000  # nothing is left to do
    recorded(tuner, tmp_path / "run")


def test_a_training_whose_adapter_does_not_fit_is_refused_before_its_first_step(
    free, tiny_model, alpaca_file, tmp_path
):
    free.free = MIB
    with pytest.raises(RunError, match="what the training keeps needs"):
        recorded(Tuner(tiny_model).lora(r=2).sft(alpaca_file, **QUICK), tmp_path / "run")


def test_where_only_the_result_fits_it_is_said_that_no_checkpoint_is_taken(
    free, tiny_model, alpaca_file, tmp_path, monkeypatch
):
    at_every_step(monkeypatch)
    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file, **QUICK)
    free.free = MIB + 40_000
    told = [e.text for e in recorded(tuner, tmp_path / "run") if isinstance(e, Warned)]
    assert any("no checkpoint is taken before the end" in text for text in told)


def test_a_disk_that_fills_up_on_the_way_ends_the_run_and_keeps_the_checkpoint(
    free, tiny_model, alpaca_file, tmp_path, monkeypatch
):
    at_every_step(monkeypatch)
    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file, **QUICK)

    def fill(run, event):
        if getattr(event, "step", 0) == 2:
            free.free = 5000

    with pytest.raises(RunError, match=r"checkpoint-2 needs .*checkpoint-1 is kept; make room"):
        run(tuner.recipe, tmp_path / "run", registry(), [fill])
    free.free = 10**12
    told = [e.text for e in recorded(tuner, tmp_path / "run") if isinstance(e, Warned)]
    assert told == ["02-sft goes on from checkpoint-1"]
