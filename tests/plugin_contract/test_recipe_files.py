"""Paths in a recipe are those from its own file, and `--set` changes what it says."""

from __future__ import annotations

import os
from pathlib import Path

import attrs
import pytest

from tunesmith import Data, Recipe, Tuner
from tunesmith.engine.traces import recipe_text
from tunesmith.errors import RecipeError
from tunesmith.plugin.options import PATHS
from tunesmith.plugin.recipe_files import read_recipe
from tunesmith.plugin.registry import registry

RECIPE = """\
model: base
chat_template: own.jinja
steps:
  - peft: lora
  - train: sft
    data: rows.jsonl
    eval_data: [held.jsonl, org/held]
  - train: dpo
    data:
      sources:
        - pairs
        - data: [a.json, ../b.json]
        - data: {sources: [org/name, deep/c.json]}
      transforms: [clean]
  - evaluate: loss
    data: [{prompt: rows.jsonl}]
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Return a directory with a recipe and what it names; the working directory is beside it."""
    home = tmp_path / "work" / "exp"
    for name in ("base/config.json", "rows.jsonl", "held.jsonl", "pairs/x.jsonl", "a.json"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("{}")
    (home / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(home.parent)
    return home


def paths(recipe: Recipe) -> list:
    sft, dpo, loss = recipe.steps[1:]
    one, two, three = (source.data for source in dpo.data.sources)
    return [
        *(recipe.model, recipe.chat_template, sft.data, *sft.options["eval_data"]),
        *(one, *two, *(source.data for source in three.sources), loss.data),
    ]


@pytest.mark.parametrize("given", ["exp/r.yaml", "./exp/../exp/r.yaml", "whole"])
def test_paths_are_those_from_the_recipes_own_file(project, given):
    recipe = read_recipe(project / "r.yaml" if given == "whole" else given)
    assert paths(recipe) == [
        *("exp/base", "exp/own.jinja", "exp/rows.jsonl", "exp/held.jsonl", "org/held"),
        *("exp/pairs", "exp/a.json", "b.json", "org/name", "exp/deep/c.json"),
        [{"prompt": "rows.jsonl"}],  # a row holds no path
    ]
    assert Tuner.from_yaml(project / "r.yaml").recipe == recipe


def test_from_its_own_directory_they_are_left_as_they_are(project, monkeypatch):
    monkeypatch.chdir(project)
    assert read_recipe("r.yaml") == Recipe.from_yaml("r.yaml") == read_recipe(RECIPE)


def test_from_elsewhere_they_are_whole(project, monkeypatch, tmp_path):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    recipe = read_recipe(project / "r.yaml")
    assert recipe.steps[1].data == str(project / "rows.jsonl")
    assert recipe.steps[2].data.sources[1].data[1] == str(project.parent / "b.json")
    assert recipe.steps[1].options["eval_data"] == (str(project / "held.jsonl"), "org/held")


def test_a_directory_behind_a_link_is_left_upwards_from_where_it_is(project, tmp_path):
    (tmp_path / "work" / "linked").symlink_to(project)
    (tmp_path / "elsewhere").mkdir()
    assert read_recipe("linked/r.yaml").steps[2].data.sources[1].data[1] == "b.json"


@pytest.mark.parametrize("value", ["/data/x.json", "~/x.json", "org/name", "org/name:test"])
def test_what_means_the_same_everywhere_is_left_as_it_is(project, value):
    (project / "r.yaml").write_text(f"model: m\nsteps:\n  - train: sft\n    data: {value}\n")
    recipe = read_recipe("exp/r.yaml")
    assert (recipe.model, recipe.steps[0].data) == ("m", value)
    assert f"data: {value}\n" in recipe_text(recipe)


@pytest.mark.parametrize("template", ["chatml", "'{{ messages }}.jinja'"])
def test_a_template_that_is_no_file_is_left_as_it_is(project, template):
    (project.parent / "chatml").mkdir()
    (project / "r.yaml").write_text(f"model: m\nchat_template: {template}\n")
    assert read_recipe("exp/r.yaml").chat_template == template.strip("'")


def test_a_path_from_the_working_directory_is_told_how_to_write_it(project):
    (project.parent / "here.jsonl").write_text("{}")
    (project.parent / "models" / "x").mkdir(parents=True)
    (project / "r.yaml").write_text(
        "model: models/x\nsteps:\n  - train: sft\n    data: here.jsonl\n    eval_data: here.jsonl\n"
    )
    with pytest.raises(RecipeError) as caught:
        read_recipe("exp/r.yaml")
    said = str(caught.value).splitlines()
    assert len(said) == 3
    assert all("lies in the working directory and not beside the recipe" in line for line in said)
    assert "exp/r.yaml: 'here.jsonl'" in said[0]
    assert "write '../here.jsonl', or the whole path" in said[0]
    assert "write '../models/x'" in said[2]


def test_what_could_be_a_hub_id_stays_a_path_if_it_is_one(project):
    (project / "r.yaml").write_text("model: ./gone\nsteps:\n  - train: sft\n    data: ./x/y\n")
    recipe = read_recipe("exp/r.yaml")
    assert (recipe.model, recipe.steps[0].data) == ("./exp/gone", "exp/x/y")


def test_a_recipe_written_elsewhere_means_the_same_there(project, monkeypatch):
    recipe = read_recipe("exp/r.yaml")
    (project / "deep").mkdir()
    for target in ("exp/again.yaml", "exp/deep/again.yaml", "again.yaml"):
        Tuner.from_recipe(recipe).to_yaml(target)
        assert read_recipe(target) == recipe, target
    written = Path("exp/deep/again.yaml").read_text()
    assert "data: ../rows.jsonl" in written
    assert "- org/name" in written
    assert recipe.steps[1].data == "exp/rows.jsonl"
    # what is not written to a file is as it is here
    assert "data: exp/rows.jsonl" in Tuner.from_recipe(recipe).to_yaml()


def test_a_run_keeps_whole_paths(project, monkeypatch, tmp_path):
    recipe = read_recipe("exp/r.yaml")
    kept = tmp_path / "runs" / "a" / "recipe.yaml"
    kept.parent.mkdir(parents=True)
    kept.write_text(recipe_text(recipe))
    assert f"data: {project}/rows.jsonl\n" in kept.read_text()
    assert "exp" not in kept.read_text().replace(str(project), "")
    monkeypatch.chdir("/")
    again = read_recipe(kept)
    assert [os.path.join("/", each) for each in paths(again)[:4]] == [
        str(project / name) for name in ("base", "own.jinja", "rows.jsonl", "held.jsonl")
    ]
    assert paths(again)[4] == "org/held"


def test_data_in_memory_is_named_and_not_taken_for_a_path():
    rows = [{"instruction": "a", "output": "b"}]
    text = recipe_text(Tuner("m").sft(iter(rows)).recipe)
    assert "data: <list_iterator in memory>" in text


def test_in_python_paths_are_those_from_the_working_directory(project):
    tuner = Tuner("m").sft(Data("exp/rows.jsonl"))
    assert tuner.recipe.steps[0].data.sources[0].data == "exp/rows.jsonl"


def test_every_builtin_option_that_holds_a_path_says_so():
    found = {
        (item.key, field.name, field.metadata.get(PATHS))
        for item in registry()
        if item.builtin
        for field in attrs.fields(item.spec.config)
        if PATHS in field.metadata or field.name.endswith(("_data", "_file", "_path", "_dir"))
    }
    assert found == {
        ("tunesmith:dpo", "eval_data", "data"),
        ("tunesmith:sft", "eval_data", "data"),
    }


# --set

STEPS = """\
model: m
steps:
  - quantize: nf4
  - peft: lora
    with: {r: 8}
  - train: sft
    data: a.json
  - train: dpo
    data: b.json
  - train: sft
    data: c.json
"""


def test_changes_are_made_to_settings_and_to_steps_by_name_and_number(project):
    recipe = read_recipe(
        STEPS,
        changes=[
            *(
                "seed=3",
                "model=org/x",
                "lora.r=4",
                "lora.alpha=16",
                "4.beta=0.2",
                "05-sft.epochs=2",
            ),
            *("dpo.learning_rate=1e-4", "quantize-nf4.nested=false", "4.data=[x.json, y.json]"),
            *("3.packing=true", "lora.targets=[q_proj]", "lora.name=zh", "chat_template="),
        ],
    )
    assert (recipe.seed, recipe.model, recipe.chat_template) == (3, "org/x", None)
    quantize, lora, sft, dpo, again = recipe.steps
    assert quantize.options == {"nested": False}
    assert lora.options == {"r": 4, "alpha": 16, "targets": ("q_proj",)}
    assert lora.name == "zh"
    assert sft.options == {"packing": True}
    assert dpo.data == ["x.json", "y.json"]
    assert dpo.options == {"beta": 0.2, "learning_rate": "1e-4"}  # text that is taken as a number
    assert registry().config_of(dpo)[1].learning_rate == 1e-4
    assert again.options == {"epochs": 2}
    assert read_recipe(STEPS) == Recipe.from_yaml(STEPS)


def test_a_change_may_be_the_plugin_or_a_model_that_the_file_does_not_name():
    assert read_recipe("steps: []\n", changes=["model=m"]).model == "m"
    assert read_recipe(STEPS, changes=["1.quantize=fp4"]).steps[0].plugin == "fp4"


def test_paths_on_the_command_line_are_those_from_the_working_directory(project):
    (project / "r.yaml").write_text(STEPS)
    recipe = read_recipe(
        "exp/r.yaml", changes=["3.data=exp/a.json", "3.eval_data=e.json", "model=./m"]
    )
    assert recipe.model == "./m"
    assert recipe.steps[2].data == "exp/a.json"
    assert recipe.steps[2].options["eval_data"] == "e.json"
    assert recipe.steps[3].data == "exp/b.json"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("sft", "expected a target and a value, such as sft.learning_rate=1e-4"),
        ("=3", "expected a target and a value"),
        ("sead=3", "unknown key 'sead'; did you mean 'seed'?; the settings are: model, seed,"),
        ("bf16=true", "it is called 'precision' here"),
        ("learning_rate=1", "it is an option of a training step"),
        ("sfft.epochs=1", "there is no step 'sfft'; did you mean 'sft'?; the steps are: 01-quant"),
        ("6.epochs=1", "there is no step '6'"),
        ("sft.epochs=1", "there are 2 steps 'sft'; say which by its number: 3.epochs or 5.epochs"),
        ("3.data.sources=1", "there is no step '3.data'; .*whose whole value is given"),
        ("dpo.beta=[1", "the value, line 1: not valid YAML"),
        ("dpo.beta=${GONE}", "the value, line 1: .*is not set"),
    ],
)
def test_a_change_that_cannot_be_made_is_told_with_the_nearest_names(change, said):
    with pytest.raises(RecipeError) as caught:
        read_recipe(STEPS, changes=[change])
    assert str(caught.value).startswith(f"--set {change}: ")
    head, _, tail = said.partition(".*")
    assert head in str(caught.value)
    assert tail in str(caught.value)


def test_all_changes_that_cannot_be_made_are_told_at_once():
    with pytest.raises(RecipeError) as caught:
        read_recipe(STEPS, changes=["sead=1", "dpo.beta=0.1", "dpo.beta=0.2", "x.y=1"])
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "--set sead=1",
        "--set dpo.beta=0.2",
        "--set x.y=1",
    ]
    assert "'dpo.beta' is set twice" in lines[1]


def test_a_misspelt_option_is_found_as_one_in_the_file_is():
    recipe = read_recipe(STEPS, changes=["dpo.learning_rat=1"])
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        registry().config_of(recipe.steps[3])
