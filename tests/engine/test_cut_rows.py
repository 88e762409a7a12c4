"""Answers that max_length cuts are told, by event, list and metric; none is only cut."""

from __future__ import annotations

import json

import pytest
import torch

from tunesmith import Tuner
from tunesmith.data.examples import Conversation, Message, Preference
from tunesmith.engine.runner import run
from tunesmith.errors import DataError
from tunesmith.plugin.events import RowsCut, RowsDropped
from tunesmith.plugin.metrics import MetricConfig
from tunesmith.plugin.registry import registry
from tunesmith.testing.tiny import tiny_session
from tunesmith_plugins.metrics.loss import Loss
from tunesmith_plugins.metrics.preference_accuracy import PreferenceAccuracy

LONG = "the ring and the thing " * 20
SHORT = {"max_steps": 1, "batch_size": 2, "gradient_accumulation": 1, "max_length": 64}


def recorded(tuner, directory):
    events: list = []
    result = run(tuner.recipe, directory, registry(), [lambda run, event: events.append(event)])
    return result, events


def where(path):
    return [json.loads(line)["where"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_are_used_without_the_end_of_their_answer_are_listed(
    tiny_model, tmp_path, packing
):
    rows = [
        {"instruction": "a", "output": "short"},
        {"instruction": "b", "output": LONG},
        {"instruction": LONG, "output": "never seen"},
        {"instruction": "c", "output": LONG},
    ]
    tuner = Tuner(tiny_model).lora(r=2).sft(rows, packing=packing, **SHORT)
    result, events = recorded(tuner, tmp_path / "run")
    [cut] = [event for event in events if isinstance(event, RowsCut)]
    [dropped] = [event for event in events if isinstance(event, RowsDropped)]
    assert (cut.count, cut.total, dropped.count) == (2, 4, 1)
    assert cut.reasons == {"the answer is cut at max_length=64": 2}
    assert where(cut.path) == ["row 2", "row 4"]
    assert where(dropped.path) == ["row 3"]
    assert result.metrics["02-sft"]["rows_cut"] == 2


def test_pairs_are_listed_once_whichever_side_is_cut(tiny_model, tmp_path):
    rows = [
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"prompt": "b", "chosen": LONG, "rejected": "y"},
        {"prompt": "c", "chosen": "x", "rejected": LONG},
        {"prompt": "d", "chosen": LONG, "rejected": LONG + "y"},
    ]
    result, events = recorded(Tuner(tiny_model).lora(r=2).dpo(rows, **SHORT), tmp_path / "run")
    [cut] = [event for event in events if isinstance(event, RowsCut)]
    assert (cut.count, where(cut.path)) == (3, ["row 2", "row 3", "row 4"])
    assert result.metrics["02-dpo"]["rows_cut"] == 3


def test_every_row_that_the_template_refuses_is_named(tiny_model, tmp_path):
    template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not that') }}"
        "{% endif %}{{ m.role + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    rows = [{"instruction": "no" if n % 2 else "yes", "output": "a"} for n in range(16)]
    tuner = (
        Tuner(tiny_model, chat_template=template).lora(r=2).sft(rows, deduplicate=False, **SHORT)
    )
    with pytest.raises(DataError) as caught:
        recorded(tuner, tmp_path / "run")
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[:5]] == [f"row {n}" for n in (2, 4, 6, 8, 10)]
    assert lines[5:] == ["... and 3 more rows"]


def test_a_run_in_which_nothing_is_cut_says_nothing_of_it(tiny_model, tmp_path):
    rows = [{"instruction": "a", "output": "short"}]
    result, events = recorded(Tuner(tiny_model).lora(r=2).sft(rows, **SHORT), tmp_path / "run")
    assert not [event for event in events if isinstance(event, RowsCut)]
    assert "rows_cut" not in result.metrics["02-sft"]
    assert not list(result.path.rglob("cut.jsonl"))


def test_metrics_count_what_is_cut_and_what_is_left_out(tmp_path):
    session = tiny_session(tmp_path)
    ask, short, long = (
        [Message("user", "a")],
        [Message("assistant", "b")],
        [Message("assistant", LONG)],
    )
    far = [Message("user", LONG)]
    config = MetricConfig(max_length=64)
    talks = [Conversation([*ask, *short]), Conversation([*ask, *long]), Conversation([*far, *long])]
    with torch.no_grad():
        measured = Loss(config).measure(session, talks).values
    assert (measured["rows_cut"], measured["rows_dropped"]) == (1, 1)
    pairs = [
        Preference(ask, short, long),
        Preference(ask, long, short),
        Preference(ask, short, [Message("assistant", "c")]),
        Preference(far, short, long),
    ]
    with torch.no_grad():
        counted = PreferenceAccuracy(config).measure(session, pairs).values
    assert (counted["pairs"], counted["pairs_cut"], counted["pairs_dropped"]) == (3, 2, 1)


def test_every_turn_of_a_row_counts_as_one_row(tiny_model, tmp_path):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content.split('</t>')[-1] if not loop.last else m.content }}{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    talk = [
        {"role": role, "content": text}
        for role, text in (
            ("user", "a"),
            ("assistant", "<t>x</t>b"),
            ("user", "c"),
            ("assistant", LONG),
        )
    ]
    tuner = Tuner(tiny_model, chat_template=template).lora(r=2)
    result, events = recorded(tuner.sft([{"messages": talk}], **SHORT), tmp_path / "run")
    [cut] = [event for event in events if isinstance(event, RowsCut)]
    assert (cut.count, cut.total) == (1, 1)
    assert result.metrics["02-sft"]["rows_cut"] == 1
