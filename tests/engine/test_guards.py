"""A broken model is never saved, and what broke it is said: step, rows, base or update."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunesmith import Tuner
from tunesmith.engine.guards import broken_base, guarded
from tunesmith.errors import RunError
from tunesmith.plugin.trainers import TrainingData
from tunesmith.testing.tiny import tiny_examples, tiny_llama, tiny_session
from tunesmith_plugins.methods.lora import Lora, LoraConfig
from tunesmith_plugins.trainers.sft import SFT, SFTConfig

QUICK = {"batch_size": 2, "gradient_accumulation": 2, "scheduler": "constant", "warmup": 0}


def poisoned(directory: Path, tensor: str, value: float) -> Path:
    """A tiny model one of whose weights is not a finite number in one place."""
    model = tiny_llama(directory)
    file = model / "model.safetensors"
    weights = load_file(file)
    weights[tensor].view(-1)[5] = value
    save_file(weights, file, metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("chain", ["lora sft", "full sft", "lora dpo", "evaluate", "accuracy"])
def test_a_base_that_holds_nan_is_blamed_by_the_name_of_its_tensor(
    value, chain, tmp_path, alpaca_file, preference_file
):
    name = "model.layers.1.mlp.up_proj.weight"
    tuner = Tuner(poisoned(tmp_path / "model", name, value), precision="fp32")
    made = {
        "lora sft": lambda: tuner.lora(r=2).sft(alpaca_file, **QUICK),
        "full sft": lambda: tuner.sft(alpaca_file, **QUICK),
        "lora dpo": lambda: tuner.lora(r=2).dpo(preference_file, **QUICK),
        "evaluate": lambda: tuner.evaluate("loss", alpaca_file),
        "accuracy": lambda: tuner.evaluate("preference_accuracy", preference_file),
    }[chain]()
    with pytest.raises(RunError, match=f"{name}.* not finite numbers: the checkpoint") as caught:
        made.run(tmp_path / "run", progress=False)
    assert "learning_rate" not in str(caught.value)
    if "sft" in chain:
        assert "step 1 of " in str(caught.value)
        assert "train.json, row " in str(caught.value)
    assert [p.name for p in (tmp_path / "run" / "stages").iterdir() if p.name[0] != "."] == []


def test_a_rate_that_breaks_the_model_stops_it_at_the_next_step(tmp_path, tiny_model, alpaca_file):
    tuner = Tuner(tiny_model, precision="fp32").lora(r=2)
    tuner = tuner.sft(alpaca_file, epochs=50, learning_rate=1e30, save_steps=1, **QUICK)
    steps: list[int] = []
    with pytest.raises(RunError, match=r"lower learning_rate \(now 1e\+30\)") as caught:
        tuner.run(
            tmp_path / "run",
            progress=False,
            listeners=[lambda run, event: steps.append(getattr(event, "step", 0))],
        )
    assert "step 2 of 150" in str(caught.value)
    assert "train.json, row " in str(caught.value)
    assert max(steps) == 1


@pytest.mark.parametrize("full", [True, False])
def test_the_last_update_is_looked_at_too(full, tmp_path, tiny_model, alpaca_file):
    tuner = Tuner(tiny_model, precision="fp32")
    tuner = tuner if full else tuner.lora(r=2)
    with pytest.raises(RunError, match="after step 1"):
        tuner.sft(alpaca_file, max_steps=1, learning_rate=1e39 if full else 1e30, **QUICK).run(
            tmp_path / "run", progress=False
        )
    assert not (tmp_path / "run" / "stages" / "02-sft").exists()
    assert not list((tmp_path / "run" / "stages").rglob("*.safetensors"))


class Breaks:
    """A Trainer callback that breaks a trained weight after a step."""

    def __new__(cls, step: int) -> Any:
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            def on_optimizer_step(self, args, state, control, model=None, **_):
                if state.global_step + 1 == step:
                    weight = next(p for p in model.parameters() if p.requires_grad)
                    weight.data.view(-1)[3] = math.nan

        return Callback()


def trainer_of(tmp_path: Path, **options: Any):
    from tunesmith.data.examples import Sourced

    session = tiny_session(tmp_path / "model", method=Lora(LoraConfig(r=2)), trains=True)
    rows = [
        Sourced(each, f"t.jsonl, row {n}")
        for n, each in enumerate(tiny_examples("conversation"), 1)
    ]
    settings = {"learning_rate": 1e-3, "max_steps": 6, **QUICK, **options}
    trainer = SFT(SFTConfig(**settings)).build(
        session, TrainingData(rows, rows[:2], lambda *_: None), tmp_path / "out"
    )
    return trainer


def test_no_checkpoint_is_made_of_broken_weights_and_the_last_good_one_stays(tmp_path):
    trainer = trainer_of(tmp_path, save_steps=1)
    trainer.add_callback(Breaks(3))
    with (
        pytest.raises(
            RunError, match=r"after step 3: an update has made 1 trained tensor \("
        ) as caught,
        guarded(trainer, "02-sft", 1e-3),
    ):
        trainer.train()
    assert "checkpoint-2 is as it was" in str(caught.value)
    saved = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert saved == ["checkpoint-1", "checkpoint-2"]
    for file in (tmp_path / "out").rglob("*.safetensors"):
        assert all(bool(weight.isfinite().all()) for weight in load_file(file).values())


def test_a_gradient_that_is_nan_reaches_no_weight(tmp_path):
    trainer = trainer_of(tmp_path)
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    weights[0].register_hook(lambda grad: grad * math.nan)
    with (
        pytest.raises(
            RunError, match="norm of its gradient is nan, so the update is not made on t"
        ),
        guarded(trainer, "02-sft", 1e-3),
    ):
        trainer.train()
    assert all(map(torch.equal, before, weights))
    assert trainer.state.global_step == 0


def test_an_evaluation_inside_the_training_is_looked_at(tmp_path):
    trainer = trainer_of(tmp_path, eval_steps=2, eval_split=2)
    measure = trainer.measure

    def broken(model, inputs, *, training):
        measured = measure(model, inputs, training=training)
        if not training:
            measured.sums["loss"].fill_(math.nan)
        return measured

    trainer.measure = broken
    with (
        pytest.raises(RunError, match="evaluation after step 2: eval_loss is nan"),
        guarded(trainer, "02-sft", 1e-3),
    ):
        trainer.train()


def test_a_trainer_is_put_back_as_it_was(tmp_path):
    trainer = trainer_of(tmp_path)
    callbacks = len(trainer.callback_handler.callbacks)
    with guarded(trainer, "02-sft", 1e-3) as guard:
        trainer.train()
        guard.check_result()
    assert not {"training_step", "_clip_grad_norm"} & vars(trainer).keys()
    assert len(trainer.callback_handler.callbacks) == callbacks


def test_a_sound_model_is_not_blamed(tmp_path):
    session = tiny_session(tmp_path / "model")
    assert broken_base(session.model) is None


def test_a_likely_loss_of_hundreds_of_nats_is_no_fault(tmp_path):
    from tunesmith_plugins.metrics.loss import Loss, MetricConfig

    session = tiny_session(tmp_path / "model")
    with torch.no_grad():
        session.model.model.norm.weight.mul_(1e5)
        values = Loss(MetricConfig()).measure(session, tiny_examples("conversation")).values
    assert values["loss"] > 1000
    assert math.isfinite(values["perplexity"])
    json.dumps(values, allow_nan=False)
