"""What a user passes to watch a run: transformers' callbacks, and functions told of events."""

from __future__ import annotations

import pytest
from transformers import TrainerCallback

from tunesmith import Tuner
from tunesmith.errors import OptionError

QUICK = {"batch_size": 4, "gradient_accumulation": 1, "max_steps": 3}


class Steps(TrainerCallback):
    """Counts."""

    def __init__(self):
        self.begun, self.seen, self.logged = 0, [], []

    def on_train_begin(self, args, state, control, **kwargs):
        self.begun += 1

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged += [logs["loss"]] if "loss" in logs else []


def test_a_callback_is_told_of_each_training_and_of_none_that_is_reused(
    tiny_model, alpaca_file, tmp_path
):
    steps = Steps()
    made = Tuner(tiny_model, device="cpu").lora(r=2).sft(alpaca_file, **QUICK)
    result = made.run(tmp_path / "run", progress=False, callbacks=[steps])
    assert (steps.begun, steps.seen) == (1, [1, 2, 3])
    assert steps.logged[-1] == pytest.approx(result.metrics["02-sft"]["loss"], abs=1.0)
    made.run(tmp_path / "run", progress=False, callbacks=[steps])
    assert steps.begun == 1


@pytest.mark.parametrize("given", [print, Steps, lambda run, event: None])
def test_what_is_no_callback_is_refused_before_any_work(given, tiny_model, alpaca_file, tmp_path):
    made = Tuner(tiny_model, device="cpu").lora(r=2).sft(alpaca_file, **QUICK)
    with pytest.raises(OptionError, match=r"callbacks: got .*goes to listeners"):
        made.run(tmp_path / "run", progress=False, callbacks=[given])
    assert not (tmp_path / "run" / "stages").exists()
