"""Every problem is found at once, before a weight is read."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from safetensors.torch import load_file

from tunesmith import Tuner
from tunesmith.engine.plan import make_plan
from tunesmith.errors import PlanError
from tunesmith.plugin.registry import registry
from tunesmith.recipe import Recipe


def problems(tuner_or_recipe, directory=None) -> str:
    recipe = getattr(tuner_or_recipe, "recipe", tuner_or_recipe)
    plan = make_plan(recipe, registry(), directory=directory, estimates=False)
    return "\n".join(plan.problems)


def test_a_sound_recipe_has_no_problems(tiny_model, alpaca_file, preference_file, tmp_path):
    tuner = Tuner(tiny_model).quantize("nf4").lora().sft(alpaca_file).dpo(preference_file).merge()
    assert problems(tuner, tmp_path / "run") == ""


def test_all_problems_are_reported_at_once(tmp_path, preference_file):
    recipe = Recipe.from_dict(
        {
            "model": str(tmp_path / "nowhere"),
            "steps": [
                {"quantize": "nf4"},
                {"quantize": "bitsandbytes"},
                {"peft": "lora", "r": 0, "alfa": 3},
                {"train": "sft", "data": str(tmp_path / "missing.json"), "learning_rate": -1},
                {"export": "merge"},
                {"train": "dpo", "data": str(preference_file)},
                {"train": "sfft", "data": str(preference_file)},
            ],
        }
    )
    with pytest.raises(PlanError) as caught:
        make_plan(recipe, registry(), directory=tmp_path).raise_if_problems()
    text = str(caught.value)
    for expected in (
        "no such file or directory",
        "a model is quantized once",
        "option 'r' for lora: got 0; expected at least 1",
        "unknown option 'alfa' for lora; did you mean 'alpha'",
        "missing.json",
        "option 'learning_rate' for sft: got -1",
        "unknown trainer 'sfft'; did you mean 'sft'",
        "is not empty and holds no run",
    ):
        assert expected in text
    assert len(caught.value.problems) >= 8


def test_a_row_without_its_field_names_file_row_field_and_what_was_there(tiny_model, tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(
        json.dumps(
            [
                {"instruction": "a", "output": "b"},
                {"instruction": "a"},
                {"instruction": "a", "output": 3},
                {"instruction": "a", "output": "c"},
            ]
        )
    )
    text = problems(Tuner(tiny_model).sft(file, format="alpaca"))
    assert "rows.json, row 2: field 'output': got nothing" in text
    assert "rows.json, row 3: field 'output': got a number" in text


def test_broken_json_names_file_and_line(tiny_model, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n{"instruction": \n')
    text = problems(Tuner(tiny_model).sft(file))
    assert "rows.jsonl" in text
    assert "line 2" in text


def test_an_empty_file_is_refused(tiny_model, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("")
    assert "rows.jsonl" in problems(Tuner(tiny_model).sft(file))


def test_a_preference_step_given_instructions_is_told_which_step_to_use(tiny_model, alpaca_file):
    text = problems(Tuner(tiny_model).lora().dpo(alpaca_file))
    assert "needs preference examples" in text
    assert "for these rows use sft" in text


def test_rows_that_no_format_knows_are_answered_with_their_fields(tiny_model):
    text = problems(Tuner(tiny_model).sft([{"q": "a", "a": "b"}]))
    assert "no format knows rows with the fields a, q" in text
    assert "alpaca (instruction, input, output)" in text


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (lambda t, f, p: t.lora().quantize("nf4").sft(f), "decided first"),
        (lambda t, f, p: t.quantize("nf4").sft(f), "quantized weights cannot be trained"),
        (lambda t, f, p: t.sft(f).lora().dpo(p), "all weights were trained by then"),
        (lambda t, f, p: t.lora().lora(), "of which nothing is trained"),
        (lambda t, f, p: t.lora().sft(f).lora().dpo(p), "give it a name of its own"),
        (lambda t, f, p: t.lora().sft(f).use("sgt"), "no adapter 'sgt' by then; did you mean"),
        (lambda t, f, p: t.use("sft").sft(f), "trained on this base so far: none"),
        (
            lambda t, f, p: t.peft("lora", name="a").sft(f).peft("lora", name="a").sft(f),
            "there is an adapter 'a' already",
        ),
        (lambda t, f, p: t.lora().sft(f).merge().use("sft"), "trained on this base so far: none"),
        (lambda t, f, p: t, "has no steps"),
    ],
)
def test_impossible_orders_are_named(tiny_model, alpaca_file, preference_file, chain, message):
    assert message in problems(chain(Tuner(tiny_model), alpaca_file, preference_file))


def test_a_device_that_is_not_there_is_a_problem(tiny_model, alpaca_file):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert "sees no CUDA device" in problems(Tuner(tiny_model, device="cuda").sft(alpaca_file))


def test_a_logger_that_is_not_installed_is_a_problem_with_its_command(tiny_model, alpaca_file):
    import importlib.util

    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed here")
    text = problems(Tuner(tiny_model).lora().sft(alpaca_file, loggers=("wandb",)))
    assert "pip install 'tunesmith[wandb]'" in text


def test_the_plan_reads_as_text_with_memory_and_time(tiny_model, alpaca_file, capsys):
    plan = Tuner(tiny_model).quantize("nf4").lora(r=4).sft(alpaca_file, epochs=2).explain()
    shown = capsys.readouterr().out
    assert shown.strip() == str(plan)
    for expected in ("02-lora", "r=4", "12 rows, format alpaca", "of memory", "no problems found"):
        assert expected in shown
    found = plan.steps[2].estimate
    # q, k, v, o, gate, up, down of two layers: rank 4 on in and out features
    assert found.trainable == 2 * 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)
    assert found.steps == 2


def test_explaining_reads_no_weights(tiny_model, alpaca_file, tmp_path):
    # an embedding of 40 GB that is a hole in a file: whoever reads it finds out
    rows = 300_000_000
    bare = tmp_path / "hollow"
    shutil.copytree(tiny_model, bare)
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    offset, header = 0, {}
    for key, tensor in load_file(tiny_model / "model.safetensors").items():
        shape = [rows, 32] if "embed_tokens" in key else list(tensor.shape)
        end = offset + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with (bare / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)
    plan = make_plan(Tuner(bare).lora().sft(alpaca_file).recipe, registry())
    assert plan.problems == ()
    assert plan.steps[1].estimate is not None
    assert {tensor.device.type for tensor in plan.shapes.model.parameters()} == {"meta"}
