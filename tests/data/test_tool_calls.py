"""Calls get ids where they have none, and are written in the form that a template takes."""

from __future__ import annotations

import json

import pytest

from tunesmith.data.examples import Conversation, Message
from tunesmith.data.render import IGNORE_INDEX, Renderer
from tunesmith.data.tool_calls import with_ids
from tunesmith.errors import DataError
from tunesmith.testing.tiny import tiny_tokenizer


def calling(*cities: str, ids: tuple[str, ...] = ()) -> Message:
    calls = [
        {"type": "function", "function": {"name": "look", "arguments": {"at": city}}}
        for city in cities
    ]
    for call, own in zip(calls, ids, strict=False):
        call["id"] = own
    return Message("assistant", "", {"tool_calls": calls})


def result(text: str, **extra: str) -> Message:
    return Message("tool", text, extra)


ASKED = Message("user", "weather?")
SAID = Message("assistant", "fine")


def ids_of(messages) -> tuple[list[str], list[str | None]]:
    calls = [call["id"] for m in messages for call in m.extra.get("tool_calls", ())]
    return calls, [m.extra.get("tool_call_id") for m in messages if m.role == "tool"]


def test_a_call_without_id_gets_one_of_nine_letters_and_digits_and_so_does_its_result():
    calls, results = ids_of(with_ids([ASKED, calling("Rome"), result("sun"), SAID]))
    assert calls == results
    [made] = calls
    assert len(made) == 9
    assert made.isalnum()
    assert made.isascii()


def test_ids_are_the_same_every_time_and_differ_from_call_to_call():
    talk = [ASKED, calling("Rome", "Rome"), result("sun"), result("sun"), calling("Rome"), SAID]
    calls, results = ids_of(with_ids(talk))
    assert with_ids(talk) == with_ids(list(talk))
    assert len(set(calls)) == 3
    assert results == calls[:2]


def test_made_ids_do_not_change_as_the_conversation_goes_on():
    talk = [ASKED, calling("Rome"), result("sun"), calling("Oslo"), result("snow"), SAID]
    whole = with_ids(talk)
    for end in range(1, len(talk)):
        assert with_ids(talk[:end]) == whole[:end]


def test_ids_that_are_there_stay_and_are_given_to_the_results():
    calls, results = ids_of(with_ids([ASKED, calling("Rome", ids=("c1",)), result("sun"), SAID]))
    assert calls == results == ["c1"]


def test_a_call_takes_the_id_that_its_result_has():
    talk = [ASKED, calling("Rome", "Oslo"), result("a", tool_call_id="c1")]
    talk += [result("b", tool_call_id="c2"), SAID]
    assert ids_of(with_ids(talk)) == (["c1", "c2"], ["c1", "c2"])


def test_a_result_goes_to_the_call_of_its_name():
    talk = [ASKED, calling("Rome"), result("b", name="other"), result("a", name="look"), SAID]
    talk[1].extra["tool_calls"].append({"type": "function", "function": {"name": "other"}})
    calls, results = ids_of(with_ids(talk))
    assert results == calls[::-1]


def test_a_conversation_without_calls_is_left_alone():
    assert with_ids([ASKED, SAID]) == (ASKED, SAID)


HEAD = "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
TAIL = (
    "{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
NINE = (
    HEAD + "{{- m.content -}}{%- if m.role == 'tool' -%}"
    "{%- if m.tool_call_id is not defined or m.tool_call_id | length != 9 -%}"
    "{{- raise_exception('nine letters') -}}{%- endif -%}{{- ' for ' + m.tool_call_id -}}"
    "{%- endif -%}{%- for c in m.tool_calls or [] -%}"
    "{%- if c.id | length != 9 -%}{{- raise_exception('nine letters') -}}{%- endif -%}"
    "{{- 'CALL ' + c.function | tojson + c.id -}}{%- endfor -%}" + TAIL
)
TEXT = (
    HEAD + "{{- m.content -}}{%- for c in m.tool_calls or [] -%}"
    "{{- c.function.name + c.function.arguments -}}{%- endfor -%}" + TAIL
)
PYTHON = TEXT.replace("c.function.name + c.function", "c.function.name ~ c.function")
NAMED = (
    HEAD + "{{- m.content -}}{%- for c in m.tool_calls or [] -%}"
    "{{- c.id + ' ' + c.function.arguments | tojson -}}{%- endfor -%}" + TAIL
)


def rendered(template: str, *messages: Message) -> tuple[str, str]:
    """Everything that is shown, and what of it is trained."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    row = Renderer(tokenizer, 10_000).conversation(Conversation(messages))
    trained = [label for label in row.labels if label != IGNORE_INDEX]
    return tokenizer.decode(row.input_ids), tokenizer.decode(trained)


@pytest.mark.parametrize("ids", [(), ("c1",), ("call_8Xk2mPq0aZ7",), ("abcDEF123",)])
def test_a_template_that_wants_ids_of_nine_letters_gets_them(ids):
    shown, trained = rendered(NINE, ASKED, calling("Rome", ids=ids), result("sun"), SAID)
    own = trained.split('"}}')[1].split("<|im_end|>")[0]
    assert len(own) == 9
    assert f"sun for {own}<|im_end|>" in shown
    assert own == "abcDEF123" or ids != ("abcDEF123",)


@pytest.mark.parametrize("template", [TEXT, PYTHON])
def test_a_template_that_wants_arguments_as_text_gets_them(template):
    _, trained = rendered(template, ASKED, calling("Rome"), result("sun"), SAID)
    assert 'look{"at": "Rome"}<|im_end|>' in trained


def test_a_template_whose_ids_have_the_name_in_them_gets_it():
    _, trained = rendered(NAMED, ASKED, calling("Rome", "Oslo"), result("a"), result("b"), SAID)
    assert 'functions.look:0 {"at": "Rome"}' in trained
    assert 'functions.look:1 {"at": "Oslo"}' in trained


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
def test_a_thought_is_given_under_the_key_that_the_template_reads(key, read):
    template = HEAD + "{{- '<think>' + m." + read + " + '</think>' if m." + read + " -}}"
    template += "{{- m.content -}}" + TAIL
    _, trained = rendered(template, ASKED, Message("assistant", "4", {key: "Two and two."}))
    assert trained == "<think>Two and two.</think>4<|im_end|>"


def test_a_thought_that_no_key_brings_into_the_template_is_an_error():
    with pytest.raises(DataError, match="leaves out or rewrites part of this assistant turn"):
        rendered(
            HEAD + "{{- m.content -}}" + TAIL, ASKED, Message("assistant", "4", {"thinking": "x"})
        )


def test_what_a_template_refuses_for_another_reason_is_quoted():
    refusing = NINE.replace("{%- for m", "{{- raise_exception('no users') -}}{%- for m", 1)
    with pytest.raises(DataError, match="refuses this conversation: no users"):
        rendered(refusing, ASKED, calling("Rome"), result("sun"), SAID)


def test_the_built_in_template_writes_arguments_as_json():
    from tunesmith.data.chat_template import CHATML

    _, trained = rendered(CHATML, ASKED, calling("Zürich"), result("sun"), SAID)
    call = trained.split("<tool_call>\n")[1].split("\n</tool_call>")[0]
    assert json.loads(call) == {"name": "look", "arguments": {"at": "Zürich"}}
