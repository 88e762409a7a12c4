"""The fluent face: immutable, lazy, typed, and answering typos."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunesmith import Recipe, Tuner
from tunesmith.errors import OptionError, UnknownPluginError
from tunesmith_plugins.methods.lora import LoraConfig
from tunesmith_plugins.quantizers.nf4 import NF4Config
from tunesmith_plugins.trainers.sft import SFTConfig

ROOT = Path(__file__).parents[1]


def test_a_verb_leaves_the_tuner_it_was_called_on_as_it_was():
    start = Tuner("m")
    grown = start.quantize("nf4").lora(r=4)
    assert start.recipe.steps == ()
    assert [step.label for step in grown.recipe.steps] == ["quantize-nf4", "lora"]


def test_branches_from_one_prefix_do_not_see_each_other():
    prefix = Tuner("m").lora(r=4)
    left, right = prefix.sft("a.json"), prefix.sft("b.json", max_steps=3)
    assert [step.data for step in left.recipe.steps] == [None, "a.json"]
    assert [step.data for step in right.recipe.steps] == [None, "b.json"]
    assert len(prefix.recipe.steps) == 1


def test_a_tuner_cannot_be_changed_in_place():
    with pytest.raises(AttributeError, match="immutable"):
        Tuner("m").recipe = Recipe("other")


def test_its_repr_is_the_chain_that_makes_it_again():
    tuner = (
        Tuner("m", seed=3)
        .quantize("nf4", blocksize=128)
        .lora(r=8)
        .sft("a.json", format="alpaca", max_steps=2)
        .dpo(["p.json", "q.json"])
        .evaluate("loss", "h.json")
        .merge()
    )
    assert eval(repr(tuner)) == tuner
    assert repr(Tuner("m").lora(r=4)) == "Tuner('m').lora(r=4)"


def test_the_path_of_a_file_is_shown_as_text():
    assert repr(Tuner("m").sft(Path("a.json"))) == "Tuner('m').sft('a.json')"
    assert repr(Tuner("m").sft([Path("a.json"), "b.json"])).endswith(".sft(['a.json', 'b.json'])")


def test_a_long_chain_is_shown_a_step_a_line_and_can_still_be_run():
    tuner = Tuner("m" * 40).quantize("nf4").lora(r=4).sft("train.json", epochs=2).merge()
    lines = repr(tuner).splitlines()
    assert lines[0] == "("
    assert lines[2:4] == ["    .quantize('nf4')", "    .lora(r=4)"]
    assert eval(repr(tuner)) == tuner


def test_rows_in_memory_are_counted_in_the_repr_and_not_poured_out():
    text = repr(Tuner("m").sft([{"instruction": "a", "output": "b"}] * 3))
    assert "<list of 3 rows>" in text


def test_yaml_round_trips(tmp_path):
    tuner = (
        Tuner("m", precision="fp32").quantize("nf4").lora(r=8, targets=("q_proj",)).sft("a.json")
    )
    assert Tuner.from_yaml(tuner.to_yaml()) == tuner
    path = tmp_path / "recipe.yaml"
    tuner.to_yaml(path)
    assert Tuner.from_yaml(path) == tuner


def test_only_what_was_given_is_in_the_recipe():
    step = Tuner("m").sft("a.json", epochs=2).recipe.steps[0]
    assert step.options == {"epochs": 2}


def test_a_config_instance_says_the_same_as_name_and_options():
    by_name = (
        Tuner("m").quantize("nf4", blocksize=128).peft("lora", r=4).train("sft", "a", epochs=2)
    )
    by_config = (
        Tuner("m")
        .quantize(NF4Config(blocksize=128))
        .lora(LoraConfig(r=4))
        .train(SFTConfig(epochs=2), "a")
    )
    assert by_config.recipe.steps[:2] == by_name.recipe.steps[:2]
    assert by_config.recipe.steps[2].options == {"epochs": 2.0}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda t: t.lora(rr=4), r"unknown option 'rr' for lora; did you mean 'r'"),
        (lambda t: t.lora(r=0), r"option 'r' for lora: got 0; expected at least 1"),
        (lambda t: t.sft("a", learning_rate=-1), r"'learning_rate' for sft: got -1.*more than 0"),
        (lambda t: t.sft("a", learning_rate=float("nan")), r"got nan; expected a number"),
        (lambda t: t.sft("a", epochs="many"), r"got 'many'; expected a number"),
        (lambda t: t.sft("a", scheduler="cosin"), r"did you mean 'cosine'"),
        (lambda t: t.sft("a", early_stopping=2), r"early_stopping needs something to evaluate on"),
        (lambda t: t.sft(), r"\.sft\(\) needs data"),
        (lambda t: t.lora(8), r"takes its options by name|expected the name"),
        (lambda t: t.peft(3), r"expected the name of a method or an instance"),
    ],
)
def test_a_verb_refuses_what_its_step_cannot_take(build, message):
    with pytest.raises(OptionError, match=message):
        build(Tuner("m"))


def test_every_wrong_option_of_a_verb_is_reported_at_once():
    with pytest.raises(OptionError) as caught:
        Tuner("m").sft("a", learning_rate=-1, batch_size=0, epochs="x")
    assert len(caught.value.problems) == 3


def test_an_unknown_plugin_is_answered_with_its_neighbours_and_what_is_installed():
    with pytest.raises(
        UnknownPluginError, match=r"did you mean 'nf4'.*installed: bitsandbytes, fp4, nf4"
    ):
        Tuner("m").quantize("nf5")


def test_the_typed_verbs_match_the_config_classes_they_were_written_from():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "write_verbs.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_building_a_tuner_and_listing_plugins_load_no_torch():
    code = (
        "import sys; from tunesmith import Tuner;"
        "t = Tuner('m').quantize('nf4').lora(r=2).sft('a').dpo('b').evaluate('loss', 'c').merge();"
        "repr(t); t.to_yaml();"
        "from tunesmith.cli import main; main(['plugins']);"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["-c", "import tunesmith"], ["-m", "tunesmith", "--help"]])
def test_import_and_help_take_at_most_a_fifth_of_a_second(arguments):
    def seconds(command: list[str]) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - began

    # the best of several: another process on the machine makes a run slower, never faster
    assert min(seconds(arguments) for _ in range(8)) <= 0.2
