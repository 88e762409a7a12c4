"""What is allowed and rarely meant is told: by a plan in notes, by a run in warnings."""

from __future__ import annotations

import pytest

from tunesmith import Tuner
from tunesmith.engine.plan import make_plan
from tunesmith.errors import OptionError
from tunesmith.plugin.events import Warned
from tunesmith.plugin.registry import registry

ROWS = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(8)]


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        (lambda t: t.lora(), "nothing that is done with it"),
        (lambda t: t.lora().merge(), "is done with the lora of step 1 untrained"),
        (lambda t: t.lora().evaluate("loss", ROWS), "untrained"),
        (lambda t: t.lora().sft(ROWS, learning_rate=50), "learning_rate=50 is far above"),
        (lambda t: t.lora().sft(ROWS, batch_size=64), "batch_size=64 is more than the 8 rows"),
        (
            lambda t: t.lora().sft(ROWS, eval_split=2, eval_steps=100),
            "eval_steps=100 is more than the 3 steps",
        ),
    ],
)
def test_odd_things_are_notes_and_no_problems(tiny_model, chain, expected):
    plan = make_plan(chain(Tuner(tiny_model)).recipe, registry(), estimates=False)
    assert plan.problems == ()
    assert expected in "\n".join(plan.notes)
    assert expected in " ".join(str(plan).split())


def test_a_usual_recipe_has_no_notes(tiny_model):
    tuner = Tuner(tiny_model).lora().sft(ROWS, eval_split=2, eval_steps=1).merge()
    assert make_plan(tuner.recipe, registry(), estimates=False).notes == ()


def test_a_run_warns_of_them(tiny_model, tmp_path):
    told = []
    tuner = Tuner(tiny_model).lora(r=2).sft(ROWS, learning_rate=2.0, max_steps=1)
    tuner.run(tmp_path / "run", progress=False, listeners=[lambda run, event: told.append(event)])
    warned = [event.text for event in told if isinstance(event, Warned)]
    assert any("learning_rate=2 is far above" in text for text in warned)


@pytest.mark.parametrize("value", [1.0, 2.5, -1, -0.1, True])
def test_a_split_is_a_share_or_a_number_of_rows_and_nothing_between(tiny_model, value):
    with pytest.raises(OptionError, match="eval_split"):
        Tuner(tiny_model).sft(ROWS, eval_split=value)
