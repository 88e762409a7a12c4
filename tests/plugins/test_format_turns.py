"""Calls, results, weights, repeated prompts and nulls: one turn is one turn, and is shown once."""

from __future__ import annotations

import json

import pytest

from tunesmith.data.examples import Conversation, Message, Preference
from tunesmith.errors import RowError
from tunesmith.plugin.options import NoOptions
from tunesmith_plugins.formats.alpaca import Alpaca
from tunesmith_plugins.formats.messages import Messages
from tunesmith_plugins.formats.preference import PreferencePairs
from tunesmith_plugins.formats.sharegpt import ShareGPT

ALPACA, MESSAGES, SHAREGPT, PREFERENCE = (
    kind(NoOptions()) for kind in (Alpaca, Messages, ShareGPT, PreferencePairs)
)


def user(text):
    return Message("user", text)


def assistant(text, **extra):
    return Message("assistant", text, extra)


def system(text):
    return Message("system", text)


def turn(who, value, **more):
    return {"from": who, "value": value, **more}


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def call(arguments, name="look", **more):
    return {**more, "type": "function", "function": {"name": name, "arguments": arguments}}


ASKED = said("user", "weather?")
ANSWERED = said("assistant", "fine")


def messages(*turns, **fields):
    return MESSAGES.convert({"messages": list(turns), **fields}).messages


def calls_of(*turns, **fields):
    return [c for m in messages(*turns, **fields) for c in m.extra.get("tool_calls", ())]


# --- calls ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"at": "Rome"},
        '{"at": "Rome"}',
        json.dumps('{"at": "Rome"}'),
        json.dumps(json.dumps('{"at": "Rome"}')),
    ],
)
def test_arguments_are_an_object_however_often_they_were_encoded(arguments):
    wanted = [call({"at": "Rome"})]
    assert calls_of(ASKED, said("assistant", None, tool_calls=[call(arguments)])) == wanted
    spelled = json.dumps({"name": "look", "arguments": arguments})
    row = {"conversations": [turn("human", "w?"), turn("function_call", spelled)]}
    assert SHAREGPT.convert(row).messages[1].extra["tool_calls"] == wanted


@pytest.mark.parametrize(
    "given",
    [
        [call('{"at": "Rome"}')],
        [{"function": {"name": "look", "arguments": {"at": "Rome"}}}],
        [{"name": "look", "arguments": '{"at": "Rome"}'}],
        [{"name": "look", "parameters": {"at": "Rome"}}],
        json.dumps([call('{"at": "Rome"}')]),
        call({"at": "Rome"}),
        [json.dumps(call({"at": "Rome"}))],
        [call({"at": "Rome"}, id=None, index=None)],
    ],
)
def test_calls_are_read_in_every_layout_they_come_in(given):
    assert calls_of(ASKED, said("assistant", None, tool_calls=given)) == [call({"at": "Rome"})]


@pytest.mark.parametrize("nothing", [None, "", " ", {}, "{}"])
def test_a_call_without_arguments_has_none(nothing):
    assert calls_of(ASKED, said("assistant", "", tool_calls=[call(nothing)])) == [call({})]


def test_the_function_call_that_chat_apis_had_before_is_a_call():
    old = said("assistant", None, function_call={"name": "look", "arguments": '{"at": "Rome"}'})
    found = messages(ASKED, old, said("function", "sun", name="look"), ANSWERED)
    assert found[1] == assistant("", tool_calls=[call({"at": "Rome"})])
    assert found[2] == Message("tool", "sun", {"name": "look"})


@pytest.mark.parametrize("nothing", [None, []])
def test_a_turn_with_no_calls_has_no_calls(nothing):
    assert messages(ASKED, said("assistant", "fine", tool_calls=nothing)) == (
        user("weather?"),
        assistant("fine"),
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([call("Rome")], "field 'messages[1].tool_calls[0].function.arguments': got text that is "),
        ([call(3)], "field 'messages[1].tool_calls[0].function.arguments': got a number (3)"),
        ([call("1" * 5000)], "field 'messages[1].tool_calls[0].function.arguments': got JSON bey"),
        ([{"function": {}}], "field 'messages[1].tool_calls[0].function.name': got null; expected"),
        ("look(", "field 'messages[1].tool_calls': got text that is not JSON"),
        (3, "field 'messages[1].tool_calls': got a number (3); expected a list of calls"),
    ],
)
def test_a_call_that_cannot_be_read_names_its_place(given, message):
    with pytest.raises(RowError) as caught:
        messages(ASKED, said("assistant", None, tool_calls=given))
    assert str(caught.value).startswith(message)


