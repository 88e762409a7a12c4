"""Options: strict types, closed key sets, every problem at once, and nothing ignored in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import attrs
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.errors import OptionError, PluginError
from tunesmith.plugin.options import (
    NoOptions,
    at_least,
    between,
    field_docs,
    given_options,
    more_than,
    one_of,
    structure,
)

if TYPE_CHECKING:
    from nowhere import Unknown


@attrs.frozen(kw_only=True)
class Base:
    rank: int = attrs.field(default=8, validator=at_least(1))
    """Rank of the update."""
    learning_rate: float | None = attrs.field(default=None, validator=more_than(0))
    """Peak rate,
    or none."""


@attrs.frozen(kw_only=True)
class Config(Base):
    scale: float = 1.0
    """Factor."""
    dropout: float = attrs.field(default=0.0, validator=between(0, 0.99))
    bias: str = attrs.field(default="none", validator=one_of("none", "all", "lora_only"))
    """Which biases."""
    fast: bool = False
    targets: str | tuple[str, ...] = "all-linear"
    skip: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    sizes: tuple[int, ...] = ()
    extra: dict[str, float] = attrs.field(factory=dict)
    kind: Literal["a", "b"] = "a"


@attrs.frozen
class Needy:
    path: str
    """Where."""
    count: int


def config(**options):
    return structure(Config, options, name="zora")


def problems(config_class=Config, /, **options):
    with pytest.raises(OptionError) as raised:
        structure(config_class, options, name="zora")
    return list(raised.value.problems)


# unknown and missing


def test_an_unknown_option_is_answered_with_the_nearest():
    assert problems(rnak=4) == ["unknown option 'rnak' for zora; did you mean 'rank'?"]


def test_an_unknown_option_near_to_none_is_answered_with_all():
    (problem,) = problems(Needy, path="x", count=1, zzzz=4)
    assert problem == "unknown option 'zzzz' for zora; its options are: path, count"


def test_a_plugin_without_options_says_so():
    assert problems(NoOptions, x=1) == ["unknown option 'x' for zora; its options are: none"]


def test_a_missing_option_is_named_with_what_it_should_be():
    assert problems(Needy, path="x") == [
        "option 'count' for zora: missing; expected a whole number"
    ]


def test_every_problem_is_reported_at_once():
    found = problems(Needy, pth="x", count="many")
    assert found == [
        "unknown option 'pth' for zora; did you mean 'path'?",
        "option 'count' for zora: got 'many'; expected a whole number",
        "option 'path' for zora: missing; expected text",
    ]


def test_no_options_are_the_defaults():
    assert config() == Config()


# types


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 4}, {"rank": 4}),
        ({"rank": 3.0}, {"rank": 3}),
        ({"rank": "16"}, {"rank": 16}),
        ({"learning_rate": "2e-4"}, {"learning_rate": 2e-4}),
        ({"learning_rate": 1}, {"learning_rate": 1.0}),
        ({"learning_rate": None}, {"learning_rate": None}),
        ({"targets": "q_proj"}, {"targets": "q_proj"}),
        ({"targets": ["q_proj", "v_proj"]}, {"targets": ("q_proj", "v_proj")}),
        ({"skip": "lm_head"}, {"skip": ("lm_head",)}),
        ({"skip": ["a", "b"]}, {"skip": ("a", "b")}),
        ({"layers": [1, 2.0]}, {"layers": (1, 2)}),
        ({"layers": None}, {"layers": None}),
        ({"sizes": "12"}, {"sizes": (12,)}),
        ({"extra": {"a": "1e-3"}}, {"extra": {"a": 1e-3}}),
        ({"kind": "b"}, {"kind": "b"}),
    ],
)
def test_values_are_taken_as_a_person_means_them(options, expected):
    made = config(**options)
    assert made == Config(**expected)
    for name, value in expected.items():
        assert type(getattr(made, name)) is type(value)


def test_a_rate_that_yaml_reads_as_text_is_a_number():
    assert yaml.safe_load("learning_rate: 2e-4") == {"learning_rate": "2e-4"}  # the trap
    assert config(**yaml.safe_load("learning_rate: 2e-4")).learning_rate == 2e-4


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("rank", True, "a whole number"),
        ("rank", 2.5, "a whole number"),
        ("rank", "2.5", "a whole number"),
        ("rank", None, "a whole number"),
        ("rank", [1], "a whole number"),
        ("rank", float("inf"), "a whole number"),
        ("scale", True, "a number"),
        ("scale", "much", "a number"),
        ("scale", float("nan"), "a number"),
        ("scale", "nan", "a number"),
        ("scale", float("inf"), "a number that is finite"),
        ("scale", "-inf", "a number that is finite"),
        ("scale", "1e999", "a number that is finite"),
        ("learning_rate", float("inf"), "a number that is finite or nothing"),
        ("fast", 1, "true or false"),
        ("fast", "true", "true or false"),
        ("bias", 3, "text"),
        ("skip", {"lm_head": 1}, "a list"),
        ("skip", ["a", 3], "a list"),
        ("skip", 3, "a list"),
        ("learning_rate", "fast", "a number or nothing"),
        ("learning_rate", False, "a number or nothing"),
        ("targets", 3, "text or a list"),
        ("layers", ["a"], "a list or nothing"),
    ],
)
def test_a_value_of_another_type_is_refused(option, value, expected):
    assert problems(**{option: value}) == [
        f"option '{option}' for zora: got {value!r}; expected {expected}"
    ]


# validators


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rank": 0}, "option 'rank' for zora: got 0; expected at least 1"),
        ({"learning_rate": 0}, "option 'learning_rate' for zora: got 0.0; expected more than 0"),
        ({"dropout": 1.0}, "option 'dropout' for zora: got 1.0; expected 0 to 0.99"),
        ({"dropout": -0.1}, "option 'dropout' for zora: got -0.1; expected 0 to 0.99"),
        (
            {"bias": "lora_onyl"},
            "option 'bias' for zora: got 'lora_onyl'; expected one of none, all, lora_only; "
            "did you mean 'lora_only'?",
        ),
        ({"bias": "qq"}, "option 'bias' for zora: got 'qq'; expected one of none, all, lora_only"),
    ],
)
def test_a_value_out_of_range_is_refused(options, problem):
    assert problems(**options) == [problem]


@pytest.mark.parametrize("build", [at_least(0), more_than(0), between(0, 1)])
def test_nan_passes_no_range(build):
    attribute = attrs.fields(Base).rank
    with pytest.raises(ValueError, match="got nan; expected"):
        build(None, attribute, float("nan"))
    build(None, attribute, None)


@pytest.mark.parametrize("build", [at_least(0), more_than(0)])
def test_infinity_passes_no_range(build):
    with pytest.raises(ValueError, match="got inf; expected a number that is finite"):
        build(None, attrs.fields(Base).rank, float("inf"))


def test_no_float_of_any_plugin_takes_infinity_or_nan():
    from tunesmith.plugin.registry import registry

    tried = 0
    for item in registry():
        for field in attrs.fields(attrs.resolve_types(item.spec.config)):
            if "float" not in str(field.type):
                continue
            for value in (float("inf"), float("-inf"), float("nan")):
                tried += 1
                with pytest.raises(OptionError, match=rf"option '{field.name}'.*got {value}"):
                    structure(item.spec.config, {field.name: value}, name=item.spec.name)
                # and where the class is built by hand
                if field.validator is not None:
                    with pytest.raises(ValueError, match=f"got {value}"):
                        item.spec.config(**{field.name: value})
    assert tried >= 24


def test_a_config_built_in_python_is_checked_by_the_same_validators():
    with pytest.raises(ValueError, match="got 0; expected at least 1"):
        Config(rank=0)


def test_several_values_out_of_range_are_reported_together():
    assert len(problems(rank=0, dropout=2, bias="x")) == 3


@attrs.frozen
class Together:
    low: int = 0
    high: int = attrs.field(default=1)
    names: tuple[str, ...] = attrs.field(
        default=(), converter=lambda names: tuple(name.lower() for name in names)
    )
    mode: str = attrs.field(default="a", validator=attrs.validators.in_(["a", "b"]))

    @high.validator
    def _ordered(self, attribute, value):
        if value < self.low:
            raise ValueError(f"got {value}; expected at least low, which is {self.low}")

    @names.validator
    def _lower(self, attribute, value):
        if any(name != name.lower() for name in value):
            raise ValueError("converted too late")


def test_a_validator_may_read_other_options():
    assert structure(Together, {"low": 2, "high": 3}, name="zora").high == 3
    assert problems(Together, low=5, high=3) == [
        "options for zora: got 3; expected at least low, which is 5"
    ]


def test_a_field_with_a_converter_is_validated_as_converted():
    assert structure(Together, {"names": ["A"]}, name="zora").names == ("a",)


def test_attrs_own_validators_answer_in_one_sentence():
    (problem,) = problems(Together, mode="c")
    assert problem == "option 'mode' for zora: 'mode' must be in ['a', 'b'] (got 'c')"


@attrs.frozen
class Exclusive:
    a: int | None = None
    b: int | None = None

    def __attrs_post_init__(self):
        if self.a is not None and self.b is not None:
            raise OptionError(["a and b exclude each other", "give one"])


def test_options_that_exclude_each_other_name_the_plugin():
    assert problems(Exclusive, a=1, b=2) == [
        "zora: a and b exclude each other",
        "zora: give one",
    ]


@attrs.frozen
class Unsound:
    hook: Unknown = None


def test_a_config_class_whose_types_do_not_resolve_is_the_plugins_fault_not_the_users():
    with pytest.raises(PluginError, match=r"Unsound, the options of zora, .*not under TYPE_CHECK"):
        structure(Unsound, {}, name="zora")


# help texts


def test_help_is_the_docstring_under_the_field_inherited_ones_included():
    docs = field_docs(Config)
    assert docs["rank"] == "Rank of the update."
    assert docs["learning_rate"] == "Peak rate,\nor none."
    assert docs["scale"] == "Factor."
    assert docs["dropout"] == ""
    assert list(docs) == [field.name for field in attrs.fields(Config)]


@attrs.frozen(kw_only=True)
class Overriding(Base):
    rank: int = 4
    """Another rank."""


def test_an_overriding_field_has_its_own_help():
    assert field_docs(Overriding)["rank"] == "Another rank."


def test_a_class_without_source_has_empty_help():
    made = attrs.make_class("Made", {"x": attrs.field(default=1)})
    assert field_docs(made) == {"x": ""}


# back to plain values


def test_only_what_differs_from_the_defaults_is_given_back():
    assert given_options(Config(rank=8, fast=True, skip=("a",))) == {"fast": True, "skip": ["a"]}


def test_a_required_option_is_always_given_back():
    assert given_options(Needy(path="x", count=1)) == {"path": "x", "count": 1}


@attrs.frozen
class Derived:
    low: int = 1
    high: int = attrs.Factory(lambda self: self.low * 2, takes_self=True)
    names: list[str] = attrs.field(factory=list)


def test_a_default_that_derives_from_other_options_is_a_default():
    assert given_options(Derived(low=3)) == {"low": 3}
    assert given_options(Derived(low=3, high=7)) == {"low": 3, "high": 7}


names = st.text(st.characters(codec="ascii", categories=["L"]), min_size=1)
configs = st.builds(
    Config,
    rank=st.integers(1, 10**6),
    learning_rate=st.none() | st.floats(1e-9, 1.0),
    scale=st.floats(allow_nan=False, allow_infinity=False),
    dropout=st.floats(0, 0.99),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    fast=st.booleans(),
    targets=names | st.lists(names).map(tuple),
    skip=st.lists(names).map(tuple),
    layers=st.none() | st.lists(st.integers()).map(tuple),
    sizes=st.lists(st.integers()).map(tuple),
    extra=st.dictionaries(names, st.floats(allow_nan=False, allow_infinity=False)),
    kind=st.sampled_from(["a", "b"]),
)


@given(configs)
def test_a_config_goes_to_options_and_comes_back_equal(made):
    assert structure(Config, given_options(made), name="zora") == made
