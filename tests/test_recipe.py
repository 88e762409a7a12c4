"""A recipe is plain data: it goes to YAML and JSON and comes back equal, or says what is wrong."""

from __future__ import annotations

import enum
import json
import os
import re
import string
import time
from pathlib import Path

import attrs
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.errors import RecipeError
from tunesmith.recipe import VERBS, Recipe, Step, plain

EXAMPLE = """\
tunesmith: 1
model: org/model
seed: 3
steps:
  - quantize: nf4
  - peft: lora
    r: 16
  - train: sft
    data: train.json
    learning_rate: 2e-4
  - train: dpo
    data: [a.json, b.json]
    format: preference
  - export: merge
"""


def error(source) -> str:
    with pytest.raises(RecipeError) as raised:
        Recipe.from_yaml(source) if isinstance(source, (str, Path)) else Recipe.from_dict(source)
    return str(raised.value)


# reading and writing


def test_a_recipe_file_reads_like_the_chain():
    recipe = Recipe.from_yaml(EXAMPLE)
    assert (recipe.model, recipe.seed, recipe.device) == ("org/model", 3, "auto")
    assert [(step.verb, step.plugin) for step in recipe.steps] == [
        ("quantize", "nf4"),
        ("peft", "lora"),
        ("train", "sft"),
        ("train", "dpo"),
        ("export", "merge"),
    ]
    assert recipe.steps[1].options == {"r": 16}
    assert recipe.steps[3].data == ["a.json", "b.json"]
    assert recipe.steps[3].format == "preference"


def test_a_recipe_is_read_from_a_path_or_from_its_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(EXAMPLE)
    assert Recipe.from_yaml(path) == Recipe.from_yaml(str(path)) == Recipe.from_yaml(EXAMPLE)


def test_json_on_one_line_is_text_and_not_a_path():
    assert Recipe.from_yaml('{"model": "org/model"}') == Recipe("org/model")
    long = json.dumps(Recipe("org/model", [Step("peft", "lora")] * 200).to_dict())
    assert len(Recipe.from_yaml(long).steps) == 200


def test_a_small_number_is_a_number_in_json_too():
    recipe = Recipe("m", [Step("train", "sft", {"learning_rate": 2e-05})])
    assert Recipe.from_yaml(recipe.to_json()).steps[0].options["learning_rate"] == 2e-05


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029", "\r", "\ufeff", "\t", "\x00"])
def test_odd_characters_come_back_from_yaml(character):
    recipe = Recipe(f"a{character}b", [Step("peft", "x", {"v": f"{character}b"})])
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_json_that_escapes_what_is_not_ascii_is_read():
    recipe = Recipe("m", [Step("train", "sft", {}, "\N{SMILING FACE WITH SUNGLASSES}.json")])
    assert Recipe.from_yaml(json.dumps(recipe.to_dict(), ensure_ascii=True)) == recipe


def test_defaults_are_left_out_of_the_file():
    assert Recipe("m").to_dict() == {"tunesmith": 1, "model": "m", "steps": []}


