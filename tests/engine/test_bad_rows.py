"""Rows that cannot be read stop a plan, or are left out and listed, as asked."""

from __future__ import annotations

import json

import pytest

from tunesmith import Data, Recipe, Tuner
from tunesmith.engine.plan import make_plan
from tunesmith.errors import OptionError, RecipeError
from tunesmith.plugin.registry import registry

QUICK = {"batch_size": 2, "gradient_accumulation": 1, "max_steps": 2, "max_length": 64}
GOOD = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(6)]
BAD = [{"instruction": "say", "output": 3}, {"instruction": "say"}]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD[0], BAD[0], *GOOD[1:], BAD[1]]))
    return str(path)


def plan_of(tuner):
    return make_plan(tuner.recipe, registry(), estimates=False)


def test_a_bad_row_stops_and_the_way_to_leave_it_out_is_told(tiny_model, file):
    (problem,) = plan_of(Tuner(tiny_model).lora().sft(file)).problems
    assert "row 2: field 'output': got a number" in problem
    assert "row 8: field 'output': got nothing" in problem
    assert 'on_bad_row="drop"' in problem


@pytest.mark.parametrize(
    "tuner",
    [
        lambda model, file: Tuner(model).lora(r=2).sft(file, on_bad_row="drop", **QUICK),
        lambda model, file: Tuner(model).lora(r=2).sft(Data(file, on_bad_row="drop"), **QUICK),
    ],
    ids=["option", "data"],
)
def test_bad_rows_are_left_out_and_listed(tiny_model, file, tmp_path, tuner):
    tuner = tuner(tiny_model, file)
    plan = plan_of(tuner)
    assert plan.problems == ()
    assert "left out 2 rows: 2 cannot be read as alpaca" in str(plan)
    data = plan.steps[1].data
    assert data.rows == len(data.examples) + len(data.dropped) == 8
    result = tuner.run(tmp_path / "run", progress=False)
    lines = (result.path / "stages" / "02-sft" / "dropped.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert [row["where"].rpartition(", ")[2] for row in listed] == ["row 2", "row 8"]
    assert listed[0]["detail"].startswith("field 'output': got a number")
    assert Recipe.from_yaml(result.path / "recipe.yaml") == tuner.recipe


def test_an_evaluation_lists_what_it_leaves_out(tiny_model, file, tmp_path):
    tuner = Tuner(tiny_model).evaluate("loss", file, on_bad_row="drop")
    result = tuner.run(tmp_path / "run", progress=False)
    lines = (result.path / "stages" / "01-evaluate-loss" / "dropped.jsonl").read_text()
    assert len(lines.splitlines()) == 2


def test_a_source_says_for_itself(tiny_model, file):
    data = Data(file, on_bad_row="error").mix(Data(file, on_bad_row="drop"))
    (problem,) = plan_of(Tuner(tiny_model).lora().sft(data, on_bad_row="drop")).problems
    assert "row 2" in problem
    assert Data.from_dict(data.to_dict()) == data


def test_where_no_row_can_be_read_nothing_is_left_out(tiny_model):
    tuner = Tuner(tiny_model).lora().sft(BAD, format="alpaca", on_bad_row="drop")
    (problem,) = plan_of(tuner).problems
    assert "row 1" in problem


def test_what_else_might_be_done_is_refused(tiny_model, file):
    with pytest.raises(OptionError, match="on_bad_row"):
        Tuner(tiny_model).sft(file, on_bad_row="skip")
    with pytest.raises(RecipeError, match="'on_bad_row' is 'skip'; expected one of"):
        Data(file, on_bad_row="skip")
