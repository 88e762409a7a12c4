"""What explain() has read of files, run() does not read again; and nothing stale is used."""

from __future__ import annotations

import gc
import json

import pytest

from tunesmith import Data, Tuner
from tunesmith.engine import readings
from tunesmith.engine.plan import make_plan
from tunesmith.plugin.registry import registry


@pytest.fixture
def read(monkeypatch):
    """What is read, by its description."""
    found: list[str] = []
    load = readings.load_data

    def noting(data, *args, **kwargs):
        loaded = load(data, *args, **kwargs)
        found.append(loaded.description)
        return loaded

    monkeypatch.setattr(readings, "load_data", noting)
    return found


def planned(tuner, *, for_run):
    return make_plan(tuner.recipe, registry(), estimates=not for_run)


def said(plan):
    return [row.example.messages[-1].content for row in plan.steps[-1].data.examples]


def test_a_run_does_not_read_what_its_plan_has_read(tiny_model, alpaca_file, tmp_path, read):
    options = {"max_steps": 1, "batch_size": 2, "gradient_accumulation": 1, "max_length": 64}
    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file, **options)
    tuner.explain()
    tuner.explain()
    result = tuner.run(tmp_path / "a", progress=False)
    assert len(read) == 1
    assert (
        tuner.run(tmp_path / "b", progress=False).metrics["02-sft"]["loss"]
        == (result.metrics["02-sft"]["loss"])
    )
    assert len(read) == 2  # the run has let its rows go


@pytest.mark.parametrize("change", ["a file", "one of a directory", "a file more"])
def test_rows_that_have_changed_are_read_again(change, tmp_path, tiny_model, read):
    place = tmp_path / "rows"
    place.mkdir()

    def write(name, answer):
        rows = [{"instruction": f"say {n}", "output": f"{answer} {n}"} for n in range(3)]
        (place / name).write_text(json.dumps(rows))

    write("a.json", "one")
    source = place / "a.json" if change == "a file" else place
    tuner = Tuner(tiny_model).lora(r=2).sft(source)
    assert said(planned(tuner, for_run=False)) == ["one 0", "one 1", "one 2"]
    write("b.json" if change == "a file more" else "a.json", "two")  # of the same size
    now = said(planned(tuner, for_run=True))
    assert now[-3:] == ["two 0", "two 1", "two 2"]
    assert len(read) == 2


def test_what_is_asked_otherwise_is_read_again(tiny_model, alpaca_file, read):
    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file)
    planned(tuner, for_run=False)
    other = Tuner(tiny_model).lora(r=2).sft(Data(alpaca_file, format="alpaca"))
    planned(other, for_run=True)
    assert len(read) == 2


def test_rows_in_memory_are_read_each_time(tiny_model, read):
    rows = [{"instruction": "say 1", "output": "one"}]
    tuner = Tuner(tiny_model).lora(r=2).sft(rows)
    assert said(planned(tuner, for_run=False)) == ["one"]
    rows[0]["output"] = "two"
    expected = [rows[0]["output"]] if tuner.recipe.steps[-1].data is rows else ["one"]
    assert said(planned(tuner, for_run=True)) == expected
    assert len(read) == 2


def test_what_was_read_is_let_go_with_the_tuner(tiny_model, alpaca_file):
    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file)
    planned(tuner, for_run=False)
    key = id(tuner.recipe)
    assert key in readings._by_recipe
    del tuner
    gc.collect()
    assert key not in readings._by_recipe