KEYS = st.text(string.ascii_lowercase + "_", min_size=1, max_size=8)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)
BARE = st.from_regex(r"[a-zé0-9_+-][a-z0-9_.+-]{0,20}", fullmatch=True)
NAMES = BARE | st.from_regex(r"[a-z]{1,9}:[a-zé0-9_+-][a-z0-9_.+-]{0,20}", fullmatch=True)
OPTIONS = st.dictionaries(
    KEYS | st.sampled_from(["data", "format", "name", "with", *VERBS]), VALUES, max_size=4
)
STEPS = st.builds(
    Step,
    verb=st.sampled_from([verb for verb in VERBS if not VERBS[verb].named and VERBS[verb].kind]),
    plugin=NAMES,
    options=OPTIONS,
    data=st.none()
    | st.text()
    | st.lists(st.text(), max_size=3)
    | st.lists(st.dictionaries(KEYS, VALUES), max_size=2),
    format=st.none() | NAMES,
)
NAMED_VERBS = st.sampled_from([verb for verb in VERBS if VERBS[verb].named])
NAMED = st.builds(Step, verb=NAMED_VERBS, plugin=NAMES, options=OPTIONS, name=st.none() | BARE)
USES = st.builds(Step, verb=st.just("use"), plugin=BARE)
RECIPES = st.builds(
    Recipe,
    model=st.text(min_size=1),
    steps=st.lists(STEPS | NAMED | USES, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    device=st.text(),
    precision=st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
    chat_template=st.none() | st.text(),
)


@given(RECIPES)
def test_every_recipe_goes_to_yaml_and_comes_back_equal(recipe):
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@given(RECIPES)
def test_every_recipe_goes_to_json_and_comes_back_equal(recipe):
    assert Recipe.from_yaml(recipe.to_json()) == recipe


def test_options_named_like_a_steps_own_keys_are_kept_apart():
    step = Step("train", "sft", {"data": 1, "peft": 2}, "rows.json")
    assert step.to_dict() == {
        "train": "sft",
        "data": "rows.json",
        "with": {"data": 1, "peft": 2},
    }
    assert Step.from_dict(step.to_dict()) == step


class Colour(enum.StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, (2, 3)), [1, [2, 3]]),
        (Path("a/b"), "a/b"),
        ({"b", "a"}, ["a", "b"]),
        ({1: "x"}, {"1": "x"}),
        (numpy.float64(0.5), 0.5),
        (Colour.RED, "red"),
        (True, True),
    ],
)
def test_option_values_are_written_as_plain_ones(value, expected):
    written = plain(value)
    assert written == expected
    assert type(written) is type(expected)
    assert Recipe.from_yaml(Recipe("m", [Step("peft", "x", {"v": value})]).to_yaml())


def test_an_option_that_no_file_can_hold_is_refused():
    with pytest.raises(RecipeError, match="got a object as an option; a recipe holds text, num"):
        Recipe("m", [Step("peft", "lora", {"r": object()})]).to_yaml()


# data


def test_paths_and_rows_are_kept_as_data():
    assert Step("train", "sft", {}, Path("a.json")).to_dict()["data"] == "a.json"
    assert Step("train", "sft", {}, (Path("a"), "b")).to_dict()["data"] == ["a", "b"]
    assert Step("train", "sft", {}, [{"text": "x"}]).to_dict()["data"] == [{"text": "x"}]


@pytest.mark.parametrize("data", [iter([{"text": "x"}]), numpy.zeros(3), [1, 2]])
def test_data_that_lives_in_this_process_only_is_refused(data):
    recipe = Recipe("m", [Step("train", "sft", {}, data)])  # building it is no error
    with pytest.raises(RecipeError, match=r"lives in this process only; save it to a \.jsonl"):
        recipe.to_yaml()


@pytest.mark.parametrize("rows", [[{"a": 1}] * 30_000, [{"a": "x" * 2_500_000}]], ids=len)
def test_rows_too_many_to_be_read_back_are_refused(rows):
    with pytest.raises(
        RecipeError, match=r"rows are too much for a recipe; save them to a \.jsonl"
    ):
        Recipe("m", [Step("train", "sft", {}, rows)]).to_yaml()


@pytest.mark.slow
def test_the_most_that_a_recipe_may_hold_is_read_back_within_seconds():
    recipe = Recipe("m", [Step("train", "sft", {}, [{"a": 1}] * 16_000)])
    begin = time.monotonic()
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert time.monotonic() - begin < 60


# what is wrong


