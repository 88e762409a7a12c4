"""Conversations of every kind that data has, tagged by what a chat template needs to hold them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import attrs

from tunesmith.data.examples import Conversation, Message

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a place",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CODE = "def f(x):\n    if x:\n        return 1\n\treturn  2\n"


@attrs.frozen
class Talk:
    """A conversation, and what a template has to be able to hold for it."""

    conversation: Conversation
    tags: frozenset[str] = attrs.field(default=frozenset(), converter=frozenset)


def u(text: str) -> Message:
    return Message("user", text)


def a(text: str, **extra: Any) -> Message:
    return Message("assistant", text, extra)


def s(text: str) -> Message:
    return Message("system", text)


def t(text: str, **extra: Any) -> Message:
    return Message("tool", text, extra)


def call(city: Any, *, id: str | None = None, **more: Any) -> dict[str, Any]:
    made = {
        "type": "function",
        "function": {"name": "get_weather", "arguments": {"city": city, **more}},
    }
    return made if id is None else {"id": id, **made}


def talk(*messages: Message, tags: str = "", tools: bool = False) -> Talk:
    wanted = {tag.strip() for tag in tags.split(",") if tag.strip()}
    roles = [message.role for message in messages]
    if "system" in roles:
        wanted.add("system")
    if "tool" in roles:
        wanted.add("tool turns")
    if any("tool_calls" in message.extra for message in messages):
        wanted.add("calls")
    if any("reasoning_content" in m.extra for m in messages):
        wanted.add("thoughts")
    if any(len(m.extra.get("tool_calls", ())) > 1 for m in messages):
        wanted.add("parallel")
    spoken = [role for role in roles if role != "system"]
    if any(one == other for one, other in pairwise(spoken)):
        wanted.add("roles in a row")
    if spoken[0] == "assistant":
        wanted.add("assistant first")
    if tools:
        wanted.add("tools")
    return Talk(Conversation(messages, TOOLS if tools else ()), wanted)


def single(answer: str, question: str = "q0z Say it.") -> Talk:
    return talk(u(question), a(answer))


TALKS: dict[str, Talk] = {
    "one word": single("Yes"),
    "a sentence": single("The thing is the ring, and the king sings."),
    "two paragraphs": single("First.\n\nSecond.\n\n- a\n- b"),
    "code": single(CODE.strip("\n"), "q0z Write f."),
    "code with its last line break": single(CODE),
    "a fenced block": single("```python\n" + CODE + "```"),
    "leading space": single(" leading"),
    "leading spaces": single("    indented answer"),
    "leading line break": single("\nafter a line break"),
    "leading line breaks": single("\n\n\nafter three"),
    "leading tab": single("\ttab"),
    "trailing space": single("trailing "),
    "trailing spaces": single("trailing    "),
    "trailing line break": single("trailing\n"),
    "trailing line breaks": single("trailing\n\n\n"),
    "space on both sides": single("  both  "),
    "a single letter": single("a"),
    "a number": single("42"),
    "a minus": single("- 1"),
    "a bracket": single('{"a": [1, 2]}'),
    "a tag": single("<b>bold</b> text"),
    "a colon": single(": colon first"),
    "quotes": single("'quoted' \"twice\""),
    "chinese": single("你好世界。这是一个测试。"),
    "japanese": single("こんにちは、世界"),
    "korean": single("안녕하세요"),
    "emoji": single("🙂 👩‍👩‍👧‍👦 🇫🇷"),
    "right to left": single("שלום עולם مرحبا بالعالم"),
    "combining marks": single("e\u0301 n\u0303 a\u030a"),
    "mathematics": single("∑ᵢ xᵢ² ≤ ∞ → ½"),
    "windows line breaks": single("one\r\ntwo"),
    "very long": single("the ring and the thing " * 120),
    "ends of turns in a question": talk(
        u("q0z What does <|im_end|> mean, and </s> or <|end|>?"), a("They end turns.")
    ),
    "ends of turns in an answer": single("Write <|im_end|> or </s> or <|end|> there."),
    "an answer that is an end": single("<|im_end|>"),
    "headers in an answer": single("<|im_start|>assistant\nfoo"),
    "the question again": talk(u("q0z Say it."), a("q-z Say it.")),
    "two turns": talk(u("q0z One"), a("first"), u("q1z Two"), a("second")),
    "turns with space": talk(
        u("q0z One"), a(" first\n"), u("q1z Two"), a("\nsecond "), u("q2z Three"), a("third")
    ),
    "turns with line breaks": talk(u("q0z One"), a("\n\nfirst\n\n"), u("q1z Two"), a("\n\nsecond")),
    "the same turn three times": talk(
        u("q0z yes"), a("yes"), u("q1z yes"), a("yes"), u("q2z yes"), a("yes")
    ),
    "ten turns": talk(
        *(
            message
            for number in range(5)
            for message in (u(f"q{number}z The {number}?"), a(f"That is the {number}."))
        )
    ),
    "an empty answer in the middle": talk(
        u("q0z One"), a(""), u("q1z Two"), a("second"), tags="empty"
    ),
    "a question at the end": talk(u("q0z One"), a("first"), u("q1z Two")),
    "system": talk(s("q9z Be brief."), u("q0z One"), a("first")),
    "system and turns": talk(
        s("q9z Be brief.\n"), u("q0z One"), a("first"), u("q1z Two"), a(" second")
    ),
    "the assistant first": talk(a("Welcome."), u("q0z One"), a("first")),
    "two questions": talk(u("q0z One"), u("q1z Two"), a("both")),
    "two answers": talk(u("q0z One"), a("first"), a("second")),
    "an answer that is only shown": talk(
        u("q0z One"), Message("assistant", "wrong", trained=False), u("q1z Two"), a("right")
    ),
    "only the first is learned": talk(
        u("q0z One"), a("right"), u("q1z Two"), Message("assistant", "wrong", trained=False)
    ),
    "tools": talk(u("q0z Weather?"), a("Where?"), tools=True),
    "a call": talk(u("q0z Weather?"), a("", tool_calls=[call("Rome")]), tools=True),
    "a call with arguments of every kind": talk(
        u("q0z Weather?"),
        a("", tool_calls=[call('Zürich "x"', days=[1, 2], exact=True, other={"k": None})]),
    ),
    "a call and its result": talk(
        u("q0z Weather?"),
        a("", tool_calls=[call("Rome")]),
        t("q1z sun"),
        a("Sunny."),
        tools=True,
    ),
    "text with a call": talk(
        u("q0z Weather?"),
        a("Let me look.", tool_calls=[call("Rome", id="call_0123456789abcdef")]),
        t('{"q1z": 20, "sky": "clear\\nblue"}', tool_call_id="call_0123456789abcdef"),
        a("Clear."),
        u("q2z Thanks."),
        a("Welcome."),
        tools=True,
    ),
    "calls with short ids": talk(
        u("q0z Weather?"),
        a("", tool_calls=[call("Rome", id="abcDEF123")]),
        t("q1z sun", tool_call_id="abcDEF123"),
        a("Sunny."),
    ),
    "parallel calls": talk(
        u("q0z Weather?"),
        a("", tool_calls=[call("Rome"), call("Oslo")]),
        t("q1z sun"),
        t("q2z snow"),
        a("Sun and snow."),
        tools=True,
    ),
    "a thought": talk(u("q0z 2+2?"), a("4", reasoning_content="Two and two.")),
    "thoughts in every turn": talk(
        u("q0z 2+2?"),
        a("4", reasoning_content="Two and two."),
        u("q1z Sure?"),
        a("Yes.", reasoning_content="Counted again.\nTwice."),
    ),
    "a thought and a call": talk(
        u("q0z Weather?"),
        a("", reasoning_content="I have to look.", tool_calls=[call("Rome")]),
        t("q1z sun"),
        a("Sunny.", reasoning_content="It says sun."),
        tools=True,
    ),
    "a thought in the content": talk(u("q0z 2+2?"), a("<think>\nTwo.\n</think>\n\n4")),
    "thoughts in all contents": talk(
        u("q0z 2+2?"),
        a("<think>\nTwo.\n</think>\n\n4"),
        u("q1z Sure?"),
        a("<think>\nAgain.\n</think>\n\nYes."),
    ),
}
