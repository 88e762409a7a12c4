"""The command line's `--set`, `--json` and `schema`: what a script that calls it relies on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from tunesmith import Tuner
from tunesmith.cli import main


@pytest.fixture
def home(tiny_model, alpaca_file, tmp_path, monkeypatch):
    """Return a directory with a recipe, its data beside it; the working directory is another."""
    home = tmp_path / "exp"
    home.mkdir()
    (home / "rows.json").write_text(alpaca_file.read_text())
    (home / "r.yaml").write_text(
        f"model: {tiny_model}\nsteps:\n"
        "  - {quantize: nf4}\n  - {peft: lora, r: '${TS_RANK:-2}'}\n"
        "  - {train: sft, data: rows.json, max_steps: 50}\n  - export: merge\n"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return home


def test_a_run_tells_what_it_made_and_nothing_else_on_standard_output(
    home, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("TS_RANK", "4")
    out = tmp_path / "run"
    arguments = ["run", str(home / "r.yaml"), "--out", str(out), "--json"]
    assert main([*arguments, "--set", "sft.max_steps=2", "--set", "seed=7"]) == 0
    shown = capfd.readouterr()
    values = json.loads(shown.out)
    assert "03-sft" in shown.err  # progress
    assert values["path"] == str(out)
    assert Path(values["report"]).is_file()
    assert Path(values["model"], "config.json").is_file()
    assert Path(values["adapters"]["sft"], "adapter_config.json").is_file()
    sft, merge = values["stages"]
    assert (sft["name"], sft["verb"], sft["plugin"]) == ("03-sft", "train", "tunesmith:sft")
    assert sft["options"]["max_steps"] == 2
    assert sft["metrics"]["loss"] > 0
    assert sft["artefacts"]["adapter"] == values["adapters"]["sft"]
    assert merge["seconds"] > 0

    # what was put in and changed is what is kept, and means the same from there
    kept = yaml.safe_load((out / "recipe.yaml").read_text())
    assert kept["seed"] == 7
    assert kept["steps"][1]["r"] == "4"
    assert kept["steps"][2] == {"train": "sft", "data": str(home / "rows.json"), "max_steps": 2}
    monkeypatch.delenv("TS_RANK")
    assert main(["run", str(out / "recipe.yaml"), "--out", str(out), "--json", "--quiet"]) == 0
    again = json.loads(capfd.readouterr().out)
    assert again["stages"] == values["stages"]  # reused, times and all


def test_a_plan_is_one_document_and_its_problems_are_in_it(home, capfd):
    assert main(["explain", str(home / "r.yaml"), "--json"]) == 0
    shown = capfd.readouterr()
    values = json.loads(shown.out)
    assert shown.err == ""
    assert values["problems"] == []
    assert values["model"]["kind"] == "directory"
    assert values["model"]["parameters"] > 0
    assert [step["name"] for step in values["steps"]] == [
        *("01-quantize-nf4", "02-lora", "03-sft", "04-merge"),
    ]
    sft = values["steps"][2]
    assert sft["options"]["batch_size"] == 4
    assert sft["data"]["rows"] > 0
    assert sft["data"]["format"] == "alpaca"
    assert sft["estimate"]["memory_bytes"] > 0
    assert sft["estimate"]["steps"] == 50

    assert main(["explain", str(home / "r.yaml"), "--json", "--set", "lora.r=0"]) == 1
    values = json.loads(capfd.readouterr().out)
    assert any("option 'r' for lora: got 0" in problem for problem in values["problems"])


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ("sead=1", "RecipeError", "did you mean 'seed'?"),
        ("lora.r=0", "PlanError", "option 'r' for lora: got 0; expected at least 1"),
    ],
)
def test_an_error_is_a_document_too(home, tmp_path, capfd, change, kind, said):
    arguments = ["run", str(home / "r.yaml"), "--out", str(tmp_path / "run")]
    assert main([*arguments, "--json", "--set", change]) == 1
    shown = capfd.readouterr()
    error = json.loads(shown.out)["error"]
    assert error["type"] == kind
    assert any(said in problem for problem in error["problems"])
    assert said in error["message"]
    assert said in shown.err
    assert main([*arguments, "--set", change]) == 1
    assert capfd.readouterr().out == ""


def test_what_nobody_foresaw_is_a_document_too(home, tmp_path, capfd, monkeypatch):
    def fail(*_, **__):
        raise KeyError("nobody")

    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tunesmith.tuner.Tuner.run", fail)
    assert main(["run", str(home / "r.yaml"), "--out", str(tmp_path / "run"), "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["error"]["type"] == "KeyError"


def test_what_anything_else_prints_goes_to_standard_error(home, tmp_path, capfd, monkeypatch):
    def loud(self, *_, **__):
        print("from Python")
        subprocess.run([sys.executable, "-c", "print('from a process')"], check=True)
        return Tuner.explain(self)

    monkeypatch.setattr("tunesmith.tuner.Tuner.run", loud)
    main(["run", str(home / "r.yaml"), "--out", str(tmp_path / "run"), "--json"])
    shown = capfd.readouterr()
    json.loads(shown.out)
    assert "from Python" in shown.err
    assert "from a process" in shown.err
    print("afterwards it is as before")
    assert "afterwards" in capfd.readouterr().out


def test_plugins_are_a_document_with_their_options(capfd):
    assert main(["plugins", "--json"]) == 0
    values = json.loads(capfd.readouterr().out)
    assert {"alpaca", "messages"} <= {item["name"] for item in values["plugins"]["formats"]}
    assert values["broken"] == []
    assert main(["plugins", "--json", "--options", "sft"]) == 0
    values = json.loads(capfd.readouterr().out)
    (sft,) = values["plugins"]["trainers"]
    assert sft["options"]["properties"]["epochs"]["default"] == 3.0
    assert values["plugins"]["methods"] == []
    assert main(["plugins", "--json", "--options", "sfft"]) == 1
    assert "did you mean 'sft'" in json.loads(capfd.readouterr().out)["error"]["message"]


def test_the_schema_is_printed_and_takes_a_recipe(home, capfd):
    assert main(["schema"]) == 0
    schema = json.loads(capfd.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    valid = jsonschema.Draft202012Validator(schema)
    row = yaml.safe_load((home / "r.yaml").read_text())
    assert valid.is_valid(row)
    assert not valid.is_valid({**row, "steps": [{"peft": "lora", "rank": 2}]})


def test_printing_the_schema_loads_no_torch():
    code = (
        "import sys; from tunesmith.cli import main; main(['schema']); main(['plugins', '--json']);"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
