"""What is dropped is dropped for a reason that is told, and a split is the same every time."""

from __future__ import annotations

import json

import pytest

from tunesmith.data.clean import DropLog, deduplicate, drop_empty, split
from tunesmith.data.examples import (
    Conversation,
    Labeled,
    Message,
    Preference,
    Prompt,
    Sourced,
    Text,
)
from tunesmith.errors import DataError


def user(text):
    return Message("user", text)


def assistant(text, **extra):
    return Message("assistant", text, extra)


def talk(question, answer, **extra):
    return Conversation([user(question), assistant(answer, **extra)])


def sourced(*examples):
    return [Sourced(example, f"row {number}") for number, example in enumerate(examples, 1)]


def test_a_later_row_that_says_the_same_is_dropped_and_the_log_tells_which_it_repeats():
    log = DropLog()
    rows = sourced(talk("a b", "c"), talk("x", "y"), talk("a b\n", "c "))
    assert deduplicate(rows, log.add) == rows[:2]
    assert [(e.where, e.reason, e.detail) for e in log.entries] == [
        ("row 3", "duplicate", "of row 1")
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("if x:\n    y()\nz()", "if x:\n    y()\n    z()"),
        ("a b", "a  b"),
        ("a\tb", "a    b"),
        ("b", " b"),
    ],
)
def test_white_space_that_may_be_code_makes_a_difference(one, other):
    log = DropLog()
    asked = sourced(talk(one, "c"), talk(other, "c"), talk("q", one), talk("q", other))
    assert len(deduplicate(asked, log.add)) == 4
    pair = sourced(Preference([user("q")], [assistant(one)], [assistant(other)]))
    assert drop_empty(pair, log.add) == pair
    assert len(log) == 0


def test_any_callable_of_two_may_be_told_of_duplicates():
    told = []
    deduplicate(sourced(Text("a"), Text("a")), lambda where, reason: told.append((where, reason)))
    assert told == [("row 2", "duplicate")]


@pytest.mark.parametrize(
    "other",
    [
        talk("a", "b", tool_calls=[{"function": {"name": "f"}}]),
        Conversation([user("a"), assistant("b")], [{"name": "f"}]),
        Conversation([user("a b"), assistant("")]),
        Conversation([user("a"), user("b")]),
        Preference([user("a")], [assistant("b")], [assistant("c")]),
        Text("a b"),
    ],
)
def test_rows_that_differ_in_role_tools_or_shape_are_no_duplicates(other):
    log = DropLog()
    assert len(deduplicate(sourced(talk("a", "b"), other), log.add)) == 2
    assert len(log) == 0


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (talk("a", "  \n"), "no assistant turn says anything"),
        (Conversation([user("a")]), "no assistant turn says anything"),
        (Preference([user("a")], [assistant(" ")], [assistant("b")]), "chosen is blank"),
        (Preference([user("a")], [assistant("b")], [assistant("")]), "rejected is blank"),
        (
            Preference([user("a")], [assistant("b c")], [assistant("b c\n")]),
            "chosen and rejected are equal",
        ),
        (Labeled([user("a")], [assistant("")], True), "the completion is blank"),
        (
            Conversation([user("a"), Message("assistant", "b", trained=False)]),
            "no turn is to be learned (weight 0)",
        ),
        (Prompt([user(" ")]), "the prompt is blank"),
        (Text("\n"), "the text is blank"),
    ],
)
def test_a_row_with_nothing_to_learn_is_dropped_with_the_reason(example, reason):
    log = DropLog()
    assert drop_empty(sourced(example), log.add) == []
    assert log.reasons == {reason: 1}


@pytest.mark.parametrize(
    "example",
    [
        talk("a", "b"),
        talk("a", "", tool_calls=[{"function": {"name": "f"}}]),
        Preference([user("a")], [assistant("b")], [assistant("c")]),
        Labeled([user("a")], [assistant("b")], False),
        Prompt([user("a")]),
        Text("a"),
    ],
)
def test_a_row_with_something_to_learn_is_kept(example):
    assert len(drop_empty(sourced(example), DropLog().add)) == 1


def test_the_log_counts_its_reasons_and_writes_a_line_a_row(tmp_path):
    log = DropLog()
    log.add("row 1", "too long")
    log.add("row 2", "duplicate", "of row 9")
    log.add("row 3", "duplicate")
    assert log.reasons == {"duplicate": 2, "too long": 1}
    assert list(log.reasons) == ["duplicate", "too long"]
    log.write(tmp_path / "dropped.jsonl")
    lines = (tmp_path / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [
        {"where": "row 1", "reason": "too long"},
        {"where": "row 2", "reason": "duplicate", "detail": "of row 9"},
        {"where": "row 3", "reason": "duplicate"},
    ]


ROWS = sourced(*[talk(f"q{n}", f"a{n}") for n in range(40)])


@pytest.mark.parametrize(("eval_split", "held_out"), [(0.25, 10), (3, 3), (1, 1), (0, 0)])
def test_a_share_or_a_number_of_rows_is_held_out_and_none_is_lost(eval_split, held_out):
    train, evaluation = split(ROWS, eval_split, seed=0)
    assert len(evaluation) == held_out
    assert sorted([*train, *evaluation], key=ROWS.index) == ROWS
    assert train == sorted(train, key=ROWS.index)


def test_a_split_depends_on_the_seed_and_the_content_and_not_on_the_order():
    _, first = split(ROWS, 5, seed=0)
    _, again = split(ROWS[::-1], 5, seed=0)
    _, other = split(ROWS, 5, seed=1)
    assert sorted(first, key=ROWS.index) == sorted(again, key=ROWS.index)
    assert first != other


@pytest.mark.parametrize(
    ("rows", "eval_split", "message"),
    [
        (ROWS, 0.001, "leaves nothing to evaluate on"),
        (ROWS, 40, "leaves nothing to train on"),
        (ROWS[:1], 0.5, "of 1 row, which leaves nothing to"),
        (ROWS, 1.5, "expected a share below 1 or a whole number"),
        (ROWS, -1, "expected a share below 1 or a whole number"),
    ],
)
def test_a_split_that_leaves_nothing_is_an_error(rows, eval_split, message):
    with pytest.raises(DataError, match=message):
        split(rows, eval_split, seed=0)
