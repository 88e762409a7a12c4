"""A reward scores completions: a plugin, a function by name or as it is, or several of them."""

from __future__ import annotations

import sys
import types

import attrs
import pytest

from tunesmith import Recipe, Step
from tunesmith.data.examples import Message, Prompt
from tunesmith.errors import DataError, OptionError, PluginError, RecipeError, UnknownPluginError
from tunesmith.plugin.options import given_options, plain_options, structure
from tunesmith.plugin.registry import registry
from tunesmith.plugin.rewards import RewardChoice, Rewards, identities, scorer

HERE = __name__
PROMPTS = [Prompt([Message("user", "1 + 1?")], {"answer": "2"}), Prompt([], {"answer": None})]


@attrs.frozen(kw_only=True)
class Config:
    """Options of a trainer that takes rewards."""

    rewards: Rewards = (RewardChoice("exact_match"),)
    """What scores."""


def short(completions):
    """Score by length."""
    return [-len(text) for text in completions]


def columns(prompts, completions, completion_ids, answer, **others):
    return [
        f"{turns[-1]['content'] if turns else ''}|{ids}|{right}" and float(len(ids))
        for turns, ids, right in zip(prompts, completion_ids, answer, strict=True)
    ]


def needs(completions, solution):
    return [0.0 for _ in completions]


def choices(value):
    return structure(Config, {"rewards": value}, name="ppo").rewards


def scored(value, texts=("2", "3")):
    return scorer(choices(value)).score(PROMPTS, texts, [[1], [1, 2]])


def test_rewards_are_read_from_each_of_their_forms():
    assert choices("exact_match") == (RewardChoice("exact_match"),)
    assert choices(["a", ["b", 0.5]]) == (RewardChoice("a"), RewardChoice("b", 0.5))
    assert choices({"reward": "a", "weight": 2, "column": "x"}) == (
        RewardChoice("a", 2.0, {"column": "x"}),
    )
    assert choices(short) == (RewardChoice(short),)


@pytest.mark.parametrize(
    "value", [3, [["a", "b", 1]], [["a", True]], [{"weight": 1}], [["a", "x"]]]
)
def test_what_is_no_reward_is_refused(value):
    with pytest.raises(OptionError, match=r"option 'rewards' for ppo.*expected rewards: each a"):
        choices(value)


def test_a_weighted_sum_leaves_out_what_gave_no_score():
    found = scored([["exact_match", 2], [f"{HERE}:short", 0.5]])
    assert found.each == {"exact_match": (1.0, None), "short": (-1.0, -1.0)}
    assert found.total == (1.5, -0.5)
    assert scored("exact_match").total == (1.0, None)


def test_one_reward_given_twice_is_told_apart():
    assert list(scored([short, short]).each) == ["short", "short-2"]


def test_a_function_is_given_what_it_takes():
    assert scored(columns).total == (1.0, 2.0)
    with pytest.raises(DataError, match=r"needs solution, which the rows do not have.*answer"):
        scored(needs)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("exact_mach", UnknownPluginError, "did you mean 'exact_match'.*package.module:function"),
        ("no_such_module:score", PluginError, "no_such_module cannot be imported"),
        (f"{HERE}:nothing", PluginError, "has no 'nothing'"),
        (f"{HERE}:PROMPTS", PluginError, "is a list; expected a function"),
        ("os:system", PluginError, "has no argument 'completions'"),
    ],
)
def test_a_reward_that_cannot_be_had_is_told(name, kind, said):
    with pytest.raises(kind, match=said):
        scorer(choices(name))


def test_options_are_a_plugins():
    with pytest.raises(OptionError, match="takes no options: column"):
        scorer(choices({"reward": f"{HERE}:short", "column": "x"}))
    with pytest.raises(OptionError, match="unknown option 'colum' for exact_match"):
        scorer(choices({"reward": "exact_match", "colum": "x"}))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([1.0], "returned 1 scores for 2 completions"),
        ([1.0, float("nan")], "gave completion 2 of 2 the score nan"),
        ([1.0, "good"], "expected a number or None"),
        (None, "returned NoneType"),
    ],
)
def test_what_a_reward_may_not_return_is_refused(answer, said):
    with pytest.raises(PluginError, match=said):
        scored(lambda completions: answer)


def test_a_reward_that_fails_is_named():
    def fails(completions):
        raise KeyError("x")

    with pytest.raises(PluginError, match=r"the reward fails failed with KeyError"):
        scored(fails)


def test_a_function_goes_into_a_recipe_by_its_name_and_comes_back():
    config = structure(Config, {"rewards": [short, ["exact_match", 0.5]]}, name="ppo")
    recipe = Recipe("m", (Step("train", "ppo", given_options(config)),))
    options = Recipe.from_yaml(recipe.to_yaml()).steps[0].options
    assert options["rewards"][0] == f"{HERE}:short"
    assert [choice.weight for choice in structure(Config, options, name="ppo").rewards] == [1, 0.5]
    assert Recipe("m", (Step("train", "ppo", {"rewards": short}),)).to_dict()["steps"] == [
        {"train": "ppo", "rewards": f"{HERE}:short"}
    ]


def test_a_function_of_this_process_is_kept_out_of_a_recipe():
    def within(completions):
        return completions

    for function in (lambda completions: [], within):
        recipe = Recipe("m", (Step("train", "ppo", {"rewards": function}),))
        with pytest.raises(RecipeError, match=r"lives in this process only; define it at the top"):
            recipe.to_yaml()
        told = plain_options(Config(rewards=(RewardChoice(function),)))
        assert "lives in this process only" in told["rewards"]


def test_a_recipe_is_kept_in_a_run_whatever_functions_it_is_given():
    from tunesmith.engine.traces import recipe_text

    recipe = Recipe("m", (Step("train", "ppo", {"rewards": lambda completions: []}, "/a.json"),))
    kept = Recipe.from_yaml(recipe_text(recipe)).steps[0]
    assert "lives in this process only" in kept.options["rewards"]
    assert kept.data == "/a.json"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that makes a module of a source."""

    def make(source):
        file = tmp_path / "my_scores.py"
        file.write_text(source)
        made = types.ModuleType("my_scores")
        made.__file__ = str(file)
        exec(compile(source, str(file), "exec"), vars(made))
        monkeypatch.setitem(sys.modules, "my_scores", made)
        return made

    return make


def test_a_fingerprint_changes_with_the_file_of_a_function(module):
    source = "def score(completions):\n    return [1.0 for _ in completions]\n"
    one = module(source)
    by_name = RewardChoice("my_scores:score").identity()
    assert by_name == RewardChoice("my_scores:score").identity()
    assert by_name == RewardChoice(one.score).identity()
    assert by_name != RewardChoice("my_scores:score", 2.0).identity()
    module(source.replace("1.0", "2.0"))
    assert by_name != RewardChoice("my_scores:score").identity()


def test_a_fingerprint_is_of_a_plugins_options_and_version():
    one = identities(Config(), registry())
    assert one == identities(Config(), registry())
    other = Config(rewards=(RewardChoice("exact_match", 1.0, {"column": "x"}),))
    assert one != identities(other, registry())
    assert registry().find("rewards", "exact_match").version in str(one)


def test_what_cannot_be_told_apart_is_never_taken_for_equal():
    def made(length):
        return lambda completions: [length for _ in completions]

    assert RewardChoice(made(1)).identity() != RewardChoice(made(2)).identity()
