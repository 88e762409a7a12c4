"""The command line answers as a person expects."""

from __future__ import annotations

import io
import json

import pytest

from tunesmith import Tuner
from tunesmith.cli import main


@pytest.fixture
def recipe_file(tiny_model, alpaca_file, tmp_path):
    tuner = Tuner(tiny_model).quantize("nf4").lora(r=2).sft(alpaca_file, max_steps=2).merge()
    path = tmp_path / "recipe.yaml"
    tuner.to_yaml(path)
    return path


def test_run_explain_and_chat(recipe_file, tmp_path, capsys, monkeypatch):
    assert main(["explain", str(recipe_file)]) == 0
    assert "no problems found" in capsys.readouterr().out
    out = tmp_path / "runs" / "a"
    assert main(["run", str(recipe_file), "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert f"model    {out}/stages/04-merge/model" in shown.out
    assert "03-sft" in shown.err
    assert (out / "report.html").exists()
    monkeypatch.setattr("sys.stdin", io.StringIO("say the number 3\nand 4\n"))
    assert main(["chat", str(out), "--max-new-tokens", "4"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_a_quiet_run_writes_nothing_to_stderr(recipe_file, tmp_path, capsys):
    assert main(["run", str(recipe_file), "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


def test_a_bad_recipe_ends_with_status_1_and_every_problem(tmp_path, capsys):
    path = tmp_path / "recipe.json"
    path.write_text(
        json.dumps(
            {
                "model": "./nowhere",
                "steps": [{"peft": "lora", "r": 0}, {"train": "sft", "data": "missing.json"}],
            }
        )
    )
    assert main(["run", str(path), "--out", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    for expected in ("no such file or directory", "option 'r' for lora", "missing.json"):
        assert expected in said
    assert not (tmp_path / "run").exists()
    assert main(["explain", str(path)]) == 1


def test_a_missing_recipe_is_named(tmp_path, capsys):
    assert main(["explain", str(tmp_path / "nothing.yaml")]) == 1
    assert "nothing.yaml: no such recipe file" in capsys.readouterr().err


def test_plugins_lists_every_kind_and_a_plugins_options(capsys):
    assert main(["plugins"]) == 0
    shown = capsys.readouterr().out
    for name in ("alpaca", "nf4", "lora", "sft", "dpo", "loss", "merge"):
        assert name in shown
    assert main(["plugins", "--options", "sft"]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate = None" in shown
    assert "max_grad_norm = 0.3" in shown
    assert main(["plugins", "--options", "sfft"]) == 1
    assert "did you mean 'sft'" in capsys.readouterr().err


def test_doctor_reports_versions_kernels_and_what_is_missing(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for expected in ("transformers", "native kernels", "cuda", "all that is required is there"):
        assert expected in shown
    import tunesmith.doctor

    there = tunesmith.doctor._installed
    monkeypatch.setattr(
        "tunesmith.doctor._installed", lambda name: None if name == "peft" else there(name)
    )
    assert main(["doctor"]) == 1
    assert "MISSING: pip install peft" in capsys.readouterr().out


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    assert "commands" in capsys.readouterr().out


def fail(error):
    def command(*_, **__):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("nobody"), "KeyError: 'nobody'; nobody foresaw this"),
        (ZeroDivisionError("one\ntwo"), "ZeroDivisionError: one; nobody foresaw this"),
        (MemoryError(), "there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
    ],
)
def test_what_nobody_foresaw_is_one_line_and_a_file(
    recipe_file, tmp_path, capsys, monkeypatch, error, said
):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tunesmith.tuner.Tuner.run", fail(error))
    assert main(["run", str(recipe_file), "--out", str(tmp_path / "run")]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("tunesmith: ")
    assert said in shown
    assert len(shown.splitlines()) == 1
    (kept,) = (tmp_path / "cache").glob("traceback-*.txt")
    assert f"the traceback is in {kept}" in shown
    assert "in command" in kept.read_text()


def test_the_traceback_of_a_run_lies_in_its_directory(recipe_file, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    out.mkdir()
    (out / "recipe.yaml").write_text("")
    error = RuntimeError("odd")
    error.add_note("in stage 03-sft")
    monkeypatch.setattr("tunesmith.tuner.Tuner.run", fail(error))
    assert main(["run", str(recipe_file), "--out", str(out)]) == 1
    assert "RuntimeError: odd; in stage 03-sft" in capsys.readouterr().err
    assert len(list(out.glob("traceback-*.txt"))) == 1


def test_a_library_user_gets_what_nobody_foresaw_as_it_is(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr("tunesmith.engine.runner.run", fail(KeyError("nobody")))
    with pytest.raises(KeyError):
        Tuner.from_yaml(recipe_file).run(tmp_path / "run", progress=False)


def test_a_panic_in_rust_is_told_like_any_other_error(recipe_file, tmp_path, capsys, monkeypatch):
    class PanicException(BaseException):  # its name
        pass

    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    monkeypatch.setattr("tunesmith.tuner.Tuner.explain", fail(PanicException("index out of range")))
    assert main(["explain", str(recipe_file)]) == 1
    assert "PanicException: index out of range" in capsys.readouterr().err
