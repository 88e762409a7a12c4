"""One number for memory: what a stage takes beyond Python and its libraries."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import psutil
import pytest

from tunesmith import Tuner
from tunesmith.engine.memory import StageMemory
from tunesmith.plugin.events import Progress
from tunesmith.units import byte_size

MIB = 2**20


def ballast(mebibytes: int) -> Any:
    return np.ones(mebibytes * MIB // 8)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot count a peak anew")
def test_a_stage_counts_its_own_peak_and_not_that_of_the_one_before():
    first = StageMemory()
    first.begin()
    held = ballast(200)
    del held
    assert 190 <= first.peak() / MIB <= 230
    second = StageMemory()
    second.begin()
    held = ballast(50)
    assert 45 <= second.peak() / MIB <= 80
    del held


def test_where_no_peak_can_be_counted_anew_one_that_has_grown_is_taken(monkeypatch, tmp_path):
    from tunesmith.engine import memory

    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "nowhere" / "clear_refs")
    highest = iter([900 * MIB, 900 * MIB, 1500 * MIB])
    monkeypatch.setattr(memory, "_highest", lambda: next(highest))
    monkeypatch.setattr(memory, "_resident", lambda: 500 * MIB)
    stage = StageMemory()
    stage.begin()
    assert stage.peak() == 0  # the 900 were before it
    assert stage.peak() == 1000 * MIB


def test_bar_and_report_tell_one_number_and_it_is_without_the_libraries(
    tiny_model, alpaca_file, tmp_path
):
    events: list[Any] = []
    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file, max_steps=2, batch_size=2)
    result = tuner.run(
        tmp_path / "run", progress=False, listeners=[lambda run, event: events.append(event)]
    )
    told = max(event.memory_bytes for event in events if isinstance(event, Progress))
    kept = result.metrics["02-sft"]["memory_bytes"]
    assert kept == pytest.approx(told, abs=32 * MIB)
    # a model of some thousand weights in a process with torch
    assert 0 < kept < psutil.Process().memory_info().rss / 2
    report = (tmp_path / "run/report.html").read_text()
    assert byte_size(kept) in report
    assert str(int(kept)) not in report.partition("<h2>Lock</h2>")[0]
