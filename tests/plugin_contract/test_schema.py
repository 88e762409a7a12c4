"""The JSON schema of recipes says what the plugins' config classes and the recipe say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import attrs
import jsonschema
import pytest
import yaml

from tunesmith import Data, Recipe, Tuner
from tunesmith.errors import OptionError, RecipeError, TunesmithError
from tunesmith.plugin import Spec, hookimpl
from tunesmith.plugin.options import at_least, between, field_docs, one_of
from tunesmith.plugin.registry import Registry, registry
from tunesmith.plugin.rewards import Rewards
from tunesmith.plugin.schema import recipe_schema
from tunesmith.recipe import VERBS
from tunesmith.recipe_data import Source

SCHEMA = recipe_schema(registry())
VALID = jsonschema.Draft202012Validator(SCHEMA)


def problems(text: str, validator=VALID) -> list[str]:
    return [error.message for error in validator.iter_errors(yaml.safe_load(text))]


def step(text: str) -> str:
    return f"model: m\nsteps:\n  - {text}\n"


def test_it_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    "text",
    [
        "model: m\n",
        "model: m\nsteps:\n",
        "tunesmith: 1\nmodel: m\nseed: 3\ndevice: cpu\nprecision: bf16\nchat_template: chatml\n",
        "model: ${MODEL}\nseed: ${SEED:-3}\nprecision: ${P}\ntrust_remote_code: ${T}\n",
        step("quantize: nf4"),
        step("{quantize: 'tunesmith:nf4', blocksize: 128, skip: [a, b]}"),
        step("{quantize: nf4, skip: a}"),
        step("{peft: lora, r: 16, alpha: , name: zh, targets: [q_proj]}"),
        step("{peft: lora, with: {r: '16', dora: true}}"),
        step("{train: sft, data: a.json, learning_rate: 2e-4, packing: true, eval_data: [a, b]}"),
        step("{train: sft, data: [a, b], format: alpaca, loggers: wandb}"),
        step("{train: sft, data: [{prompt: a}], epochs: '${E}', packing: '${P}'}"),
        step("{train: '${TRAINER}', data: a, what: ever}"),
        step("{use: zh}"),
        step("{evaluate: loss, data: a, batch_size: 2}"),
        step("{export: merge, dtype: fp16}"),
        step("{export: mix, name: both, adapters: {zh: 0.5, en: 1}}"),
        step("{export: mix, with: {adapters: {zh: 0.5}}}"),
        step(
            "{train: sft, data: {sources: [a, {data: b, format: alpaca, on_bad_row: drop}, "
            "{sources: [c], transforms: [clean]}], "
            "transforms: [{transform: split, held_out: 0.1}]}}"
        ),
    ],
)
def test_a_good_recipe_is_valid(text):
    assert problems(text) == []
    variables = {"MODEL": "m", "SEED": "3", "P": "bf16", "T": "true", "E": "2", "TRAINER": "sft"}
    Recipe.from_yaml(text, variables=variables)


def read(text: str) -> None:
    """Do what reading and planning a recipe do, as far as a schema can tell of it."""
    recipe = Recipe.from_yaml(text, variables={})
    if recipe.precision not in ("auto", "fp32", "bf16", "fp16"):
        raise OptionError(["precision"])
    for each in recipe.steps:
        if (each.data is not None) != VERBS[each.verb].takes_data or each.data == 3:
            raise RecipeError("data")
        if each.kind:
            registry().config_of(each)
        if each.source is not None:
            registry().check_data(each.source)
            for source in each.source.sources:
                if source.format is not None:
                    registry().find("formats", source.format)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: []\n", "'model' is a required property"),
        ("model: m\nmodle: n\n", "'modle' was unexpected"),
        ("model: m\nseed: -1\n", "-1 is less than the minimum of 0"),
        ("model: m\nseed: x\n", "'x' does not match"),
        ("model: m\nprecision: bf15\n", "'bf15' is not valid"),
        ("tunesmith: 2\nmodel: m\n", "1 was expected"),
        (step("lora: "), "is not valid under any of the given schemas"),
        (step("{quantize: nf4, peft: lora}"), "is valid under each of"),
        (step("peft: lroa"), "'lroa' is not valid under any of the given schemas"),
        (step("{peft: lora, rank: 3}"), "'rank' was unexpected"),
        (step("{peft: lora, r: 0}"), "0 is less than the minimum of 1"),
        (step("{peft: lora, r: 1.5}"), "1.5 is not of type 'integer'"),
        (step("{peft: lora, r: many}"), "'many' does not match"),
        (step("{peft: lora, dora: 1}"), "1 is not of type 'boolean'"),
        (step("{peft: lora, dropout: 1}"), "1 is greater than the maximum of 0.99"),
        (step("{peft: lora, bias: some}"), "'some' is not valid under any"),
        (step("{peft: lora, with: {rank: 3}}"), "'rank' was unexpected"),
        (step("{peft: lora, data: a}"), "'data' was unexpected"),
        (step("{quantize: nf4, name: a}"), "'name' was unexpected"),
        (step("{quantize: nf4, blocksize: 65}"), "65 is not valid under any"),
        (step("{train: sft, beta: 0.1, data: a}"), "'beta' was unexpected"),
        (step("{train: sft}"), "'data' is a required property"),
        (step("{train: sft, data: 3}"), "3 is not valid under any"),
        (step("{train: sft, data: a, learning_rate: 0}"), "less than or equal to the minimum of 0"),
        (step("{train: sft, data: a, loggers: [wandbb]}"), "is not valid under any"),
        (step("{train: sft, data: a, format: alpacca}"), "'alpacca' is not valid under any"),
        (step("{train: sft, data: {sources: []}}"), "is not valid under any"),
        (step("{train: sft, data: {sources: [{data: a, wight: 1}]}}"), "is not valid under any"),
        (step("{train: sft, data: {sources: [{data: a, on_bad_row: x}]}}"), "is not valid under"),
        (
            step("{train: sft, data: {sources: [a], transforms: [{transform: limit, row: 1}]}}"),
            "is not valid under any",
        ),
        (step("{use: zh, r: 3}"), "'r' was unexpected"),
        (step("{export: mix, name: both}"), "is not valid under any"),
    ],
)
def test_a_bad_recipe_is_not_valid_and_is_refused_here_too(text, said):
    assert said in "\n".join(problems(text))
    with pytest.raises(TunesmithError):
        read(text)


# numbers written as text are in bounds here: a schema cannot tell
VALUES = (0, 1, 2, -1, 0.5, 1.5, "0.5", "0.25e-1", "x", "auto", True, False, None)
LISTS = ([], ["x"], ["none"], [1], {}, {"x": 0.5}, {"x": "y"})
OWN = (("mix", "adapters", {}),)
"""What only a validator of the plugin's own finds."""


