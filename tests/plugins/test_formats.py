"""Each built-in format reads its layouts, and names the field of a row that it cannot read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.data.examples import Conversation, Message, Preference
from tunesmith.data.sources import read_rows
from tunesmith.errors import RowError
from tunesmith.plugin.options import NoOptions
from tunesmith_plugins.formats.alpaca import Alpaca
from tunesmith_plugins.formats.messages import Messages
from tunesmith_plugins.formats.preference import PreferencePairs
from tunesmith_plugins.formats.sharegpt import ShareGPT

ALPACA, MESSAGES, SHAREGPT, PREFERENCE = FORMATS = [
    kind(NoOptions()) for kind in (Alpaca, Messages, ShareGPT, PreferencePairs)
]
DATA = Path(__file__).parents[3] / "shared" / "data"


def user(text):
    return Message("user", text)


def assistant(text, **extra):
    return Message("assistant", text, extra)


def system(text):
    return Message("system", text)


def turn(who, text):
    return {"from": who, "value": text}


def said(role, text):
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    ("name", "reader", "count"),
    [
        ("alpaca_en_demo.json", ALPACA, 999),
        ("alpaca_zh_demo.json", ALPACA, 1000),
        ("dpo_en_demo.json", PREFERENCE, 300),
        ("glaive_toolcall_en_demo.json", SHAREGPT, 300),
    ],
)
def test_every_row_of_the_public_samples_is_recognised_and_converted(name, reader, count):
    if not (DATA / name).exists():
        pytest.skip(f"{name} does not lie beside the checkout, in ../shared/data")
    rows = read_rows(DATA / name)
    assert len(rows) == count
    for row in rows:
        scores = {type(one): one.recognise(row.values) for one in FORMATS}
        assert max(scores, key=scores.get) is type(reader)
        example = reader.convert(row.values)
        kind = Preference if reader is PREFERENCE else Conversation
        assert isinstance(example, kind)
        turns = len(row.values.get("conversations", "ab"))
        assert len(example.prompt if kind is Preference else example.messages) == turns


def test_every_function_call_of_glaive_becomes_a_tool_call():
    if not (DATA / "glaive_toolcall_en_demo.json").exists():
        pytest.skip("glaive_toolcall_en_demo.json does not lie in ../shared/data")
    rows = read_rows(DATA / "glaive_toolcall_en_demo.json")
    turns = [turn for row in rows for turn in row.values["conversations"]]
    wanted = [turn for turn in turns if turn["from"] == "function_call"]
    found = [
        message.extra["tool_calls"][0]["function"]
        for row in rows
        for message in SHAREGPT.convert(row.values).messages
        if message.extra
    ]
    assert found == [json.loads(turn["value"]) for turn in wanted]
    assert len(found) == 211


@pytest.mark.parametrize(
    ("row", "scores"),
    [
        ({"instruction": "", "output": ""}, [2, 0, 0, 0]),
        ({"instruction": "", "input": "", "output": "", "system": "", "id": 1}, [4, 0, 0, 0]),
        ({"messages": [], "tools": []}, [0, 2, 0, 0]),
        ({"conversations": [], "system": "", "tools": ""}, [0, 0, 3, 0]),
        ({"conversations": [], "chosen": {}, "rejected": {}}, [0, 0, 1, 3]),
        ({"prompt": "", "chosen": "", "rejected": "", "score": 1}, [0, 0, 0, 3]),
        ({"prompt": "", "chosen": ""}, [0, 0, 0, 0]),
        ({"instruction": ""}, [0, 0, 0, 0]),
        ({}, [0, 0, 0, 0]),
    ],
)
def test_a_format_accounts_for_the_fields_it_reads(row, scores):
    assert [one.recognise(row) for one in FORMATS] == scores


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "do", "output": "done"}, [user("do"), assistant("done")]),
        ({"instruction": "do", "input": "", "output": "done"}, [user("do"), assistant("done")]),
        ({"instruction": "do", "input": "it", "output": ""}, [user("do\n\nit"), assistant("")]),
        ({"instruction": "", "input": "it", "output": "x"}, [user("it"), assistant("x")]),
        (
            {"instruction": "do", "input": None, "output": "x", "system": None, "history": None},
            [user("do"), assistant("x")],
        ),
        (
            {"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]},
            [system("s"), user("a"), assistant("b"), user("c"), assistant("d")],
        ),
    ],
)
def test_alpaca_rows(row, messages):
    assert ALPACA.convert(row) == Conversation(messages)


def test_messages_rows_pass_on_what_the_template_may_read():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    row = {
        "messages": [
            said("system", "s"),
            said("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
            {"role": "assistant", "content": None, "tool_calls": [call], "name": None},
            {"role": "tool", "content": "r", "tool_call_id": "1"},
            said("assistant", "c"),
        ],
        "tools": '[{"name": "f", "parameters": {}}]',
    }
    assert MESSAGES.convert(row) == Conversation(
        [
            system("s"),
            user("ab"),
            assistant("", tool_calls=[call]),
            Message("tool", "r", {"tool_call_id": "1"}),
            assistant("c"),
        ],
        [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    )


@pytest.mark.parametrize("tools", [None, "", " ", "[]", []])
def test_no_tools_may_be_written_in_many_ways(tools):
    row = {"messages": [said("user", "a"), said("assistant", "b")], "tools": tools}
    assert MESSAGES.convert(row).tools == ()


def test_sharegpt_rows():
    calls = '[{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": "{\\"y\\": 2}"}]'
    row = {
        "system": "s",
        "conversations": [
            turn("human", "a"),
            turn("function_call", calls),
            turn("observation", "r"),
            turn("gpt", "b"),
        ],
        "tools": json.dumps([{"type": "function", "function": {"name": "f"}}]),
    }
    assert SHAREGPT.convert(row) == Conversation(
        [
            system("s"),
            user("a"),
            assistant(
                "",
                tool_calls=[
                    {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
                    {"type": "function", "function": {"name": "g", "arguments": {"y": 2}}},
                ],
            ),
            Message("tool", "r"),
            assistant("b"),
        ],
        [{"type": "function", "function": {"name": "f"}}],
    )


@pytest.mark.parametrize("value", ["not json", '{"arguments": {}}', "3", '{"name": 3}'])
def test_a_function_call_that_spells_no_call_stays_text(value):
    row = {"conversations": [turn("user", "a"), turn("function_call", value)]}
    assert SHAREGPT.convert(row).messages[1] == assistant(value)


def test_sharegpt_turns_need_not_alternate_nor_begin_with_the_human():
    row = {
        "conversations": [
            turn("gpt", "a"),
            turn("human", "b"),
            turn("human", "c"),
            turn("gpt", "d"),
            turn("assistant", "e"),
        ]
    }
    roles = [message.role for message in SHAREGPT.convert(row).messages]
    assert roles == ["assistant", "user", "user", "assistant", "assistant"]


GOOD, BAD = [assistant("good")], [assistant("bad")]


@pytest.mark.parametrize(
    ("row", "preference"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, Preference([user("q")], GOOD, BAD)),
        (
            {
                "prompt": [said("system", "s"), said("user", "q")],
                "chosen": [said("assistant", "good")],
                "rejected": "bad",
            },
            Preference([system("s"), user("q")], GOOD, BAD),
        ),
        (
            {
                "system": "s",
                "conversations": [turn("human", "q")],
                "chosen": turn("gpt", "good"),
                "rejected": [turn("gpt", "bad")],
            },
            Preference([system("s"), user("q")], GOOD, BAD),
        ),
        (
            {
                "chosen": [said("user", "q"), said("assistant", "good")],
                "rejected": [said("user", "q"), said("assistant", "bad")],
            },
            Preference([user("q")], GOOD, BAD),
        ),
        (
            {
                "prompt": "q",
                "chosen": [said("user", "q"), said("assistant", "good")],
                "rejected": [said("user", "q"), said("assistant", "bad")],
            },
            Preference([user("q")], GOOD, BAD),
        ),
        (
            {
                "chosen": [said("user", "q"), said("assistant", "good")],
                "rejected": [said("user", "q"), said("assistant", "good")],
            },
            Preference([user("q")], GOOD, GOOD),
        ),
        (
            {
                "chosen": [said("user", "q"), said("assistant", "good")],
                "rejected": [
                    said("user", "q"),
                    said("assistant", "good"),
                    said("user", "sure?"),
                    said("assistant", "bad"),
                ],
            },
            Preference([user("q")], GOOD, [*GOOD, user("sure?"), *BAD]),
        ),
        (
            {"prompt": "q", "chosen": "good", "rejected": "bad", "tools": '[{"name": "f"}]'},
            Preference([user("q")], GOOD, BAD, [{"type": "function", "function": {"name": "f"}}]),
        ),
    ],
)
def test_preference_rows(row, preference):
    assert PREFERENCE.convert(row) == preference


TALK = [said("user", "a"), said("assistant", "b")]


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (ALPACA, {"output": "x"}, "field 'instruction': got nothing; expected text"),
        (
            ALPACA,
            {"instruction": None, "output": "x"},
            "field 'instruction': got null; expected text",
        ),
        (
            ALPACA,
            {"instruction": "x", "output": 3},
            "field 'output': got a number (3); expected text",
        ),
        (
            ALPACA,
            {"instruction": "x", "output": ["y"]},
            "field 'output': got a list of 1; expected",
        ),
        (ALPACA, {"instruction": "x", "output": True}, "field 'output': got true; expected text"),
        (
            ALPACA,
            {"instruction": " ", "output": "x"},
            "field 'instruction': got blank text; expected",
        ),
        (
            ALPACA,
            {"instruction": "x", "output": "y", "input": 2},
            "field 'input': got a number (2)",
        ),
        (
            ALPACA,
            {"instruction": "x", "output": "y", "history": "z"},
            "field 'history': got the text 'z'; expected a list of pairs [user, assistant]",
        ),
        (
            ALPACA,
            {"instruction": "x", "output": "y", "history": [["a", "b"], ["c"]]},
            "field 'history[1]': got a list of 1; expected a pair",
        ),
        (
            ALPACA,
            {"instruction": "x", "output": "y", "history": [["a", None]]},
            "field 'history[0]': got null; expected a pair of texts",
        ),
        (
            MESSAGES,
            {"messages": []},
            "field 'messages': got an empty list; expected a list of turns",
        ),
        (
            MESSAGES,
            {"messages": "hi"},
            "field 'messages': got the text 'hi'; expected a list of turns",
        ),
        (
            MESSAGES,
            {"messages": ["hi"]},
            "field 'messages[0]': got the text 'hi'; expected an object",
        ),
        (
            MESSAGES,
            {"messages": [said("assistent", "x")]},
            "field 'messages[0].role': got the role 'assistent'; expected one of system, user, "
            "assistant, tool; did you mean 'assistant'",
        ),
        (
            MESSAGES,
            {"messages": [{"content": "x"}]},
            "field 'messages[0].role': got nothing; expected",
        ),
        (MESSAGES, {"messages": [{"role": "user"}]}, "field 'messages[0].content': got nothing"),
        (
            MESSAGES,
            {"messages": [said("assistant", None)]},
            "field 'messages[0].content': got null",
        ),
        (
            MESSAGES,
            {"messages": [said("user", [{"type": "image"}])]},
            "field 'messages[0].content': got a list with parts that are not text",
        ),
        (
            MESSAGES,
            {"messages": [said("user", "x")]},
            "field 'messages': got turns of user only; expected at least one turn of the assistant",
        ),
        (MESSAGES, {"messages": TALK, "tools": "[{"}, "field 'tools': got text that is not JSON"),
        (
            MESSAGES,
            {"messages": TALK, "tools": 3},
            "field 'tools': got a number (3); expected a list",
        ),
        (MESSAGES, {"messages": TALK, "tools": [{}]}, "field 'tools[0]': got an empty object"),
        (
            SHAREGPT,
            {"conversations": [turn("humam", "x")]},
            "field 'conversations[0].from': got the role 'humam'; expected one of human, user, gpt",
        ),
        (
            SHAREGPT,
            {"conversations": [turn("human", None)]},
            "field 'conversations[0].value': got nul",
        ),
        (
            SHAREGPT,
            {"conversations": [turn("human", "x")]},
            "field 'conversations': got turns of user",
        ),
        (SHAREGPT, {"conversations": None}, "field 'conversations': got null; expected a list of"),
        (
            SHAREGPT,
            {"conversations": [turn("gpt", "x")], "system": 1},
            "field 'system': got a number",
        ),
        (PREFERENCE, {"prompt": None, "chosen": "a", "rejected": "b"}, "field 'prompt': got null"),
        (
            PREFERENCE,
            {"prompt": 3, "chosen": "a", "rejected": "b"},
            "field 'prompt': got a number (3)",
        ),
        (
            PREFERENCE,
            {"prompt": " ", "chosen": "a", "rejected": "b"},
            "field 'prompt': got blank text",
        ),
        (PREFERENCE, {"prompt": "q", "chosen": None, "rejected": "b"}, "field 'chosen': got null"),
        (PREFERENCE, {"prompt": "q", "chosen": "a"}, "field 'rejected': got nothing; expected"),
        (
            PREFERENCE,
            {"prompt": "q", "chosen": [], "rejected": "b"},
            "field 'chosen': got an empty li",
        ),
        (
            PREFERENCE,
            {"prompt": "q", "chosen": {}, "rejected": "b"},
            "field 'chosen': got an empty ob",
        ),
        (
            PREFERENCE,
            {"prompt": "q", "chosen": [said("user", "x")], "rejected": "b"},
            "field 'chosen': got turns of user only; expected at least one turn of the assistant",
        ),
        (
            PREFERENCE,
            {"chosen": "a", "rejected": "b"},
            "field 'prompt': got nothing, and chosen and",
        ),
        (
            PREFERENCE,
            {"chosen": TALK, "rejected": [said("user", "other"), said("assistant", "b")]},
            "field 'prompt': got nothing, and chosen and rejected do not begin with the same turns",
        ),
        (
            PREFERENCE,
            {"prompt": "q", "conversations": [turn("human", "q")], "chosen": "a", "rejected": "b"},
            "field 'prompt': got a prompt beside 'conversations'",
        ),
    ],
)
def test_a_row_that_cannot_be_read_names_the_field_and_what_stood_there(reader, row, message):
    with pytest.raises(RowError) as caught:
        reader.convert(row)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"name": "f", "name": "g"}]', "the key 'name' stands twice"),
        ('[{"name": "f", "parameters": {"x": NaN}}]', "NaN is no JSON"),
        ('[{"name": "f", "parameters": ' + "9" * 5000 + "}]", "a whole number of 5000 digits"),
        ('[{"name": "\\ud800"}]', "half of a character"),
        ("[" * 100_000, "nested more than 100 deep"),
        ('[{"name": "f",\n]', r"at column \d"),
    ],
    ids=range(6),
)
def test_tools_given_as_json_text_are_read_as_strictly_as_a_file(text, problem):
    row = {"messages": [{"role": "assistant", "content": "b"}], "tools": text}
    with pytest.raises(RowError, match=f"field 'tools': got .*{problem}"):
        MESSAGES.convert(row)