def test_every_problem_is_reported_at_once():
    message = error(
        {
            "tunesmith": 9,
            "modle": "x",
            "seed": "three",
            "device": 0,
            "chat_template": 1,
            "steps": [{"quantise": "nf4"}, {"peft": ""}, "sft", {"train": "sft"}],
        }
    )
    assert message.splitlines() == [
        "recipe: unknown key 'modle'; did you mean 'model'?",
        "recipe: written for recipe version 9; this tunesmith reads version 1; upgrade with "
        "`pip install -U tunesmith`",
        "recipe: 'model' is None; expected a hub id, a directory or a .gguf file",
        "recipe: 'seed' is 'three'; expected a whole number",
        "recipe: 'device' is 0; expected 'auto' or a torch device such as 'cuda:0'",
        "recipe: 'chat_template' is 1; expected Jinja source, the path of a .jinja file, or "
        "'chatml'",
        "recipe: step 1: got the keys quantise; expected exactly one of quantize, peft, train, "
        "use, evaluate, export; did you mean 'quantize' or 'use'?",
        "recipe: step 2: 'peft' is ''; expected a name of at most 100 letters, digits, '_', '-', "
        "'+' and '.', such as 'lora', or 'distribution:name'",
        "recipe: step 3: got 'sft'; expected a mapping such as 'quantize: nf4'",
    ]


