"""${VAR} in a recipe: put in from the environment, or told where it stands and why not."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.errors import RecipeError
from tunesmith.recipe import Recipe, Step
from tunesmith.report.html import write_report

SET = {"DIR": "/data", "N": "7", "YES": "true", "EMPTY": "", "NESTED": "${DIR}", "MAX_TOKENS": "5"}


def value_of(written: str, variables=SET):
    """Return what an option is read as from YAML."""
    text = f"model: m\nsteps:\n  - peft: lora\n    v: {written}\n"
    return Recipe.from_yaml(text, variables=variables).steps[0].options["v"]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("${DIR}/a.json", "/data/a.json"),
        ("${N}", 7),
        ("'${N}'", "7"),
        ('"${N}"', "7"),
        ("!!str ${N}", "7"),
        ("${YES}", True),
        ("${EMPTY}", None),
        ("'${EMPTY}'", ""),
        ("${EMPTY:-3}", 3),
        ("${GONE:-a b}", "a b"),
        ("${GONE:-}", None),
        ("${NESTED}", "${DIR}"),
        ("${MAX_TOKENS}", 5),
        ("$${DIR}", "${DIR}"),
        ("$$${DIR}", "$${DIR}"),
        ("a$b $DIR {x}", "a$b $DIR {x}"),
        ("['${DIR}', x]", ("/data", "x")),
        ("{a: '${DIR}'}", {"a": "/data"}),
    ],
)
def test_variables_are_put_into_text(written, read):
    got = value_of(written)
    assert got == read
    assert type(got) is type(read)


def test_a_run_takes_them_from_the_environment(monkeypatch):
    monkeypatch.setenv("TS_MODEL", "org/model")
    monkeypatch.setenv("TS_SEED", "11")
    recipe = Recipe.from_yaml("model: ${TS_MODEL}\nseed: ${TS_SEED}\n")
    assert (recipe.model, recipe.seed) == ("org/model", 11)
    assert Recipe.from_yaml('{"model": "${TS_MODEL}"}').model == "org/model"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("${GONE}", r"\$\{GONE\} is not set; set it, give a default: \$\{GONE:-…\}, or write"),
        ("${DIRS}", r"\$\{DIRS\} is not set; did you mean 'DIR'\?"),
        ("${N:?no}", r"begins a variable; expected \$\{NAME\} or \$\{NAME:-default\}"),
        ("${", "begins a variable"),
        ("${1A}", "begins a variable"),
        ("${HF_TOKEN}", "is a secret by its name, and a recipe is kept in the run directory"),
        ("${WANDB_API_KEY:-x}", "is a secret by its name"),
        ("${db_password}", "is a secret by its name"),
    ],
)
def test_what_cannot_be_put_in_is_told_with_file_line_and_key(tmp_path, written, said):
    path = tmp_path / "r.yaml"
    path.write_text(f"model: m\nsteps:\n  - train: sft\n    data: {written}\n")
    with pytest.raises(RecipeError, match=rf"r\.yaml, line 4: 'data': .*{said}"):
        Recipe.from_yaml(path, variables={**SET, "HF_TOKEN": "hf_1"})
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"model": "m", "steps": [{"train": "sft", "data": written}]}))
    with pytest.raises(RecipeError, match=rf"r\.json: 'steps\.1\.data': .*{said}"):
        Recipe.from_yaml(path, variables={**SET, "HF_TOKEN": "hf_1"})


def test_a_secret_is_not_in_the_message_either():
    with pytest.raises(RecipeError) as caught:
        value_of("${HF_TOKEN}", {"HF_TOKEN": "hf_verysecret"})
    assert "verysecret" not in str(caught.value)


def test_the_recipe_of_a_run_from_elsewhere_gets_no_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("TS_MINE", "not-for-others")
    (tmp_path / "recipe.yaml").write_text("model: ${TS_MINE}\nsteps:\n  - peft: lora\n")
    report = write_report(tmp_path).read_text()
    assert "${TS_MINE}" in report
    assert "not-for-others" not in report


def test_no_structure_comes_of_a_variable():
    odd = {"X": "a\nseed: 3\n- b: [1, 2", "Y": "[1, 2]", "T": "<<"}
    assert value_of("${X}", odd) == odd["X"]
    assert value_of("${Y}", odd) == "[1, 2]"
    assert value_of("${T}", odd) == "<<"


def test_keys_stay_as_they_are():
    recipe = Recipe.from_yaml("model: m\nsteps:\n  - {peft: lora, with: {'${DIR}': 1}}\n")
    assert recipe.steps[0].options == {"${DIR}": 1}


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_variables_that_make_more_than_a_recipe_may_hold_are_refused(form):
    row = {"model": "m", "steps": [{"train": "sft", "data": ["${BIG}"] * 100}]}
    text = json.dumps(row)
    if form == "yaml":
        text = "model: m\nsteps:\n  - train: sft\n    data: " + json.dumps(["${BIG}"] * 100) + "\n"
    with pytest.raises(RecipeError, match="make more than 8,000,000 characters"):
        Recipe.from_yaml(text, variables={"BIG": "x" * 100_000})


@pytest.mark.parametrize("text", ["model: '${HALF}'\n", '{"model": "${HALF}"}'])
def test_bytes_that_are_no_text_are_refused(text):
    with pytest.raises(RecipeError, match="half of a character"):
        Recipe.from_yaml(text, variables={"HALF": "\udcff"})


DOLLARS = st.text("${}A:-x", max_size=8)


@given(DOLLARS, DOLLARS, st.sampled_from(["to_yaml", "to_json"]))
def test_text_that_looks_like_a_variable_is_written_and_comes_back(model, value, form):
    recipe = Recipe("m" + model, [Step("train", "x", {"v": value, "w": [{"k": value}]}, [value])])
    assert Recipe.from_yaml(getattr(recipe, form)(), variables={}) == recipe