def test_text_and_the_call_that_follows_are_one_turn():
    one = assistant("Let me look.", tool_calls=[call({"at": 1})])
    spelled = '{"name": "look", "arguments": {"at": 1}}'
    row = {"conversations": [turn("human", "w?"), turn("gpt", "Let me look.")]}
    row["conversations"] += [turn("function_call", spelled), turn("observation", "sun")]
    row["conversations"] += [turn("gpt", "Sunny")]
    found = SHAREGPT.convert(row).messages
    assert found == (user("w?"), one, Message("tool", "sun"), assistant("Sunny"))
    assert messages(
        ASKED,
        said("assistant", "Let me look."),
        said("assistant", None, tool_calls=[call({"at": 1})]),
    ) == (user("weather?"), one)


def test_calls_right_after_one_another_are_one_turn():
    spelled = '{"name": "look", "arguments": {"at": %d}}'
    row = {"conversations": [turn("human", "w?")]}
    row["conversations"] += [turn("function_call", spelled % number) for number in (1, 2)]
    assert SHAREGPT.convert(row).messages[1:] == (
        assistant("", tool_calls=[call({"at": 1}), call({"at": 2})]),
    )


def test_turns_that_a_result_parts_or_that_both_say_something_stay_two():
    spelled = '{"name": "look", "arguments": {}}'
    row = {"conversations": [turn("human", "w?"), turn("function_call", spelled)]}
    row["conversations"] += [turn("observation", "a"), turn("function_call", spelled)]
    row["conversations"] += [turn("gpt", "b"), turn("gpt", "c")]
    roles = [message.role for message in SHAREGPT.convert(row).messages]
    assert roles == ["user", "assistant", "tool", "assistant", "assistant", "assistant"]


def test_a_call_that_names_its_arguments_parameters_keeps_them():
    row = {"conversations": [turn("human", "w?")]}
    row["conversations"] += [turn("function_call", '{"name": "f", "parameters": {"x": 1}}')]
    [made] = SHAREGPT.convert(row).messages[1].extra["tool_calls"]
    assert made["function"]["arguments"] == {"x": 1}


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({"sky": "clear", "t": 20}, '{"sky": "clear", "t": 20}'),
        ([1, 2], "[1, 2]"),
        (20.5, "20.5"),
        (True, "true"),
        ({"city": "Zürich"}, '{"city": "Zürich"}'),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ("plain", "plain"),
    ],
)
def test_what_a_tool_returns_may_be_any_value(result, text):
    talk = (ASKED, said("assistant", None, tool_calls=[call({})]), said("tool", result), ANSWERED)
    assert messages(*talk)[2].content == text
    row = {"conversations": [turn("human", "w?"), turn("observation", result), turn("gpt", "x")]}
    assert SHAREGPT.convert(row).messages[1].content == text


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"type": "output_text", "text": "a", "image_url": None}], "a"),
        (["a", "b"], "ab"),
    ],
)
def test_content_may_come_in_parts(parts, text):
    assert messages(ASKED, said("assistant", parts))[1].content == text


@pytest.mark.parametrize("part", [{"type": "image", "text": "caption"}, {"type": "image_url"}, 3])
def test_a_part_that_is_no_text_is_refused(part):
    with pytest.raises(RowError, match="a list with parts that are not text"):
        messages(ASKED, said("assistant", [{"type": "text", "text": "a"}, part]))


# --- nulls ----------------------------------------------------------------------------------------

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "string", "default": None}, "zip": None},
            "required": None,
        },
        "strict": None,
    },
}


def test_nulls_that_a_table_has_filled_in_are_taken_out_of_tools():
    [tool] = MESSAGES.convert({"messages": [ASKED, ANSWERED], "tools": [TOOL]}).tools
    assert tool["function"] == {
        "name": "look",
        "parameters": {"type": "object", "properties": {"at": {"type": "string", "default": None}}},
    }


