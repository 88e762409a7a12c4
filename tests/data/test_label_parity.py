"""Templates x conversations x tokenizers: ids of inference, then the answer, and nothing else.

The oracle is transformers itself for what inference sees, and what `template_shapes` says of each
template for what an answer is there. Whatever a row is refused for is counted.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache

import attrs
import pytest
from conversations import TALKS, Talk, talk, u
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from label_tokenizers import EXACT, KINDS, tokenizer_of
from template_shapes import SHAPES, Shape
from transformers.utils.chat_template_utils import render_jinja_template

from tunesmith.data.examples import Message
from tunesmith.data.render import IGNORE_INDEX, Rendered, Renderer
from tunesmith.data.tool_calls import FORMS, with_ids
from tunesmith.errors import DataError

TEXT_ARGUMENTS = ("deepseek v3", "old tools")
IDS = {"mistral tools": 1, "kimi": 3}
"""Which of the forms of calls a template takes; that ids are right is tested by themselves."""
THOUGHT_FIRST = ("qwen3", "qwen3 thinking", "qwen3.5", "deepseek r1", "glm4.5")
LINE_BREAKS_GO = ("qwen3", "qwen3 thinking", "qwen3.5", "smollm3")
SAMPLE = {
    "byte-level": ("chatml", "qwen3", "mistral tools", "gpt-oss", "phi3", "plain"),
    "across words": ("llama3", "deepseek v3", "vicuna", "alpaca", "old tools"),
    "metaspace": ("llama2", "zephyr", "falcon", "deepseek r1", "kimi"),
    "unigram": ("gemma", "glm4.5"),
    "wordpiece": ("solar",),
}


@cache
def corpus() -> tuple[str, ...]:
    texts = []
    for shape in SHAPES.values():
        for name in ("a sentence", "code", "turns with line breaks", "chinese"):
            messages = [m.to_dict() for m in TALKS[name].conversation.messages]
            rendered, _ = render_jinja_template(
                [messages], chat_template=shape.source, bos_token="<s>", eos_token=shape.eos
            )
            texts.append(rendered[0])
    return tuple(texts)


@cache
def tokenizer_for(kind: str, name: str):
    shape = SHAPES[name]
    return tokenizer_of(kind, corpus(), shape.source, shape.specials, bos=shape.bos, eos=shape.eos)


def as_inference(name: str, talk: Talk) -> list[dict]:
    """The messages as whoever serves the model has to give them to this template."""
    messages = list(with_ids(talk.conversation.messages))
    if name in IDS:
        messages = list(FORMS[IDS[name]](messages))
    given = [message.to_dict() for message in messages]
    if name in TEXT_ARGUMENTS:
        for message in given:
            if "tool_calls" in message:
                message["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
    return given


def _with_text(call: dict) -> dict:
    function = call["function"]
    text = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def inference_ids(tokenizer, messages, tools) -> list[int]:
    return tokenizer.apply_chat_template(
        messages, tools=tools or None, add_generation_prompt=True, return_dict=True
    )["input_ids"]


def spelled(tokenizer, ids) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def runs(row: Rendered) -> list[tuple[int, int]]:
    """Stretches of trained tokens."""
    found, start = [], None
    for at, label in enumerate([*row.labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX and start is None:
            start = at
        elif label == IGNORE_INDEX and start is not None:
            found.append((start, at))
            start = None
    return found


def answers(name: str, shape: Shape, message: Message, first: bool) -> list[str]:
    """The texts that a turn of words alone may have, as a last turn and before others."""
    content = message.content
    contents = [content.strip() if shape.strips else content]
    if name in LINE_BREAKS_GO:
        contents.append(content.lstrip("\n"))
    leads = [shape.lead, ""] if name in THOUGHT_FIRST or first else [shape.lead]
    ends = [shape.end] if shape.end else [shape.eos, ""]
    if not content:
        leads.append(shape.lead.rstrip())
    if name == "phi3":
        ends.append("<|end|>\n<|endoftext|>")
    return [lead + said + end for said in contents for lead in leads for end in ends]


def plain(message: Message) -> bool:
    return not message.extra and "</think>" not in message.content


def says_all(kind: str, shape: Shape, message: Message, text: str) -> bool:
    """Whether a trained text has the thoughts, words and calls of a turn, and its end."""
    parts = [message.extra.get("reasoning_content", "").strip()]
    parts += [part.strip() for part in message.content.replace("<think>", "").split("</think>")]
    for call in message.extra.get("tool_calls", ()):
        parts.append(call["function"]["name"])
        for value in call["function"]["arguments"].values():
            written = json.dumps(value, ensure_ascii=False)
            # some templates write a text that is a value without quotes
            parts.append(value if isinstance(value, str) and written not in text else written)
    ends = [shape.end] if shape.end else [shape.eos, ""]
    ends += ["<|end|>\n<|endoftext|>"] if "<|endoftext|>" in shape.specials else []
    ends += ["<|call|>", "<|end|>", "<|return|>"] if "<|call|>" in shape.specials else []
    if kind not in EXACT:
        if "<unk>" in text:
            return True
        text = squeezed(text)
        parts, ends = [squeezed(part) for part in parts], [squeezed(end) for end in ends]
    return all(part in text for part in parts) and any(text.endswith(end) for end in ends)


def begins(answer: str, text: str, *, exact: bool) -> bool:
    """Whether a text begins with an answer; by its letters where no prompt stands before it."""
    if exact:
        return text.startswith(answer)
    return squeezed(text).startswith(squeezed(answer))


def squeezed(text: str) -> str:
    return "".join(text.split())


@attrs.define
class Figures:
    """What a sweep has come to."""

    right: int = 0
    sequences: int = 0
    refused: Counter = attrs.field(factory=Counter)
    wrong: list[str] = attrs.field(factory=list)


def check(kind: str, name: str, title: str, figures: Figures, talk: Talk | None = None) -> None:
    """Render one conversation and measure every label of it."""
    shape, tokenizer = SHAPES[name], tokenizer_for(kind, name)
    talk = TALKS[title] if talk is None else talk
    here = f"{kind} / {name} / {title}"
    try:
        rows = Renderer(tokenizer, 100_000).sequences(talk.conversation)
    except DataError as error:
        if talk.tags & shape.cannot:
            figures.refused[", ".join(sorted(talk.tags & shape.cannot))] += 1
        else:
            figures.wrong.append(f"{here}: refused: {error}")
        return
    figures.sequences += len(rows)
    problems = faults(kind, name, shape, talk, tokenizer, rows)
    problems += whole_faults(kind, shape, talk, tokenizer)
    figures.wrong += [f"{here}: {problem}" for problem in problems]
    figures.right += not problems


def faults(kind, name, shape, talk, tokenizer, rows: list[Rendered]) -> list[str]:
    """What is wrong with the rows of a conversation."""
    given = as_inference(name, talk)
    messages = talk.conversation.messages
    wanted = [i for i, m in enumerate(messages) if m.role == "assistant" and m.trained]
    starts = {
        index: inference_ids(tokenizer, given[:index], talk.conversation.tools)
        for index in wanted
        if index
    }
    problems: list[str] = []
    covered: Counter = Counter()

    def spell(index: int, answer: str) -> str:
        """Return an answer as the tokenizer gives it back behind its prompt."""
        if kind in EXACT or not index:
            return answer
        prompt = tokenizer.apply_chat_template(
            given[:index],
            tools=talk.conversation.tools or None,
            add_generation_prompt=True,
            tokenize=False,
        )
        whole = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
        return spelled(tokenizer, whole)[len(spelled(tokenizer, starts[index])) :]

    for row in rows:
        ids = list(row.input_ids)
        reached = [i for i in wanted if i in starts and ids[: len(starts[i])] == starts[i]]
        if wanted[0] == 0:
            reached.insert(0, 0)
        bos = tokenizer.bos_token_id
        if bos is not None and name != "llama2" and ids.count(bos) > 1:
            problems.append("two tokens begin the sequence")
        if any(
            label not in (IGNORE_INDEX, token) for label, token in zip(row.labels, ids, strict=True)
        ):
            problems.append("a label is not its token")
        for start, end in runs(row):
            here = [i for i in reached if i and len(starts[i]) == start]
            if not here and 0 in reached:
                here = [0]
            if not here:
                problems.append(
                    f"trained from {start}, where no answer begins: "
                    f"{spelled(tokenizer, ids[start:end])!r}; answers begin at "
                    f"{ {i: len(starts[i]) for i in starts} }"
                )
                continue
            text = spelled(tokenizer, ids[:end])[len(spelled(tokenizer, ids[:start])) :]
            if not shape.end and end == runs(row)[-1][1] and not text.endswith(shape.eos):
                problems.append(f"the sequence has no end, but {text[-20:]!r}")
            problems += _said(kind, name, shape, messages, here[0], text, reached, covered, spell)
        shown = spelled(tokenizer, ids)
        last = max(reached, default=0)
        for number, message in enumerate(messages[:last]):
            mark = message.content.split(" ")[0]
            marked = message.role != "assistant" and mark[:1] == "q" and kind != "wordpiece"
            if marked and shown.count(mark) != 1:
                problems.append(f"turn {number + 1} is shown {shown.count(mark)} times")
    for index in wanted:
        silent = not (messages[index].content or messages[index].extra or shape.end)
        if covered[index] != 1 and not (silent and not covered[index]):
            problems.append(f"turn {index + 1} is trained {covered[index]} times")
    return problems


def whole_faults(kind, shape, talk, tokenizer) -> list[str]:
    """What is wrong with the one sequence that a conversation has where all of it fits in."""
    messages = talk.conversation.messages
    try:
        row = Renderer(tokenizer, 100_000).conversation(talk.conversation)
    except DataError as error:
        known = "once a further turn follows" in str(error)
        # a word that is unknown as a whole cannot be cut where two turns meet without a space
        known |= kind == "wordpiece" and "the tokenizer cannot write" in str(error)
        return [] if known else [f"in one sequence: {error}"]
    if kind not in EXACT:
        return []
    trained = spelled(tokenizer, [label for label in row.labels if label != IGNORE_INDEX])
    at = 0
    for number, message in enumerate(messages):
        if message.role != "assistant" or not message.trained or not plain(message):
            continue
        content = message.content.strip("\n") if not shape.strips else message.content.strip()
        at = trained.find(content, at)
        if at < 0:
            return [f"in one sequence, turn {number + 1} is not all in {trained!r}"]
        at += len(content)
    return []


def _said(kind, name, shape, messages, index, text, reached, covered, spell) -> list[str]:
    """Compare the text of one trained stretch with the turns it has to be."""
    while True:
        covered[index] += 1
        message = messages[index]
        if not plain(message):
            return (
                []
                if says_all(kind, shape, message, text)
                else [f"turn {index + 1} trains {text!r}"]
            )
        fitting = [
            answer
            for answer in answers(name, shape, message, index == 0)
            if begins(spell(index, answer), text, exact=index > 0 or kind in EXACT)
        ]
        if not fitting:
            return [f"turn {index + 1} trains {text!r}"]
        longest = max((spell(index, answer) for answer in fitting), key=len)
        exact = index > 0 or kind in EXACT
        if text == longest or (not exact and squeezed(text) == squeezed(longest)):
            return []
        # nothing stands between two answers in a row where a template has no headers
        text, index = text[len(longest) :], index + 1
        if index not in reached:
            return [f"beyond turn {index} is trained {text!r}"]


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in SAMPLE.items() for n in names])
def test_every_answer_and_nothing_else_is_trained_behind_the_ids_of_inference(kind, name):
    figures = Figures()
    for title in TALKS:
        check(kind, name, title, figures)
    assert not figures.wrong, "\n".join(figures.wrong)
    assert figures.right >= 40


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_shape_of_template_with_every_conversation(kind):
    assert len(SHAPES) >= 30
    assert len(TALKS) >= 40
    figures = Figures()
    for name in SHAPES:
        for title in TALKS:
            check(kind, name, title, figures)
    print(f"\n{kind}: {figures.right} right, {figures.sequences} sequences, refused:")
    for reason, count in figures.refused.most_common():
        print(f"  {count:4} {reason}")
    assert not figures.wrong, f"{len(figures.wrong)}:\n" + "\n".join(figures.wrong[:200])


SPACE = st.sampled_from(["", " ", "  ", "\n", "\n\n", "\t", " \n", "    "])
WORDS = st.one_of(
    st.sampled_from(
        ["the", "a", "Yes", "1", "#", "-", "def f(x):", "你好", "🙂", "<|im_end|>", "</s>"]
    ),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8),
)


@st.composite
def said(draw) -> str:
    parts = draw(st.lists(st.tuples(SPACE, WORDS), min_size=1, max_size=4))
    return "".join(space + words for space, words in parts) + draw(SPACE)


@pytest.mark.parametrize("name", ["chatml", "plain", "llama2", "phi3", "alpaca"])
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(said(), min_size=1, max_size=3), kind=st.sampled_from(EXACT))
def test_whatever_the_assistant_says_is_trained_to_the_letter(name, texts, kind):
    turns = [
        m for n, text in enumerate(texts) for m in (u(f"q{n}z Go."), Message("assistant", text))
    ]
    figures = Figures()
    check(kind, name, repr(texts), figures, talk(*turns))
    assert not figures.wrong
    assert figures.right == 1
