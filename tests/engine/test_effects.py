"""What really runs is told: in the plan, in the record of a stage, in the report."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest

from tunesmith import Tuner
from tunesmith.engine import effects
from tunesmith.engine.effects import setup_before
from tunesmith.engine.plan import make_plan
from tunesmith.engine.world import World
from tunesmith.plugin.registry import registry

QUICK: dict[str, Any] = {"max_steps": 1, "batch_size": 2}


def planned(tuner: Tuner) -> Any:
    plan = make_plan(tuner.recipe, registry())
    assert not plan.problems
    return plan


def test_what_is_left_out_is_told_as_it_is_decided_to_be(tiny_model, alpaca_file):
    tuner = Tuner(tiny_model, seed=7).quantize("nf4").lora(r=4).sft(alpaca_file, **QUICK).merge()
    plan = planned(tuner)
    nf4, lora, sft, merge = (step.effective for step in plan.steps)
    assert (nf4["blocksize"], nf4["nested"], nf4["quant_type"]) == (64, True, "nf4")
    assert lora["alpha"] == 8
    assert lora["targets"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
    ]  # fmt: skip
    assert (sft["learning_rate"], sft["seed"], sft["warmup"]) == (2e-4, 7, 0.03)
    assert (sft["optimizer"], sft["effective_batch_size"]) == ("adamw", 8)
    assert merge["dtype"] == plan.device.precision


def test_what_is_given_stands_as_it_was(tiny_model, alpaca_file):
    tuner = Tuner(tiny_model).lora(r=4, alpha=3, targets=("q_proj",))
    tuner = tuner.sft(alpaca_file, learning_rate=1e-3, seed=9, warmup=0, **QUICK)
    lora, sft = (step.effective for step in planned(tuner).steps)
    assert (lora["alpha"], lora["targets"]) == (3, ["q_proj"])
    assert (sft["learning_rate"], sft["seed"], sft["warmup"]) == (1e-3, 9, 0)


def test_the_learning_rate_is_that_of_the_method_in_use(tiny_model, alpaca_file, preference_file):
    alone = planned(Tuner(tiny_model).sft(alpaca_file, **QUICK).dpo(preference_file, **QUICK))
    assert [step.effective["learning_rate"] for step in alone.steps] == [2e-5, 5e-7]
    adapted = planned(Tuner(tiny_model).lora().dpo(preference_file, **QUICK))
    assert adapted.steps[1].effective["learning_rate"] == 5e-6


def test_several_processes_make_a_larger_update_and_no_loss_from_hidden_states(
    tiny_model, alpaca_file, monkeypatch
):
    tuner = Tuner(tiny_model).lora(r=4).sft(alpaca_file, epochs=2, batch_size=1)
    alone = planned(tuner).steps[1]
    monkeypatch.setattr(effects, "current_world", lambda: World(0, 0, 2))
    plan = planned(tuner)
    several = plan.steps[1]
    assert alone.effective["effective_batch_size"] == 4
    assert several.effective["effective_batch_size"] == 8
    assert several.effective["chunked_loss"] is False
    assert (alone.estimate.steps, several.estimate.steps) == (6, 4)
    text = " ".join(str(plan).split())
    assert "in 4 steps of 8 rows (1 x 4 in each of 2 processes)" in text
    assert "with several processes the model is wrapped as a whole" in text


def test_the_plan_tells_what_is_decided_within_80_columns(tiny_model, alpaca_file):
    tuner = Tuner(tiny_model, seed=3).quantize("nf4").lora(r=4)
    tuner = tuner.sft(alpaca_file, chunked_loss=False, fused_layers=False, **QUICK)
    text = str(planned(tuner))
    assert "decided  blocksize=64, nested=True, quant_type='nf4'" in text
    assert "decided  learning_rate=0.0002, warmup=0.03, optimizer='adamw', seed=3" in text
    words = " ".join(text.split())
    assert "(chunked_loss is off); faster with chunked_loss=True" in words
    assert "attention: sample by sample" not in words, "what goes fast needs no line"
    long = [line for line in text.splitlines() if len(line) > 80]
    assert all(max(map(len, line.split())) > 60 for line in long), "only a path may be longer"


def test_a_stage_keeps_what_it_ran_with_and_on_what(tiny_model, alpaca_file, tmp_path):
    tuner = Tuner(tiny_model, seed=7).quantize("nf4").lora(r=4).sft(alpaca_file, **QUICK)
    tuner.evaluate("loss", alpaca_file).run(tmp_path / "run", progress=False)
    sft = json.loads((tmp_path / "run/stages/03-sft/stage.json").read_text())
    assert sft["options"]["learning_rate"] == 2e-4
    assert sft["options"]["seed"] == 7
    assert sft["options"]["effective_batch_size"] == 8
    assert sft["setup"]["01-quantize-nf4"]["options"]["blocksize"] == 64
    assert sft["setup"]["02-lora"]["plugin"] == "tunesmith:lora"
    assert sft["setup"]["02-lora"]["options"]["alpha"] == 8
    nowhere = [
        name
        for name in ("learning_rate", "seed", "alpha", "blocksize", "nested", "warmup")
        if f'"{name}": null' in (tmp_path / "run/stages/03-sft/stage.json").read_text()
    ]
    assert nowhere == []
    report = (tmp_path / "run/report.html").read_text()
    for name, value in (("learning_rate", "0.0002"), ("alpha", "8"), ("blocksize", "64")):
        assert f"{name}</th><td>{value}</td>" in report


def test_a_merge_begins_what_is_said_of_the_model_anew(tiny_model, alpaca_file):
    tuner = Tuner(tiny_model).quantize("nf4").lora(r=4).sft(alpaca_file, **QUICK).merge()
    plan = planned(tuner.lora(r=2).sft(alpaca_file, **QUICK))
    assert list(setup_before(plan.steps, plan.steps[2])) == ["01-quantize-nf4", "02-lora"]
    assert list(setup_before(plan.steps, plan.steps[5])) == ["05-lora"]


def test_a_plugin_that_fails_to_say_is_named(tiny_model, alpaca_file, monkeypatch):
    item = registry().find("methods", "lora")

    def broken(self: Any, conditions: Any) -> Any:
        raise KeyError("rank")

    monkeypatch.setattr(item.load(), "effective", broken)
    plan = planned(Tuner(tiny_model).lora(r=4).sft(alpaca_file, **QUICK))
    assert plan.steps[0].effective["r"] == 4
    assert any("'lora' failed to say how they will act: KeyError" in note for note in plan.notes)


def test_a_plan_in_a_cell_is_the_printed_plan(tiny_model, alpaca_file):
    plan = planned(Tuner(tiny_model).lora(r=4).sft(alpaca_file, **QUICK))
    assert repr(plan) == str(plan)
    assert len(repr(plan)) < 4000
    assert len(repr(plan.steps)) < 20_000


@pytest.mark.parametrize("verb", ["steps", "data"])
def test_rows_are_not_shown_with_what_holds_them(verb, tiny_model):
    rows = [{"instruction": "x" * 100, "output": f"{number}"} for number in range(500)]
    plan = planned(Tuner(tiny_model).sft(rows, **QUICK))
    shown = plan.steps if verb == "steps" else plan.steps[0].data
    assert len(repr(shown)) < 5000
    assert attrs.asdict(plan.steps[0].data, recurse=False)["examples"]