@pytest.mark.parametrize("item", [item for item in registry() if item.builtin], ids=lambda i: i.key)
def test_an_option_is_valid_exactly_where_its_plugin_takes_it(item):
    given = {"adapters": {"a": 1}} if item.spec.name == "mix" else {}
    verbs = [verb for verb, row in VERBS.items() if row.kind == item.kind]
    looked = 0
    for name in field_docs(item.spec.config):
        for value in (*VALUES, *LISTS):
            if (item.spec.name, name, value) in OWN:
                continue
            options = {**given, name: value}
            try:
                item.structure(options)
                taken = True
            except OptionError as error:
                if not any(text.startswith(f"option '{name}'") for text in error.problems):
                    continue  # it does not go with the others as they are
                taken = False
            if verbs:
                row = {verbs[0]: item.key, **options}
                if VERBS[verbs[0]].takes_data:
                    row["data"] = "a"
                whole: Any = {"model": "m", "steps": [row]}
            elif item.kind == "transforms":
                data = {"sources": ["a"], "transforms": [{"transform": item.key, **options}]}
                whole = {"model": "m", "steps": [{"train": "sft", "data": data}]}
            else:
                continue
            assert VALID.is_valid(whole) == taken, f"{item.key}: {name}={value!r}"
            looked += 1
    assert looked or not field_docs(item.spec.config) or item.kind == "rewards"


def test_descriptions_and_defaults_are_those_of_the_config_class():
    sft = SCHEMA["$defs"]["train:tunesmith:sft"]["properties"]
    assert sft["epochs"]["default"] == 3.0
    assert sft["epochs"]["description"].startswith("Passes over the training data; 3 as Stanford")
    assert sft["packing"]["default"] is False
    for item in registry():
        for verb in [verb for verb, row in VERBS.items() if row.kind == item.kind]:
            shown = SCHEMA["$defs"][f"{verb}:{item.key}"]["properties"]["with"]["properties"]
            docs = field_docs(item.spec.config)
            assert {key: value["description"] for key, value in shown.items()} == {
                key: " ".join(doc.split()) for key, doc in docs.items()
            }
    assert SCHEMA["properties"]["seed"]["description"].startswith("Seeds everything random")


def test_every_key_of_a_recipe_of_its_data_and_of_a_source_is_in_it():
    def names(cls: type) -> set[str]:
        return {field.name for field in attrs.fields(cls)}

    assert set(SCHEMA["$defs"]["source"]["anyOf"][1]["properties"]) == names(Source)
    assert set(SCHEMA["$defs"]["data"]["anyOf"][3]["properties"]) == names(Data)
    assert set(SCHEMA["properties"]) == {"tunesmith", *names(Recipe)}


# a stranger's


@attrs.frozen(kw_only=True)
class Inner:
    depth: int = 1


