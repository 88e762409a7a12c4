"""What a run has made, in hand: its model, answers to several prompts, runs opened later."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tunesmith
from tunesmith import Tuner
from tunesmith.cli import main
from tunesmith.engine.locking import DirectoryLock
from tunesmith.engine.result import RunResult
from tunesmith.errors import OpError, OptionError, RunError
from tunesmith.ops.native import NativeStatus

HOT = {
    "max_steps": 6,
    "learning_rate": 0.05,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "max_length": 64,
}
ASKED = ["say the number 3", [{"role": "user", "content": "and 4?"}], "7"]


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A run that was stopped as its merge began: the adapter is there, the merge is not."""
    directory = tmp_path_factory.mktemp("result") / "run"
    rows = [{"instruction": f"say {n}", "output": f"the number is {n}"} for n in range(8)]
    tuner = Tuner(tiny_model).quantize("nf4").peft("lora", name="numbers", r=4)
    tuner = tuner.sft(rows, **HOT).merge()

    def stop(run, event):
        if getattr(event, "stage", "") == "04-merge":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuner.run(directory, progress=False, listeners=[stop])
    return directory


@pytest.fixture
def result(trained):
    result = RunResult.open(trained)
    yield result
    result.unload()


def test_the_model_in_hand_is_what_answers(result):
    model, tokenizer = result.model, result.tokenizer
    assert isinstance(model, PeftModel)
    assert not model.training
    assert model is result.model
    said = result.generate("say the number 3", max_new_tokens=8)
    turns = [{"role": "user", "content": "say the number 3"}]
    ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        ours = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(ours[0, ids.shape[1] :], skip_special_tokens=True).strip() == said
    with model.disable_adapter(), torch.no_grad():
        theirs = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert not torch.equal(ours, theirs)


def test_the_tokenizer_is_had_without_a_weight_being_read(result):
    assert result.tokenizer.chat_template
    assert not result._held.opened.session.loaded


def test_the_model_is_let_go_and_loaded_again(result):
    import weakref

    first = weakref.ref(result.model)
    said = result.generate("7", max_new_tokens=6)
    result.unload()
    assert first() is None
    assert result.generate("7", max_new_tokens=6) == said


def test_a_list_of_prompts_has_the_answers_of_each_alone(result):
    alone = [result.generate(prompt, max_new_tokens=8) for prompt in ASKED]
    assert len(set(alone)) > 1
    assert result.generate(ASKED, max_new_tokens=8) == alone
    assert result.generate(ASKED, max_new_tokens=8, batch_size=2) == alone
    assert result.generate(ASKED[:1], max_new_tokens=8) == alone[:1]
    assert result.generate([], max_new_tokens=8) == []


def test_sampled_answers_depend_on_the_seed_and_not_on_their_neighbours(result):
    how = {"max_new_tokens": 8, "temperature": 1.0, "top_k": 20, "seed": 3}
    together = result.generate(ASKED, **how)
    assert [result.generate(prompt, **how) for prompt in ASKED] == together
    assert result.generate(ASKED, **{**how, "seed": 4}) != together


@pytest.mark.parametrize("as_list", [True, False])
def test_an_answer_ends_before_a_stop_string(result, as_list):
    whole = result.generate("say the number 3", max_new_tokens=12)
    middle = whole.split()[0][1:3]  # white space around an answer is not in `whole`
    assert middle
    cut = result.generate(
        "say the number 3", max_new_tokens=12, stop=[middle] if as_list else middle
    )
    assert cut == whole[: whole.find(middle)]
    assert cut
    with pytest.raises(OpError, match="none of them empty"):
        result.generate("say", max_new_tokens=2, stop="")


@pytest.mark.parametrize(
    ("prompt", "got"),
    [
        (7, "a int"),
        ([1, 2], "a list of int"),
        (["text", {"role": "user", "content": "mixed"}], "a list of dict and str"),
        ([[]], "a list of list"),
        (b"bytes", "a bytes"),
    ],
)
def test_what_is_no_prompt_is_refused_before_the_model_is_loaded(result, prompt, got):
    with pytest.raises(OptionError, match=re.escape(got)):
        result.generate(prompt)
    assert result._held.opened is None


