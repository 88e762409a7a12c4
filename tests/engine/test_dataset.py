"""Rows become examples one by one; a format that fails says so, with the row and its name."""

from __future__ import annotations

import json
import sys
import types

import pytest

from tunesmith.data.examples import Conversation, Labeled, Message
from tunesmith.engine.dataset import SAMPLE, load_data
from tunesmith.errors import DataError, PluginError, RowError
from tunesmith.plugin import Spec, hookimpl
from tunesmith.plugin.formats import Format
from tunesmith.plugin.options import NoOptions
from tunesmith.plugin.registry import Registry, registry

ROWS = [{"q": "a", "a": "b"}] * 3
ALPACA = [{"instruction": "a", "output": "b"}] * 3


def example() -> Conversation:
    return Conversation([Message("user", "a"), Message("assistant", "b")])


class Asked(Format[NoOptions]):
    """A format of the tests' own."""

    def recognise(self, row):
        return 2 if {"q", "a"} <= row.keys() else 0

    def convert(self, row):
        return example()


def refused(rows, registry, pattern, name=None):
    with pytest.raises((DataError, PluginError), match=pattern):
        load_data(rows, name, registry)


@pytest.fixture
def known(monkeypatch):
    """Return a registry of the built-in formats and of one by a stranger, made of a class."""

    def build(kind: type, **more) -> Registry:
        module = types.ModuleType("a_stranger")
        module.Kind = kind
        monkeypatch.setitem(sys.modules, "a_stranger", module)
        plugin = types.ModuleType("a_plugin")
        specs = [Spec("asked", NoOptions, more.pop("impl", "a_stranger:Kind"), **more)]
        plugin.tunesmith_formats = hookimpl(lambda: specs)
        import tunesmith_plugins

        return Registry(
            [
                ("tunesmith", "tunesmith", "1", lambda: tunesmith_plugins),
                ("stranger", "stranger", "1.2", lambda: plugin),
            ]
        )

    return build


def test_a_format_of_a_strangers_is_detected(known):
    data = load_data(ROWS, None, known(Asked))
    assert (data.format, data.shape, len(data.examples)) == ("asked", "conversation", 3)


@pytest.mark.parametrize("error", [TypeError, KeyError, RecursionError, IndexError, AttributeError])
def test_a_format_that_fails_on_a_row_is_told_with_row_and_name(known, error):
    class Failing(Asked):
        def convert(self, row):
            if row["q"] == "bad":
                raise error("inside")
            return example()

    rows = [*ROWS, {"q": "bad", "a": "b"}]
    pattern = f"row 4: the format 'stranger:asked' failed with {error.__name__}"
    refused(rows, known(Failing), pattern)


def test_a_format_that_fails_at_recognising_is_told_and_not_passed_over(known):
    class Failing(Asked):
        def recognise(self, row):
            return row["no such"]

    refused(ALPACA, known(Failing), "row 1: the format 'stranger:asked' failed with KeyError")
    assert load_data(ALPACA, "alpaca", known(Failing)).format == "alpaca"


def test_a_format_that_cannot_be_built_is_told_and_not_passed_over(known):
    class Failing(Asked):
        def __init__(self, config):
            raise ZeroDivisionError("inside")

    with pytest.warns(UserWarning, match="taken as alpaca; the format 'stranger:asked' could not"):
        load_data(ALPACA, None, known(Failing))
    refused(ROWS, known(Failing), "'stranger:asked' cannot be used: it failed with Zero", "asked")


def test_a_format_that_cannot_be_imported_is_told_with_the_rows_nobody_knows(known):
    broken = known(Asked, impl="no_such_module:Kind")
    refused(ROWS, broken, "no format knows .*'stranger:asked' could not be tried: .*no_such")
    with pytest.warns(UserWarning, match='give format="tunesmith:alpaca" to say that this is mea'):
        assert load_data(ALPACA, None, broken).format == "alpaca"


def test_what_is_no_example_is_told(known):
    class Failing(Asked):
        def convert(self, row):
            return None

    refused(ROWS, known(Failing), "row 1: the format 'stranger:asked' made a NoneType of it")


def test_rows_of_two_shapes_are_told_with_the_first_that_differs(known):
    class Mixed(Asked):
        def convert(self, row):
            turns = example().messages
            return Labeled(turns[:1], turns[1:], True) if row["q"] == "x" else example()

    rows = [*ROWS, {"q": "x", "a": "b"}]
    refused(rows, known(Mixed), "row 4: .* made a Labeled of it, and of row 1 a Conversation")


@pytest.mark.parametrize("rows", [[{"q": "a"}], [{"messages": []}], [{"instruction": 3}]])
def test_the_first_row_beyond_those_looked_at_is_told_where_it_differs(tmp_path, rows):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [ALPACA[0]] * SAMPLE + rows))
    refused(str(path), registry(), rf"t\.jsonl, line {SAMPLE + 1}: field '\w+': got")


def test_bad_rows_are_counted_and_a_few_of_them_shown():
    rows = [*ALPACA, *[{"instruction": "a", "output": None}] * 200]
    with pytest.raises(DataError) as caught:
        load_data(rows, None, registry())
    lines = str(caught.value).splitlines()
    assert len(lines) == 7
    assert lines[-1].strip().startswith("... and 195 more rows of 203 like these; mend them, or")


def test_rows_that_can_be_read_only_once_are_refused_unread():
    refused(iter(ALPACA), registry(), r"read only once; pass list\(...\) of it")


def test_a_row_of_any_length_makes_a_short_message():
    error = RowError("x" * 5000, "y" * 5000, "text")
    assert len(str(error)) < 700
    assert "(5,000 characters)" in error.got