def test_an_argument_that_is_null_and_that_the_tool_does_not_have_was_filled_in():
    turns = (ASKED, said("assistant", None, tool_calls=[call({"at": None, "zip": None})]))
    [made] = calls_of(*turns, tools=[TOOL])
    assert made["function"]["arguments"] == {"at": None}
    [as_written] = calls_of(*turns)
    assert as_written["function"]["arguments"] == {"at": None, "zip": None}


def test_keys_of_a_turn_that_are_null_are_no_keys():
    nulls = dict.fromkeys(["tool_calls", "name", "weight", "train", "reasoning_content"])
    assert messages({**ASKED, **nulls}, {**ANSWERED, **nulls}) == (
        user("weather?"),
        assistant("fine"),
    )
    filled = {"from": None, "value": None, **ASKED}
    assert messages(filled, ANSWERED)[0].content == "weather?"


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "trained"),
    [
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"weight": 1}, True),
        ({"weight": 1.0}, True),
        ({"weight": None}, True),
        ({"train": False}, False),
        ({"train": True}, True),
        ({"training": False}, False),
        ({"loss": False}, False),
        ({"weight": 1, "train": False}, False),
    ],
)
def test_a_turn_says_whether_it_is_learned(given, trained):
    for found in (
        messages(ASKED, {**ANSWERED, **given})[1],
        SHAREGPT.convert(
            {"conversations": [turn("human", "weather?"), turn("gpt", "fine", **given)]}
        ).messages[1],
    ):
        assert found == Message("assistant", "fine", trained=trained)


@pytest.mark.parametrize("given", [{"weight": 0}, {"weight": 1}, {"train": False}])
def test_a_weight_on_another_turn_changes_nothing(given):
    assert messages({**ASKED, **given}, ANSWERED)[0] == user("weather?")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (
            (ASKED, {**ANSWERED, "weight": 0.5}),
            "field 'messages[1].weight': got a number (0.5); expected 0 for a turn that is shown",
        ),
        (
            (ASKED, {**ANSWERED, "weight": "0"}),
            "field 'messages[1].weight': got the text '0'; expected 0 for",
        ),
        (
            (ASKED, {**ANSWERED, "train": "no"}),
            "field 'messages[1].train': got the text 'no'; expected false for a turn",
        ),
        (
            ({**ASKED, "train": True}, ANSWERED),
            "field 'messages[0].train': got true; expected false: only turns of the assistant",
        ),
        (
            (ASKED, {**ANSWERED, "train_detail": [{"begin_offset": 0}]}),
            "field 'messages[1].train_detail': got a list of 1; expected no such key",
        ),
    ],
)
def test_a_weight_that_nothing_reads_is_refused(turns, message):
    with pytest.raises(RowError) as caught:
        messages(*turns)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("label", [True, False, "true", "False"])
def test_rows_that_mark_wanted_and_unwanted_answers_are_refused(label):
    for reader, row in (
        (MESSAGES, {"messages": [ASKED, ANSWERED]}),
        (SHAREGPT, {"conversations": [turn("human", "a"), turn("gpt", "b")]}),
        (ALPACA, {"instruction": "a", "output": "b"}),
    ):
        with pytest.raises(RowError, match=r"field 'label': .*wanted and unwanted"):
            reader.convert({**row, "label": label})
        assert reader.convert({**row, "label": "sport"})
        assert reader.convert({**row, "label": 3})


# --- what is given twice --------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["Be brief.", "Be brief.\n", " Be  brief."])
def test_a_system_turn_beside_a_system_field_is_shown_once(column):
    talk = (system("Be brief."), user("a"), assistant("b"))
    turns = [said("system", "Be brief."), said("user", "a"), said("assistant", "b")]
    assert MESSAGES.convert({"messages": turns, "system": column}).messages == talk
    row = {"conversations": turns, "system": column}
    assert SHAREGPT.convert(row).messages == talk
    pair = {"chosen": turns, "rejected": [*turns[:2], said("assistant", "c")], "system": column}
    assert PREFERENCE.convert(pair) == Preference(talk[:2], talk[2:], [assistant("c")])


def test_a_system_field_beside_messages_is_shown():
    found = MESSAGES.convert({"messages": [ASKED, ANSWERED], "system": "s"})
    assert found == Conversation([system("s"), user("weather?"), assistant("fine")])


