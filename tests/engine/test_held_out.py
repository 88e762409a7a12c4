"""`evaluate(metric, "held-out")` measures on what the training before it has held out."""

from __future__ import annotations

import json

import pytest

from tunesmith import Data, Recipe, Tuner
from tunesmith.engine.plan import make_plan
from tunesmith.plugin.registry import registry

QUICK = {"batch_size": 2, "gradient_accumulation": 1, "max_steps": 2, "max_length": 64}
ROWS = [{"instruction": f"say {n}", "output": f"it is {n}" + " so" * (n % 4)} for n in range(12)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS))
    return str(path)


def plan_of(tuner):
    return make_plan(tuner.recipe, registry(), estimates=False)


def texts(rows):
    return {row.example.messages[-1].content for row in rows}


def test_it_is_measured_on_rows_that_were_not_trained_on(tiny_model, file, tmp_path):
    tuner = (
        Tuner(tiny_model).lora(r=2).sft(file, eval_split=4, **QUICK).evaluate("loss", "held-out")
    )
    plan = plan_of(tuner)
    assert plan.problems == ()
    trained, measured = plan.steps[1].data, plan.steps[2].data
    assert len(measured.examples) == 4
    assert not texts(trained.examples) & texts(measured.examples)
    result = tuner.run(tmp_path / "run", progress=False)
    # both are means over the trained tokens of the same rows
    logged = result.metrics["02-sft"]["eval_loss"]
    assert result.metrics["03-evaluate-loss"]["loss"] == pytest.approx(logged, rel=1e-3)
    kept = Recipe.from_yaml(result.path / "recipe.yaml")
    assert kept.steps[2].data == "held-out"


def test_the_rows_of_another_split_are_another_measurement(tiny_model, file, tmp_path):
    def of(count):
        tuner = Tuner(tiny_model).sft(Data(file).split(count), **QUICK)
        return plan_of(tuner.evaluate("loss", "held-out")).steps[1].data

    assert of(3).fingerprint == of(3).fingerprint != of(4).fingerprint


def test_data_of_its_own_to_evaluate_on_counts_as_held_out(tiny_model, file, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"instruction": "hello", "output": "there"}]))
    tuner = Tuner(tiny_model).sft(file, eval_data=str(other), **QUICK).evaluate("loss", "held-out")
    assert texts(plan_of(tuner).steps[1].data.examples) == {"there"}


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (lambda t, f: t.evaluate("loss", "held-out"), "there is none before it"),
        (lambda t, f: t.sft(f).evaluate("loss", "held-out"), "holds no rows out; give that one"),
        (lambda t, f: t.sft("held-out"), "there is none before it"),
        (lambda t, f: t.sft(f, eval_split=3).sft("held-out"), "that is not trained on"),
        (
            lambda t, f: t.sft(f, eval_split=3).evaluate("preference_accuracy", "held-out"),
            "needs preference examples, and what step 1 (sft) holds out of",
        ),
    ],
)
def test_what_is_not_there_is_found_in_the_plan(tiny_model, file, chain, message):
    assert message in "\n".join(plan_of(chain(Tuner(tiny_model), file)).problems)