def test_broken_yaml_names_file_and_line(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("model: m\nsteps:\n  - train: [sft\n  - export: merge\n")
    message = error(path)
    assert message.startswith(f"{path}, line 4: not valid YAML: ")
    assert "\n" not in message


def test_broken_json_names_file_and_line(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('{\n  "model": "m",\n  "steps": [}\n}\n')
    assert error(path).startswith(f"{path}, line 3: not valid JSON: ")


def test_a_wrong_step_names_file_and_number(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\nsteps:\n  - peft: lora\n  - trian: sft\n")
    assert error(path).startswith(f"{path}: step 2: got the keys trian; expected exactly one of")
    assert error(path).endswith("did you mean 'train'?")


@pytest.mark.parametrize(
    "text",
    [
        "model: m\nsteps:\n  - train: sft\n    data: a.json\n    data: b.json\n",
        '{"model": "m",\n "steps": [{"train": "sft", "data": "a", "data": "b"}]}',
    ],
)
def test_a_key_that_stands_twice_does_not_lose_one_in_silence(text):
    assert "the key 'data' stands twice in one " in error(text)


def test_a_key_that_stands_twice_in_yaml_names_the_line():
    text = "model: m\nsteps:\n  - peft: lora\n    r: 8\n    r: 16\n"
    assert error(text).startswith("recipe, line 5: the key 'r' stands twice in one mapping")


def test_an_option_given_beside_with_and_in_it_does_not_lose_one_in_silence():
    row = {"model": "m", "steps": [{"peft": "lora", "r": 8, "with": {"r": 16}}]}
    assert "r given beside 'with' and in it; give it in one place" in error(row)


def test_two_verbs_in_one_step_are_refused():
    row = {"model": "m", "steps": [{"quantize": "nf4", "peft": "lora"}]}
    assert "step 1: got the keys peft, quantize; expected exactly one of" in error(row)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([], "recipe: got list; expected a mapping"),
        ({"model": "m", "steps": "sft"}, "'steps' is 'sft'; expected a list of steps"),
        ({"model": "m", "seed": True}, "'seed' is True; expected a whole number"),
        ({"model": "m", "seed": None}, "'seed' is None; expected a whole number"),
        (
            {"model": "m", "steps": [{"peft": "lora", "with": 3}]},
            "'with' is 3; expected a mapping of options",
        ),
        (
            {"model": "m", "steps": [{"train": "sft", "format": 3}]},
            "step 1: 'format' is 3; expected a name of at most 100 letters",
        ),
    ],
)
def test_a_shape_that_is_no_recipe_is_refused(row, problem):
    assert problem in error(row)


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert error(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: no such recipe file"


def test_a_directory_is_no_recipe(tmp_path):
    assert error(tmp_path) == (
        f"{tmp_path}: is a directory; expected a recipe file such as recipe.yaml"
    )


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b"])
def test_text_that_can_be_no_path_is_a_recipe_error(source):
    assert "cannot be read" in error(source)


def test_a_file_that_is_not_text_is_named(tmp_path):
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert error(path).startswith(f"{path}: cannot be read: ")


def test_an_unknown_verb_is_answered_with_the_nearest():
    with pytest.raises(RecipeError, match="unknown step 'trian'; did you mean 'train'"):
        Step("trian", "sft")


# the values themselves


def test_a_recipe_cannot_be_changed_and_grows_by_copies():
    recipe = Recipe("m")
    longer = recipe.with_step(Step("peft", "lora"))
    assert (recipe.steps, len(longer.steps)) == ((), 1)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        recipe.seed = 1


def test_changing_the_options_one_passed_in_changes_no_step():
    options = {"r": 8}
    step = Step("peft", "lora", options)
    options["r"] = 16
    assert step.options == {"r": 8}


@pytest.mark.parametrize(
    ("step", "label"),
    [
        (Step("quantize", "nf4"), "quantize-nf4"),
        (Step("peft", "someone:lora"), "lora"),
        (Step("train", "sft"), "sft"),
        (Step("evaluate", "loss"), "evaluate-loss"),
    ],
)
def test_a_step_has_a_short_name(step, label):
    assert step.label == label


def test_every_verb_is_served_by_a_kind():
    assert [Step(verb, "x").kind for verb in VERBS] == [row.kind for row in VERBS.values()]


# within bounds

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
SELF = "model: m\nsteps: &s\n  - peft: lora\n    with: {a: *s}\n"


def repr_type(value) -> str:
    """Name a case by its type where its text would be endless."""
    return type(value).__name__


def raw(tmp_path, content: bytes, name="recipe.yaml"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def test_aliases_and_merge_keys_that_stay_small_are_read():
    text = (
        "model: m\nsteps:\n  - &first {train: sft, data: a.json, r: 1}\n"
        "  - {<<: *first, data: b.json}\n"
    )
    first, second = Recipe.from_yaml(text).steps
    assert (first.data, second.data, second.options) == ("a.json", "b.json", {"r": 1})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (f"model: m\n{BOMB}", "line 7: stands for more than 100,000 values"),
        (SELF, "line 4: the alias '.s' stands in what it stands for"),
        ("model: m\nsteps: " + "[" * 100_000, "line 2: nested more than 100 deep"),
        ("model: m\n" + "- " * 5000, "nested more than 100 deep|not valid YAML"),
        (
            # neither is deep by itself
            f"model: m\nx: &a {'[' * 40}1{']' * 40}\ny: &b {'[' * 40}*a{']' * 40}\n"
            f"z: {'[' * 30}*b{']' * 30}\n",
            "nested more than 100 deep",
        ),
        ("model: m\nseed: " + "9" * 5000, "line 2: '9+' is no int"),
        ("model: m\nd: 2024-99-99\n", "line 2: '2024-99-99' is no timestamp"),
        ("model: m\nd: 2024-01-01\n", "line 2: '2024-01-01' is read as a date; put it in quotes"),
        ("model: m\nd: !!int x\n", "line 2: 'x' is no int"),
        ("model: m\nd: !!bool maybe\n", "line 2: 'maybe' is no bool"),
        ("model: m\nd: !!set {a, b}\n", "line 2: .* is read as a set"),
        ("model: m\nd: !!binary aGk=\n", "line 2: .* is read as a bytes"),
        (
            "model: m\nd: !!python/object/apply:os.system ['true']\n",
            "line 2: not valid YAML: could",
        ),
        ('model: m\nd: "\\ud800"\n', "line 2: .* holds half of a character"),
        ("model: m\n[a]: b\n", "line 2: a key that is no text"),
        ("model: m\nsteps:\n  - {peft: lora, 1: 2}\n", "step 1: the key 1 is no text"),
        ("model: m\nsteps:\n  - {peft: lora, r: .nan}\n", "step 1: 'r' is nan; expected a finite"),
        ("model: m\nsteps:\n  - {peft: lora, r: [-.inf]}\n", "step 1: 'r' is -inf; expected a fin"),
        ("model: m\nseed: -1\n", "recipe: 'seed' is -1; expected 0 to 4294967295"),
        (
            '{"model": "m", "seed": ' + "9" * 5000 + "}",
            "field 'seed': a whole number of 5000 digit",
        ),
        ('{"model": "m", "seed": NaN}', "field 'seed': NaN is no JSON"),
        ('{"model": "\\ud800"}', "field 'model': .* holds half of a character"),
        ('{"model": ' + "[" * 100_000, "nested more than 100 deep"),
        ('{"model": "m", "steps": ' + "[" * 900 + "]" * 900 + "}", "nested more than 100 deep"),
        ("a: b\0c\n", "not valid YAML"),
        ("x" * 9_000_000 + "\n", "recipe: 9,000,001 bytes; a recipe has at most 8,000,000"),
    ],
    ids=repr_type,
)
def test_a_recipe_beyond_bounds_is_refused_at_once(text, problem):
    begin = time.monotonic()
    message = error(text)
    assert re.search(problem, message), message[:500]
    assert len(message) < 1000
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("model: m\n".encode("utf-16"), "it is UTF-16; save it in the encoding UTF-8"),
        (b"\x00\x01\x02\x80\xff", r"byte 3 \(0x80\) is no UTF-8 text"),
        (b"", "got NoneType; expected a mapping"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, content, problem):
    path = raw(tmp_path, content)
    assert re.match(re.escape(str(path)) + ".*" + problem, error(path))


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path):
    for name, text in (("a.yaml", EXAMPLE), ("a.json", '{"model": "m"}')):
        assert Recipe.from_yaml(raw(tmp_path, b"\xef\xbb\xbf" + text.encode(), name)).model


