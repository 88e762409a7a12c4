"""Data in a recipe is plain: built up without being read, and back from a file equal."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tunesmith import Data, Recipe, Step, Tuner
from tunesmith.errors import OptionError, RecipeError, UnknownPluginError

ALL = (
    Data("a.json"),
    Data(["a.json", "b.csv"], format="alpaca"),
    Data([{"instruction": "a", "output": "b"}]),
    Data("a.json", format="mine", column="x", depth=2),
    Data("a.json").mix(Data("b.jsonl", format="alpaca"), weight=0.3).dedupe().split(0.1),
    Data("a.json").limit(5).mix("b.json", weight=2).clean().sample(0.5),
    Data("a.json").mix(Data("b.json").mix("c.json"), weight=0.5),
    Data("a.json").transform("own", transform="x", depth=[1, 2]),
)


@pytest.mark.parametrize("data", ALL, ids=lambda data: str(len(data.sources)))
@pytest.mark.parametrize("form", ["to_yaml", "to_json"])
def test_data_comes_back_from_a_file_equal(data, form):
    recipe = Recipe("m", (Step("train", "sft", {"epochs": 2}, data),))
    assert Recipe.from_yaml(getattr(recipe, form)()) == recipe


def test_a_file_says_it_in_few_words():
    recipe = Recipe.from_yaml(
        """
        model: m
        steps:
          - train: sft
            data:
              sources:
                - a.json
                - data: b.jsonl
                  format: alpaca
                  weight: 0.3
              transforms:
                - deduplicate
                - transform: split
                  held_out: 0.1
        """
    )
    assert recipe.steps[0].data == ALL[4]


def test_a_branch_leaves_its_stem_as_it_was():
    stem = Data("a.json").dedupe()
    one, other = stem.limit(1), stem.mix("b.json").split(0.5)
    assert stem == Data("a.json").dedupe()
    assert [each.plugin for each in one.transforms] == ["deduplicate", "limit"]
    assert [each.plugin for each in other.transforms] == ["split"]
    assert other.sources[0].data == stem
    with pytest.raises(AttributeError):
        stem.transforms = ()


def test_weights_are_multiplied_where_a_mix_is_mixed():
    inner = Data("a").mix("b", weight=0.5)
    assert [each.weight for each in Data("x").mix(inner).sources] == [1, 1, 0.5]
    nested = Data("x").mix(inner, weight=0.5).sources
    assert (nested[1].data, nested[1].weight) == (inner, 0.5)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Data("a").mix("b", weight=0), "'weight' is 0; expected a number above 0"),
        (lambda: Data("a").mix("b", weight=float("nan")), "'weight' is nan"),
        (lambda: Data("a").mix("b", weight="half"), "'weight' is 'half'"),
        (lambda: Data("a", depth=2), "options of a format without its name: depth"),
        (lambda: Data(None), "a source without data"),
        (lambda: Data("a").transform("no/name"), "'transform' is 'no/name'"),
        (lambda: Step("train", "sft", {}, Data("a"), "alpaca"), "'format' is 'alpaca' beside a"),
        (lambda: Data.from_dict({"source": "a"}), "unknown key 'source'; did you mean 'sources'"),
        (lambda: Data.from_dict({"sources": []}), "'sources' is"),
        (lambda: Data.from_dict({"sources": "a"}), "'sources' is 'a'; expected a list"),
        (lambda: Data.from_dict({"sources": [{"data": "a", "weigth": 2}]}), "source 1: .*'weight'"),
        (
            lambda: Data.from_dict({"sources": ["a"], "transforms": [{"rows": 2}]}),
            "transform 1: got .* expected a mapping such as",
        ),
    ],
)
def test_what_data_cannot_be_is_told(build, said):
    with pytest.raises(RecipeError, match=said):
        build()


def test_a_file_with_wrong_data_names_the_step():
    with pytest.raises(RecipeError, match=r"step 1: data: unknown key 'sorces'"):
        Recipe.from_dict({"model": "m", "steps": [{"train": "sft", "data": {"sorces": ["a"]}}]})


def test_a_verb_refuses_a_transform_it_cannot_have():
    with pytest.raises(UnknownPluginError, match=r"unknown transform 'limt'; did you mean 'limit'"):
        Tuner("m").sft(Data("a").transform("limt", rows=1))
    with pytest.raises(OptionError, match=r"option 'rows' for limit: got 0"):
        Tuner("m").sft(Data("a").limit(0).mix("b"))


def test_early_stopping_may_be_given_with_data_that_holds_rows_out():
    tuner = Tuner("m").sft(Data("a").split(0.1), early_stopping=2, eval_steps=3)
    assert tuner.recipe.steps[0].options == {"early_stopping": 2, "eval_steps": 3}
    with pytest.raises(OptionError, match=r"early_stopping needs something to evaluate on"):
        Tuner("m").sft(Data("a"), early_stopping=2)


def test_building_data_imports_no_torch():
    code = (
        "from tunesmith import Data, Tuner; import sys;"
        "Tuner('m').sft(Data('a').mix('b', weight=0.5).dedupe().split(0.1)).to_yaml();"
        "sys.exit(', '.join({'torch', 'transformers', 'datasets'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
