"""A warm-up rises from its first step on, whatever the schedule and whose the trainer is."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers

from tunesmith import Tuner
from tunesmith.engine import training
from tunesmith.engine.warmup import warms_up_from_the_first_step
from tunesmith.plugin.trainers import SCHEDULER_OPTIONS, SCHEDULERS

WARMING = [name for name in SCHEDULERS if name != "constant"]


def rates(tmp_path: Any, scheduler: str, *, warmup: float, steps: int, ours: bool) -> list[float]:
    """Return the learning rate of each step as a stock trainer would have it, or with ours."""
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        learning_rate=1.0,
        lr_scheduler_type=scheduler,
        lr_scheduler_kwargs=SCHEDULER_OPTIONS.get(scheduler, {}),
        warmup_steps=warmup,
        use_cpu=True,
        report_to="none",
    )
    trainer = transformers.Trainer(model=torch.nn.Linear(2, 2), args=arguments)
    if ours:
        warms_up_from_the_first_step(trainer)
    trainer.create_optimizer_and_scheduler(steps)
    found = []
    for _ in range(steps):
        [group] = {each["lr"] for each in trainer.optimizer.param_groups}
        assert trainer.lr_scheduler.get_last_lr()[0] == group
        found.append(group)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return found


@pytest.mark.parametrize("scheduler", WARMING)
def test_the_first_step_learns_and_the_peak_comes_when_it_did(tmp_path, scheduler):
    stock = rates(tmp_path, scheduler, warmup=4, steps=10, ours=False)
    ours = rates(tmp_path, scheduler, warmup=4, steps=10, ours=True)
    assert stock[0] == 0.0, "transformers has changed; this may not be needed any more"
    assert ours[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert ours[4:] == stock[4:]


def test_a_share_of_the_steps_is_rounded_up_as_by_transformers(tmp_path):
    assert rates(tmp_path, "linear", warmup=0.03, steps=10, ours=True)[:2] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("scheduler", "warmup"), [("cosine", 0.0), ("constant", 0.0), ("constant", 3)]
)
def test_a_schedule_without_a_warm_up_is_left_alone(tmp_path, scheduler, warmup):
    stock = rates(tmp_path, scheduler, warmup=warmup, steps=5, ours=False)
    assert rates(tmp_path, scheduler, warmup=warmup, steps=5, ours=True) == stock


def test_a_schedule_of_another_kind_is_left_alone(tmp_path):
    stock = torch.optim.lr_scheduler.LambdaLR
    arguments = transformers.TrainingArguments(str(tmp_path), warmup_steps=2, report_to="none")

    class Own(transformers.Trainer):
        def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
            self.lr_scheduler = stock(self.optimizer, lambda step: 0.25)
            return self.lr_scheduler

    trainer = Own(model=torch.nn.Linear(2, 2), args=arguments)
    warms_up_from_the_first_step(trainer)
    trainer.create_optimizer_and_scheduler(10)
    assert trainer.lr_scheduler.lr_lambdas[0](0) == 0.25


def test_a_run_learns_in_its_first_step(tiny_model, alpaca_file, tmp_path):
    tuner = Tuner(tiny_model).lora(r=2)
    tuner = tuner.sft(alpaca_file, max_steps=3, batch_size=2, gradient_accumulation=1, warmup=1)
    tuner.run(tmp_path / "run", progress=False)
    log = (tmp_path / "run/stages/02-sft/log.jsonl").read_text().splitlines()
    assert [json.loads(row)["learning_rate"] for row in log][:2] == pytest.approx([1e-4, 2e-4])


def test_the_run_is_what_sees_to_it(tiny_model, alpaca_file, tmp_path, monkeypatch):
    """The planted fault: without ours the first step has a learning rate of 0."""
    monkeypatch.setattr(training, "warms_up_from_the_first_step", lambda trainer: None)
    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file, max_steps=2, batch_size=2)
    tuner.run(tmp_path / "run", progress=False)
    log = (tmp_path / "run/stages/02-sft/log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["learning_rate"] == 0.0
