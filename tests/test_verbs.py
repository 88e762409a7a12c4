"""The typed verbs, and what is said of those that there are not."""

from __future__ import annotations

import copy
import inspect
import pickle

import attrs
import pytest

from tunesmith import Recipe, Tuner
from tunesmith.errors import OptionError, RecipeError, UnknownVerbError
from tunesmith.plugin.naming import as_step
from tunesmith.plugin.options import field_docs
from tunesmith.plugin.registry import registry
from tunesmith.recipe import VERBS
from tunesmith.sugar import SUGAR
from tunesmith_plugins.methods.lora import LoraConfig

TUNER = Tuner("m").lora(r=4, name="zh").sft("a.json", epochs=2)


@pytest.mark.parametrize(("verb", "plugin"), SUGAR)
def test_a_verb_shows_every_option_with_its_default_and_its_help(verb, plugin):
    config = registry().find(VERBS[verb].kind, plugin).spec.config
    method = getattr(Tuner, SUGAR[verb, plugin])
    parameters = inspect.signature(method).parameters
    own = {"self", "data", "format", "name"}
    assert {
        name: attrs.NOTHING if p.default is p.empty else p.default
        for name, p in parameters.items()
        if name not in own
    } == {field.name: field.default for field in attrs.fields(config)}
    assert all(p.kind is p.KEYWORD_ONLY for name, p in parameters.items() if name not in own)
    told = " ".join(inspect.getdoc(method).split())
    for name, said in field_docs(config).items():
        assert told.count(f" {name}: ") == 1
        assert f"{name}: {' '.join(said.split())}" in told


def test_every_builtin_method_trainer_and_exporter_has_a_verb():
    kinds = {"methods": "peft", "trainers": "train", "exporters": "export"}
    assert set(SUGAR) == {
        (kinds[item.kind], item.spec.name)
        for item in registry()
        if item.builtin and item.kind in kinds
    }


def test_data_given_twice_does_not_lose_one_in_silence():
    with pytest.raises(OptionError, match="got its data twice"):
        Tuner("m").sft("a.json", data="b.json")


def test_a_verb_names_the_adapter_that_its_method_begins():
    assert Tuner("m").lora(name="zh") == Tuner("m").peft("lora", name="zh")
    assert Tuner("m").lora(LoraConfig(r=4), name="zh") == Tuner("m").lora(r=4, name="zh")


def test_completion_offers_verbs_and_nothing_else():
    offered = {name for name in dir(TUNER) if not name.startswith("_")}
    assert offered == {
        *VERBS,
        *SUGAR.values(),
        *("explain", "run", "recipe", "from_recipe", "from_yaml", "to_yaml"),
    }


# verbs that there are not


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("orpo", r"no \.orpo\(\), and no plugin of that name is installed; did you mean 'dpo'"),
        ("orpo", r"its verbs are: dpo, evaluate, .*`tunesmith plugins` lists them"),
        ("nf4", r"'nf4' is a quantizer: write \.quantize\(\"nf4\"\)$"),
        ("loss", r"'loss' is a metric: write \.evaluate\(\"loss\", data\)$"),
        ("alpaca", r"'alpaca' is a format: give it beside the data: .*format=\"alpaca\""),
        ("limit", r"'limit' is a transform: .*Data\(source\)\.transform\(\"limit\"\)"),
        ("exact_match", r"'exact_match' is a reward: .*rewards=\"exact_match\""),
    ],
)
def test_a_verb_that_there_is_not_is_answered_with_what_there_is(name, said):
    with pytest.raises(UnknownVerbError, match=said):
        getattr(TUNER, name)


def test_what_asks_a_tuner_for_anything_goes_on():
    assert isinstance(UnknownVerbError(""), AttributeError)
    assert not hasattr(TUNER, "orpo")
    assert not hasattr(TUNER, "__array__")
    assert not hasattr(Tuner.__new__(Tuner), "_recipe")  # as unpickling finds it: no endless search
    assert getattr(TUNER, "shape", None) is None


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda tuner: pickle.loads(pickle.dumps(tuner))]
)
def test_a_tuner_is_copied_and_pickled(again):
    assert again(TUNER) == TUNER


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("{lora: , r: 16}", "'lora' is a method and no verb: write 'peft: lora', with its options"),
        ("{sft: a.json}", "'sft' is a trainer and no verb: write 'train: sft', with 'data: …' and"),
        ("{tunesmith:merge: }", "'merge' is an exporter and no verb: write 'export: tunesmith:mer"),
        ("{loss: a.json}", "'loss' is a metric and no verb: write 'evaluate: loss'"),
        ("{limit: 3}", "'limit' is a transform and no verb: write '- transform: limit'"),
        ("{trian: sft}", "got the keys trian; expected exactly one of .*did you mean 'train'"),
    ],
)
def test_a_plugin_in_the_place_of_a_verb_is_told_how_it_is_written(step, said):
    with pytest.raises(RecipeError, match=f"recipe: step 2: {said}"):
        Tuner.from_yaml(f"model: m\nsteps:\n  - quantize: nf4\n  - {step}\n")
    # who knows no plugins says which verbs there are
    with pytest.raises(RecipeError, match=r"step 2: got the keys .*; expected exactly one of"):
        Recipe.from_yaml(f"model: m\nsteps:\n  - quantize: nf4\n  - {step}\n")


def test_keys_that_name_no_plugin_get_no_advice():
    assert as_step(["trian", "data"]) == ""