def test_system_texts_that_differ_are_both_shown():
    row = {"messages": [said("system", "a"), ASKED, ANSWERED], "system": "b"}
    assert [m.content for m in MESSAGES.convert(row).messages[:2]] == ["b", "a"]


def sides(*turns):
    return {
        "chosen": [*turns, said("assistant", "good")],
        "rejected": [*turns, said("assistant", "bad")],
    }


S, U0, A0, U = (
    said("system", "Be brief."),
    said("user", "Hi"),
    said("assistant", "Hello"),
    said("user", "Name a sea."),
)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Name a sea.", **sides(U)}, [U]),
        ({"prompt": " Name a  sea. \n", **sides(U)}, [U]),
        ({"prompt": "Name a sea.", **sides(S, U)}, [S, U]),
        ({"prompt": "Name a sea.", **sides(U0, A0, U)}, [U0, A0, U]),
        ({"prompt": "Name a sea.", **sides(S, U0, A0, U)}, [S, U0, A0, U]),
        ({"prompt": [S, U], **sides(U)}, [S, U]),
        ({"prompt": [S, U], **sides(S, U)}, [S, U]),
        ({"prompt": [U0, A0, U], **sides(U)}, [U0, A0, U]),
        ({"prompt": [S, U0, A0, U], **sides(U)}, [S, U0, A0, U]),
        ({"prompt": [S, U0, A0, U], **sides(U0, A0, U)}, [S, U0, A0, U]),
        ({"prompt": [S, U], **sides(U0, A0, U)}, [S, U0, A0, U]),
        ({"prompt": [S, U], **sides()}, [S, U]),
        ({"system": "Be brief.", "prompt": "Name a sea.", **sides(S, U)}, [S, U]),
        ({"system": "Be brief.", "prompt": "Name a sea.", **sides(U)}, [S, U]),
        ({"system": "Be brief.", **sides(S, U)}, [S, U]),
        ({"conversations": [U0, A0, U], **sides(U0, A0, U)}, [U0, A0, U]),
        ({"prompt": "Name a sea.", **sides(U), "rejected": "bad"}, [U]),
        (
            {"prompt": "Name a sea.", **sides(U), "chosen": [S, U, said("assistant", "good")]},
            [S, U],
        ),
    ],
)
def test_a_prompt_that_the_sides_repeat_is_shown_once(row, prompt):
    found = PREFERENCE.convert(row)
    assert [(m.role, m.content.split()) for m in found.prompt] == [
        (turn["role"], turn["content"].split()) for turn in prompt
    ]
    assert found.chosen == (assistant("good"),)
    assert found.rejected == (assistant("bad"),)


def test_a_side_that_goes_on_after_its_answer_keeps_all_of_it():
    more = [said("assistant", "good"), U0, said("assistant", "more")]
    row = {"prompt": "Name a sea.", "chosen": [U, *more], "rejected": "bad"}
    assert [m.content for m in PREFERENCE.convert(row).chosen] == ["good", "Hi", "more"]
    row = {"prompt": "Hi", "chosen": more, "rejected": "bad"}
    assert [m.content for m in PREFERENCE.convert(row).chosen] == ["good", "Hi", "more"]


def test_answers_that_differ_in_white_space_are_no_common_prompt():
    one, other = said("assistant", "f(\n  x)"), said("assistant", "f(\n x)")
    row = {
        "chosen": [U, one, U0, said("assistant", "a")],
        "rejected": [U, other, U0, said("assistant", "b")],
    }
    found = PREFERENCE.convert(row)
    assert len(found.prompt) == 1
    assert found.chosen[0].content != found.rejected[0].content


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Other?", **sides(U)}, "field 'chosen': got turns that begin with a user turn"),
        (
            {"prompt": [said("system", "Be long."), U], **sides(S, U)},
            "field 'chosen': got another system turn than the prompt's",
        ),
        (
            {"prompt": "Name a sea.", **sides(S, U), "rejected": [U0, A0, U, A0]},
            "field 'rejected': got other turns before the prompt than chosen has",
        ),
    ],
)
def test_sides_that_do_not_belong_to_the_prompt_are_refused(row, message):
    with pytest.raises(RowError) as caught:
        PREFERENCE.convert(row)
    assert str(caught.value).startswith(message)
