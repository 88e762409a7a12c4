"""Rows that a measurement leaves out are listed and told, as those of a training are."""

from __future__ import annotations

import json

from tunesmith import Data, Tuner
from tunesmith.plugin.events import RowsDropped


def test_an_evaluation_lists_the_rows_that_its_data_leaves_out(tiny_model, tmp_path):
    row = {"instruction": "Say it.", "output": "It."}
    told = []

    def listen(_, event):
        if isinstance(event, RowsDropped):
            told.append((event.stage, event.count, event.total, dict(event.reasons)))

    data = Data([row, row, {**row, "output": "That."}]).dedupe()
    made = Tuner(tiny_model, device="cpu").evaluate("loss", data)
    result = made.run(tmp_path / "run", progress=False, listeners=[listen])
    assert told == [("01-evaluate-loss", 1, 3, {"duplicate": 1})]
    (line,) = (result.stages[0].path / "dropped.jsonl").read_text().splitlines()
    assert json.loads(line)["where"].endswith("row 2")
