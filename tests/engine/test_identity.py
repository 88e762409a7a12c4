"""A stage's fingerprint goes by what files hold, and not by where they lie or whence it is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith import Tuner
from tunesmith.data.chat_template import CHATML
from tunesmith.engine.identity import fingerprints, lock_of
from tunesmith.engine.plan import make_plan
from tunesmith.plugin.registry import registry


@pytest.fixture
def hashes(tiny_model):
    def of(template: Path, held_out: Path, rows: Path) -> dict[int, str]:
        tuner = Tuner(tiny_model, chat_template=str(template)).lora(r=2)
        recipe = tuner.sft(str(rows), eval_data=str(held_out)).recipe
        plan = make_plan(recipe, registry(), estimates=False)
        plan.raise_if_problems()
        return fingerprints(plan, lock_of(plan, Path(tiny_model)))

    return of


def test_a_stage_is_made_anew_where_a_file_says_something_else(hashes, alpaca_file, tmp_path):
    template, held_out = tmp_path / "t.jinja", tmp_path / "held.json"
    template.write_text(CHATML)
    held_out.write_text(alpaca_file.read_text())
    before = hashes(template, held_out, alpaca_file)
    assert hashes(template, held_out, alpaca_file) == before

    moved = tmp_path / "moved"
    moved.mkdir()
    again = [moved / "other.jinja", moved / "other.json", moved / "rows.json"]
    for file, old in zip(again, (template, held_out, alpaca_file), strict=True):
        file.write_text(old.read_text())
    assert hashes(*again) == before

    template.write_text(CHATML + "{# another #}")
    assert hashes(template, held_out, alpaca_file)[2] != before[2]
    template.write_text(CHATML)
    held_out.write_text(
        '[{"instruction": "Say 9.", "output": "Nine."}, {"instruction": "Say 8.", "output": "8"}]'
    )
    changed = hashes(template, held_out, alpaca_file)
    assert (changed[1] == before[1], changed[2] == before[2]) == (True, False)