@attrs.frozen(kw_only=True)
class ZoraConfig:
    data: str
    """An option that is called like a key of a step."""
    ranks: tuple[int, ...] = (8,)
    """Ranks of the layers."""
    mode: Literal["a", "b"] = "a"
    share: float = attrs.field(default=0.5, validator=[between(0, 1)])
    depth: int = attrs.field(default=1, validator=attrs.validators.ge(1))
    kind: str = attrs.field(default="x", validator=attrs.validators.in_(["x", "y"]))
    kinds: tuple[str, ...] = attrs.field(
        default=(), validator=attrs.validators.deep_iterable(one_of("x", "y"))
    )
    steps: int | None = attrs.field(default=None, validator=attrs.validators.optional(at_least(2)))
    scales: Mapping[str, float] = attrs.field(factory=dict)
    rewards: Rewards = ()
    inner: Inner = Inner()
    anything: Any = None
    turned: int = attrs.field(default=1, converter=int)


@attrs.frozen(kw_only=True)
class Within:
    again: Within | None = None


@attrs.frozen(kw_only=True)
class OddConfig:
    """Types that have no schema, or none that is resolved: such an option takes anything."""

    unknown: NoSuchType | None = None  # noqa: F821
    """One of a type that is not there."""
    within: int = 1


@attrs.frozen(kw_only=True)
class OddTypes:
    annotated: Annotated[int, []] = 1
    pair: tuple[int, str] = (1, "a")
    bare: dict = attrs.field(factory=dict)
    lists: list = attrs.field(factory=list)
    within: Within = Within()
    default: Any = object


class Stranger:
    @hookimpl
    def tunesmith_methods(self):
        return [
            Spec("zora", ZoraConfig, "a.b:C", summary="zeroth-order adaptation"),
            Spec("odd", OddConfig, "a.b:C"),
            Spec("types", OddTypes, "a.b:C"),
        ]


class Other:
    @hookimpl
    def tunesmith_methods(self):
        return [Spec("lora", Inner, "a.b:C"), Spec("twice", Inner, "a.b:C")]


@pytest.fixture(scope="module")
def strangers():
    import tunesmith_plugins

    found = Registry(
        [
            ("tunesmith", "tunesmith", "1", lambda: tunesmith_plugins),
            ("zora", "acme-zora", "1", Stranger),
            ("other", "other", "1", Other),
            ("third", "third", "1", Other),
        ]
    )
    assert not found.broken
    schema = recipe_schema(found)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{peft: zora, with: {data: x}}", ""),
        ("{peft: 'acme-zora:zora', with: {data: x}, ranks: 4, share: 1, kinds: [x]}", ""),
        ("{peft: zora, with: {data: x}, ranks: [4, 8], mode: b, steps: 2, scales: {a: 1}}", ""),
        ("{peft: zora, with: {data: x}, rewards: [[f, 1]], inner: {depth: 3}, turned: '7'}", ""),
        ("{peft: zora, with: {data: x}, anything: {goes: [1]}}", ""),
        ("{peft: 'other:lora', depth: 2}", ""),
        ("{peft: 'third:twice'}", ""),
        ("{peft: odd, unknown: {a: [1]}, within: x}", ""),  # the plan tells that it is unsound
        ("{peft: odd, other: 1}", "'other' was unexpected"),
        ("{peft: types, pair: [1, a], bare: {a: 1}, lists: [1], default: x}", ""),
        ("{peft: types, within: {again: {again: {}}}}", ""),
        ("{peft: types, annotated: x}", "'x' does not match"),
        ("{peft: types, pair: 1}", "1 is not of type 'array'"),
        ("{peft: zora}", "is not valid under any"),
        ("{peft: zora, data: x}", "'data' was unexpected"),
        ("{peft: zora, with: {data: x}, ranks: [x]}", "is not valid under any"),
        ("{peft: zora, with: {data: x}, mode: c}", "'c' is not valid"),
        ("{peft: zora, with: {data: x}, share: 2}", "2 is greater than the maximum of 1"),
        ("{peft: zora, with: {data: x}, depth: 0}", "0 is less than the minimum of 1"),
        ("{peft: zora, with: {data: x}, kind: z}", "'z' is not valid"),
        ("{peft: zora, with: {data: x}, kinds: [z]}", "is not valid under any"),
        ("{peft: zora, with: {data: x}, steps: 1}", "1 is less than the minimum of 2"),
        ("{peft: zora, with: {data: x}, scales: {a: b}}", "'b' does not match"),
        ("{peft: zora, with: {data: x}, inner: {deep: 1}}", "'deep' was unexpected"),
        ("{peft: lora, depth: 2}", "'depth' was unexpected"),  # the bare name is the built-in's
        ("{peft: twice}", "'twice' is not valid"),  # two bear it: neither may win
    ],
)
def test_a_strangers_plugin_is_in_it_as_the_built_ins_are(strangers, text, said):
    found = "\n".join(problems(step(text), strangers))
    assert said in found
    assert bool(said) == bool(found)


def test_what_to_yaml_writes_is_valid():
    tuner = (
        Tuner("m", precision="fp32", seed=3)
        .quantize("nf4", blocksize=128)
        .lora(r=8, targets=("q_proj",), name="zh")
        .sft("a.json", format="alpaca", epochs=2, learning_rate=1e-5)
        .use("zh")
        .evaluate("loss", "b.json")
        .merge()
    )
    assert problems(tuner.to_yaml()) == []