def test_a_recipe_file_of_a_gigabyte_of_nothing_is_refused_unread(tmp_path):
    path = tmp_path / "sparse.yaml"
    with path.open("wb") as stream:
        stream.truncate(1_000_000_000)
    assert error(path) == (
        f"{path}: 1,000,000,000 bytes; a recipe has at most 8,000,000; put rows into a .jsonl "
        "file and give its path"
    )


def test_a_pipe_and_a_device_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "is no regular file" in error(tmp_path / "pipe.yaml")
    assert "is no regular file" in error("/dev/zero")


@pytest.mark.parametrize(
    "name",
    [
        *["", " ", "../x", "a/b", "a\\b", ".", "..", "a:..", "a:.b", ":x", "a:b:c", "a:", 3, None],
        *["x" * 101, "é" * 51, "a\0b", "a\nb", "a b", "\ud800", "a\x1b[31m"],
    ],
)
def test_a_name_is_a_name_and_no_path(name):
    for row in ({"peft": name}, {"train": "sft", "format": name}):
        if row.get("format", "") is None:
            continue  # no format is to detect it
        message = error({"model": "m", "steps": [row]})
        assert re.match(
            "recipe: step 1: '(peft|format)' is .*; expected a name of at most", message
        )
        message.encode()
    with pytest.raises(RecipeError, match="expected a name"):
        Step("train", name)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"r": 10**5000}, "'r' is a whole number of 16610 bits; expected at most 4300 digits"),
        ({"r": "\ud800"}, "half of a character"),
    ],
    ids=repr_type,
)
def test_an_option_that_no_file_can_hold_is_refused_where_it_is_given(options, problem):
    with pytest.raises(RecipeError, match=problem):
        Step("peft", "lora", options)


@pytest.mark.parametrize("value", [float("nan"), 10**5000, "\ud800"], ids=repr_type)
def test_a_row_that_could_not_be_read_back_is_not_written(value):
    recipe = Recipe("m", [Step("train", "sft", {}, [{"a": value}])])
    for write in (recipe.to_yaml, recipe.to_json):
        with pytest.raises(RecipeError, match=r"got .*(a recipe holds finite|half of a character)"):
            write()


def test_options_that_hold_themselves_are_refused():
    options: dict = {}
    options["a"] = options
    with pytest.raises(RecipeError, match="nested more than 100 deep"):
        Step("peft", "lora", options)


@pytest.mark.parametrize("seed", [-1, 2**32, 10**5000, 1.5, "x", True], ids=repr_type)
def test_a_seed_that_no_generator_takes_is_refused(seed):
    with pytest.raises(RecipeError, match=r"'seed' is .*; expected 0 to 4294967295"):
        Recipe("m", seed=seed)
