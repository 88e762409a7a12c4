"""A whole run on data that was mixed and transformed: what is trained, evaluated on and listed."""

from __future__ import annotations

import json

import pytest

from tests.engine.runs import CLOCKED
from tunesmith import Data, Recipe, Tuner
from tunesmith.engine.runner import run
from tunesmith.plugin.events import StageReused
from tunesmith.plugin.registry import registry

QUICK = {"batch_size": 2, "gradient_accumulation": 1, "max_steps": 3, "max_length": 64}


@pytest.fixture
def files(tmp_path):
    """Return two files of two formats; the first one has a row twice."""
    rows = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in (*range(9), 0)]
    turns = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"no, {n}"}]
        for n in range(20, 30)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    return tmp_path / "a.json", tmp_path / "b.jsonl"


def done(tuner, directory):
    events = []
    result = run(tuner.recipe, directory, registry(), [lambda run, event: events.append(event)])
    return result, events


def numbers(metrics):
    return {key: value for key, value in metrics.items() if key not in {*CLOCKED, "memory_bytes"}}


def test_two_formats_are_trained_on_and_what_is_held_out_is_evaluated_on(
    tiny_model, files, tmp_path
):
    data = Data(str(files[0])).mix(str(files[1]), weight=0.5).split(4)
    tuner = Tuner(tiny_model).lora(r=2).sft(data, eval_steps=1, **QUICK)
    result, _ = done(tuner, tmp_path / "run")
    assert result.metrics["02-sft"]["eval_loss"] > 0
    listed = (result.path / "stages" / "02-sft" / "dropped.jsonl").read_text().splitlines()
    reasons = sorted(json.loads(line)["reason"] for line in listed)
    assert reasons == ["duplicate", *["not sampled"] * 5]
    kept = Recipe.from_yaml(result.path / "recipe.yaml")
    assert kept == tuner.recipe
    assert json.loads((result.path / "lock.json").read_text())["data"]["02-sft"]["rows"] == 20
    _, events = done(Tuner.from_recipe(kept), tmp_path / "run")
    assert [event.stage for event in events if isinstance(event, StageReused)] == ["02-sft"]
    more = Tuner(tiny_model).lora(r=2).sft(data.limit(4), eval_steps=1, **QUICK)
    _, events = done(more, tmp_path / "run")
    assert not [event for event in events if isinstance(event, StageReused)]


def test_a_split_by_the_data_is_the_split_by_the_option(tiny_model, files, tmp_path):
    option = Tuner(tiny_model).lora(r=2).sft(str(files[0]), eval_split=3, **QUICK)
    data = Tuner(tiny_model).lora(r=2).sft(Data(str(files[0])).split(3), **QUICK)
    one, _ = done(option, tmp_path / "option")
    other, _ = done(data, tmp_path / "data")
    assert numbers(one.metrics["02-sft"]) == numbers(other.metrics["02-sft"])
    assert "eval_loss" in one.metrics["02-sft"]