def test_without_our_decoding_the_same_is_said(result, monkeypatch, caplog):
    said = result.generate(ASKED, max_new_tokens=6)
    result.unload()
    monkeypatch.setattr(NativeStatus, "why_slow_on", lambda self, device: "this test asks for it")
    caplog.set_level("INFO", logger="tunesmith")
    assert result.generate(ASKED, max_new_tokens=6) == said
    assert "as transformers does it (this test asks for it)" in caplog.text


@pytest.mark.slow
def test_without_kernels_the_same_is_said(result, trained):
    program = (
        "import json, sys, tunesmith\n"
        "from tunesmith.ops import native_status\n"
        "assert native_status().why_slow_on('cpu')\n"
        "said = tunesmith.open(sys.argv[1]).generate(json.loads(sys.argv[2]), max_new_tokens=6)\n"
        "print(json.dumps(said))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(trained), json.dumps(ASKED)],
        env={**os.environ, "TUNESMITH_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == result.generate(ASKED, max_new_tokens=6)


# runs opened later


def test_a_stopped_run_is_opened_as_far_as_it_has_come(trained):
    with pytest.warns(UserWarning, match=r"not finished; still to be made: 04-merge; run the same"):
        opened = tunesmith.open(trained)
    assert opened.standing.ahead == ("04-merge",)
    assert list(opened.adapters) == ["numbers"]
    assert opened.artefacts["03-sft"]["adapter"] == opened.adapters["numbers"]
    assert opened.metrics["03-sft"]["loss"] > 0
    assert opened.model_path is None


def test_a_finished_run_is_opened_without_a_word(tiny_model, alpaca_file, tmp_path):
    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file, **{**HOT, "max_steps": 2}).merge()
    result = tuner.run(tmp_path / "a", progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = tunesmith.open(tmp_path / "a")
    assert opened == result
    assert str(opened.standing) == "finished"
    merged = AutoModelForCausalLM.from_pretrained(opened.model_path)
    assert type(opened.model) is type(merged)
    for name, weight in merged.state_dict().items():
        assert torch.equal(opened.model.state_dict()[name], weight)
    opened.unload()


def test_a_training_that_was_stopped_names_its_newest_checkpoint(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    (copy / "stages" / "03-sft").rename(copy / "stages" / ".03-sft.partial")
    for step in (9, 20):
        (copy / "stages" / ".03-sft.partial" / "checkpoints" / f"checkpoint-{step}").mkdir(
            parents=True
        )
    with pytest.warns(UserWarning, match="checkpoint-20"):
        opened = tunesmith.open(copy)
    assert opened.standing.ahead == ("03-sft", "04-merge")
    with pytest.raises(RunError, match="holds no model and no adapter"):
        opened.generate("say")


def test_a_run_at_work_is_told_from_one_that_was_stopped(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    with DirectoryLock(copy):
        at_work = RunResult.open(copy).standing
    assert at_work.at_work == f"process {os.getpid()}, which is this one"
    assert "is at work on it" in str(at_work)
    assert "run the same" not in str(at_work)
    assert RunResult.open(copy).standing.at_work is None


def test_what_is_no_run_is_told_by_what_it_is(trained, tiny_model, tmp_path):
    shutil.copytree(trained, tmp_path / "runs" / "first")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    found = {
        tmp_path / "runs" / "frst": r"no such directory; did you mean 'first'",
        tmp_path / "runs": "a directory of runs, first",
        tmp_path / "empty": "it is empty",
        tmp_path / "other": r"there is notes.txt in it, and no recipe.yaml",
        tmp_path / "other" / "notes.txt": "is a file",
        tiny_model: "it is a model, which `Tuner",
        trained / "stages" / "03-sft": f"a stage of the run in {trained}",
        trained / "stages" / "03-sft" / "adapter": "an adapter in PEFT's format",
    }
    for path, text in found.items():
        with pytest.raises(RunError) as caught:
            tunesmith.open(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert re.search(text, str(caught.value))
        assert "give the directory that" in str(caught.value)


def test_chat_says_that_the_run_is_not_finished(trained, monkeypatch, capsys):
    said = iter(["say 3", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(said))
    assert main(["chat", str(trained), "--max-new-tokens", "3"]) == 0
    assert "not finished; still to be made: 04-merge" in capsys.readouterr().err


def test_a_star_import_leaves_pythons_own_open_alone():
    found: dict[str, object] = {}
    exec("from tunesmith import *", found)
    assert "open" not in found
    assert "Tuner" in found
