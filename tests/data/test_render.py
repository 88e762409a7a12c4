"""Which tokens are trained, over the ways chat templates are written."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from tunesmith.data.examples import Conversation, Message, Preference, Text
from tunesmith.data.render import IGNORE_INDEX, Rendered, Renderer, set_chat_template
from tunesmith.errors import DataError
from tunesmith.testing.tiny import tiny_tokenizer

SPECIALS = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|h|>",
    "<|/h|>",
    "<end_of_turn>",
    "<start_of_turn>",
    "[INST]",
    "[/INST]",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|h|>' + m.role + '<|/h|>\n\n' + m.content | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n'"
    " + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ ' ' + m.content + eos_token }}{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}"
    "{% endfor %}"
)
GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION_OF_ALL = (  # marks the header and the whitespace after the end as well
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (  # a last answer gets an empty thinking block, an earlier one loses its own
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% set content = m.content.split('</think>')[-1].lstrip() if m.role == 'assistant' and not"
    " loop.last else m.content %}"
    "{% if m.role == 'assistant' and loop.last and '<think>' not in content %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
ANOTHER_PROMPT = ("'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>oracle\n' }}{% endif")
UNPROMPTED = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"

TEMPLATES = {  # name: (template, end of a turn, whether the template strips contents)
    "chatml": (CHATML, "<|im_end|>", False),
    "llama": (LLAMA, "<|eot_id|>", True),
    "gemma": (GEMMA, "<end_of_turn>", True),
    "mistral": (MISTRAL, "</s>", False),
    "generation": (GENERATION, "<|im_end|>", False),
    "generation of all": (GENERATION_OF_ALL, "<|im_end|>", False),
}


@cache
def tokenizer_with(template: str | None, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes that writes a BOS of its own and pads with its eos token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIALS, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)]),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token=eos,
        pad_token=eos,
        additional_special_tokens=SPECIALS[2:],
    )
    tokenizer.chat_template = template
    return tokenizer


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str, **extra: object) -> Message:
    return Message("assistant", text, extra)


def conversation(*texts: str) -> Conversation:
    roles = (user, assistant)
    return Conversation([roles[number % 2](text) for number, text in enumerate(texts)])


def trained_text(tokenizer: PreTrainedTokenizerFast, row: Rendered) -> str:
    return tokenizer.decode([label for label in row.labels if label != IGNORE_INDEX])


def whole_text(tokenizer: PreTrainedTokenizerFast, row: Rendered) -> str:
    return tokenizer.decode(row.input_ids)


said = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]) | st.sampled_from(" \n\t"),
    min_size=1,
    max_size=12,
).filter(str.strip)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(said, min_size=2, max_size=6))
def test_what_is_trained_is_what_the_assistant_says_and_the_end_of_its_turns(name, texts):
    template, end, strips = TEMPLATES[name]
    tokenizer = tokenizer_with(template)
    row = Renderer(tokenizer, 10_000).conversation(conversation(*texts))

    lead = " " if name == "mistral" else ""  # what this template's model has to write itself
    answers = [text.strip() if strips else text for text in texts[1::2]]
    assert trained_text(tokenizer, row) == "".join(lead + answer + end for answer in answers)


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_that_inference_sees(name):
    tokenizer = tokenizer_with(TEMPLATES[name][0])
    talk = conversation("one", "two", "three", "four")
    row = Renderer(tokenizer, 10_000).conversation(talk)
    messages = [message.to_dict() for message in talk.messages]

    seen = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert list(row.input_ids) == seen
    prompt = tokenizer.apply_chat_template(
        messages[:3], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert Renderer(tokenizer, 10).prompt(talk.messages[:3]) == prompt
    assert list(row.input_ids[: len(prompt)]) == prompt


@pytest.mark.parametrize("name", ["llama", "gemma", "mistral"])
def test_a_template_that_writes_bos_does_not_get_a_second_one(name):
    tokenizer = tokenizer_with(TEMPLATES[name][0])
    renderer = Renderer(tokenizer, 10_000)
    bos = tokenizer.bos_token_id
    assert renderer.conversation(conversation("hi", "hello")).input_ids.count(bos) == 1
    assert renderer.prompt([user("hi")]).count(bos) == 1
    chosen, _ = renderer.preference(Preference([user("q")], [assistant("a")], [assistant("b")]))
    assert chosen.input_ids.count(bos) == 1


def test_the_end_of_a_turn_is_trained_though_it_is_the_padding_token():
    tokenizer = tokenizer_with(CHATML, eos="<|im_end|>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = Renderer(tokenizer, 10_000).conversation(conversation("a", "b", "c", "d"))
    assert row.labels.count(tokenizer.eos_token_id) == 2
    assert row.input_ids.count(tokenizer.eos_token_id) == 4


def test_a_system_a_user_and_a_tool_turn_are_never_trained():
    tokenizer = tokenizer_with(CHATML)
    talk = Conversation(
        [
            Message("system", "be brief"),
            user("weather?"),
            assistant("let me look"),
            Message("tool", "sunny"),
            assistant("it is sunny"),
            user("thanks"),
        ]
    )
    row = Renderer(tokenizer, 10_000).conversation(talk)
    assert trained_text(tokenizer, row) == "let me look<|im_end|>it is sunny<|im_end|>"


def test_what_follows_the_last_answer_is_left_out():
    tokenizer = tokenizer_with(CHATML)
    row = Renderer(tokenizer, 10_000).conversation(conversation("a", "b", "unanswered"))
    assert "unanswered" not in whole_text(tokenizer, row)


def test_a_conversation_that_the_assistant_opens_trains_its_first_turn():
    tokenizer = tokenizer_with(CHATML)
    talk = Conversation([assistant("welcome"), user("hi"), assistant("hello")])
    row = Renderer(tokenizer, 10_000).conversation(talk)
    assert trained_text(tokenizer, row) == "welcome<|im_end|>hello<|im_end|>"


def test_a_conversation_without_assistant_has_nothing_to_train():
    row = Renderer(tokenizer_with(CHATML), 10_000).conversation(Conversation([user("hi")]))
    assert row.trained == 0
    assert len(row) > 0


def test_equal_turns_are_told_apart_by_where_they_stand():
    tokenizer = tokenizer_with(CHATML)
    row = Renderer(tokenizer, 10_000).conversation(conversation("yes", "yes", "yes", "yes"))
    assert trained_text(tokenizer, row) == "yes<|im_end|>" * 2


def test_without_completion_only_loss_every_token_is_trained():
    tokenizer = tokenizer_with(CHATML)
    row = Renderer(tokenizer, 10_000, completion_only_loss=False).conversation(
        conversation("a", "b")
    )
    assert row.labels == row.input_ids
    assert row.trained == len(row) - 1


def test_a_template_without_end_token_gets_the_eos_token_at_the_last_answer():
    tokenizer = tokenizer_with(ENDLESS)
    row = Renderer(tokenizer, 10_000).conversation(conversation("a", "bc", "d", "ef"))
    assert whole_text(tokenizer, row) == "user: a\nassistant: bc\nuser: d\nassistant: ef</s>"
    assert trained_text(tokenizer, row) == "bcef</s>"


def test_without_any_end_token_it_says_what_to_do():
    with pytest.raises(DataError, match=r"set tokenizer\.eos_token"):
        Renderer(tokenizer_with(ENDLESS, eos=None), 100).conversation(conversation("a", "b"))


def test_whole_turns_are_trained_whatever_a_template_marks_as_generation():
    for template in (GENERATION, GENERATION_OF_ALL):
        tokenizer = tokenizer_with(template, eos="<|im_end|>")
        row = Renderer(tokenizer, 10_000).conversation(conversation("a", "b", "c", "d"))
        assert trained_text(tokenizer, row) == "b<|im_end|>d<|im_end|>"


def test_a_template_that_writes_a_last_turn_otherwise_still_trains_earlier_turns_as_they_stand():
    tokenizer = tokenizer_with(THINKING)
    row = Renderer(tokenizer, 10_000).conversation(conversation("a", "b", "c", "d"))
    assert trained_text(tokenizer, row) == "b<|im_end|><think>\n\n</think>\n\nd<|im_end|>"
    assert "c" in whole_text(tokenizer, row)


def test_a_template_that_strips_earlier_thinking_is_an_error_that_says_so():
    talk = conversation("a", "<think>hm</think>b", "c", "d")
    with pytest.raises(DataError, match=r"turn 2: .*some strip the thinking of earlier turns"):
        Renderer(tokenizer_with(THINKING), 10_000).conversation(talk)


def test_a_generation_prompt_that_the_answer_does_not_begin_with_is_an_error():
    template = CHATML.replace(*ANOTHER_PROMPT)
    with pytest.raises(DataError, match="turn 2: the chat template writes what stands before"):
        Renderer(tokenizer_with(template), 100).conversation(conversation("a", "b"))


def test_a_template_without_generation_prompt_is_an_error_that_names_the_header():
    with pytest.raises(DataError, match=r"has no generation prompt .*header 'assistant:'"):
        Renderer(tokenizer_with(UNPROMPTED), 100).conversation(conversation("a", "b"))


def test_a_template_that_refuses_a_role_is_quoted():
    talk = Conversation([Message("system", "s"), user("a"), assistant("b")])
    with pytest.raises(DataError, match="refuses this conversation: System role not supported"):
        Renderer(tokenizer_with(GEMMA), 100).conversation(talk)


def test_a_long_conversation_is_cut_at_its_end_and_says_so():
    tokenizer = tokenizer_with(CHATML)
    whole = Renderer(tokenizer, 10_000).conversation(conversation("a", "b" * 50))
    cut = Renderer(tokenizer, 30).conversation(conversation("a", "b" * 50))
    assert not whole.truncated
    assert cut.truncated
    assert cut.input_ids == whole.input_ids[:30]
    assert cut.labels == whole.labels[:30]
    assert 0 < cut.trained < 30


def test_a_row_of_which_only_white_space_is_cut_is_not_cut():
    tokenizer = tokenizer_with(CHATML)
    whole = Renderer(tokenizer, 10_000).conversation(conversation("a", "b"))
    assert whole_text(tokenizer, whole).endswith("<|im_end|>\n")
    assert not Renderer(tokenizer, len(whole) - 1).conversation(conversation("a", "b")).truncated
    assert Renderer(tokenizer, len(whole) - 2).conversation(conversation("a", "b")).truncated


def shown_only(text: str) -> Message:
    return Message("assistant", text, trained=False)


def test_a_turn_that_is_not_to_be_trained_is_shown_and_not_trained():
    tokenizer = tokenizer_with(CHATML)
    talk = Conversation([user("a"), shown_only("wrong"), user("b"), assistant("right")])
    for renderer in (Renderer(tokenizer, 1000), Renderer(tokenizer, 1000, False)):
        row = renderer.conversation(talk)
        assert "wrong<|im_end|>" in whole_text(tokenizer, row)
        assert "wrong" not in trained_text(tokenizer, row)
        assert "right<|im_end|>" in trained_text(tokenizer, row)


def test_a_conversation_ends_with_the_last_turn_that_is_trained():
    tokenizer = tokenizer_with(CHATML)
    talk = Conversation([user("a"), assistant("right"), user("b"), shown_only("wrong")])
    row = Renderer(tokenizer, 1000).conversation(talk)
    assert trained_text(tokenizer, row) == "right<|im_end|>"
    assert "wrong" not in whole_text(tokenizer, row)


def test_a_conversation_whose_turns_are_all_shown_only_trains_nothing():
    talk = Conversation([user("a"), shown_only("wrong")])
    for completion_only in (True, False):
        row = Renderer(tokenizer_with(CHATML), 1000, completion_only).conversation(talk)
        assert row.trained == 0


def test_turns_whose_thoughts_are_stripped_later_get_sequences_of_their_own():
    tokenizer = tokenizer_with(THINKING)
    talk = conversation("a", "<think>hm</think>b", "c", "<think>so</think>d")
    first, second = Renderer(tokenizer, 10_000).sequences(talk)
    assert trained_text(tokenizer, first) == "<think>hm</think>b<|im_end|>"
    assert trained_text(tokenizer, second) == "<think>so</think>d<|im_end|>"
    assert "hm" not in whole_text(tokenizer, second)
    assert "\nb<|im_end|>" in whole_text(tokenizer, second)


def test_a_conversation_that_one_sequence_can_hold_is_one():
    tokenizer = tokenizer_with(CHATML)
    talk = conversation("a", "b", "c", "d")
    assert Renderer(tokenizer, 1000).sequences(talk) == [
        Renderer(tokenizer, 1000).conversation(talk)
    ]


def test_a_template_that_leaves_out_a_turn_as_a_whole_is_an_error():
    silent = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"
    )
    talk = Conversation([user("a"), Message("tool", "sunny"), assistant("b")])
    with pytest.raises(DataError, match="turn 2: the chat template leaves out this tool turn"):
        Renderer(tokenizer_with(silent), 1000).conversation(talk)


def test_built_in_chatml_begins_as_the_tokenizer_does():
    writes_bos, writes_none = tokenizer_with(None), tiny_tokenizer()
    for tokenizer, count in ((writes_bos, 1), (writes_none, 0)):
        set_chat_template(tokenizer, "chatml")
        row = Renderer(tokenizer, 1000).conversation(conversation("a", "b"))
        bos = writes_bos.bos_token_id if count else None
        assert row.input_ids.count(bos) == count
        assert "".join(whole_text(tokenizer, row).split("<|im_start|>")[:1]) == "<s>" * count
    writes_bos.chat_template = None


def test_a_label_on_the_first_token_counts_for_nothing():
    assert Rendered([1, 2, 3], [1, IGNORE_INDEX, 3]).trained == 1


def test_a_preference_trains_the_completions_alone_and_shares_its_prompt():
    tokenizer = tokenizer_with(LLAMA)
    pair = Preference(
        [Message("system", "s"), user("q"), assistant("earlier"), user("again")],
        [assistant("good")],
        [assistant("bad"), user("what?"), assistant("worse")],
    )
    chosen, rejected = Renderer(tokenizer, 10_000).preference(pair)
    assert trained_text(tokenizer, chosen) == "good<|eot_id|>"
    assert trained_text(tokenizer, rejected) == "bad<|eot_id|>worse<|eot_id|>"
    prompt = Renderer(tokenizer, 10_000).prompt(pair.prompt)
    for side in (chosen, rejected):
        assert list(side.input_ids[: len(prompt)]) == prompt
        assert set(side.labels[: len(prompt)]) == {IGNORE_INDEX}


def test_a_preference_with_generation_blocks_trains_the_completion_alone():
    tokenizer = tokenizer_with(GENERATION_OF_ALL)
    pair = Preference(
        [user("q"), assistant("earlier"), user("again")], [assistant("good")], [assistant("bad")]
    )
    chosen, rejected = Renderer(tokenizer, 10_000).preference(pair)
    assert trained_text(tokenizer, chosen) == "good<|im_end|>"
    assert trained_text(tokenizer, rejected) == "bad<|im_end|>"


def test_a_completion_without_assistant_is_refused():
    with pytest.raises(DataError, match="got a completion of user; expected a turn of the assis"):
        Renderer(tokenizer_with(CHATML), 100).completion([user("a")], [user("b")])


def test_plain_text_is_trained_to_its_end():
    tokenizer = tokenizer_with(None)
    row = Renderer(tokenizer, 10_000).text(Text("once upon a time"))
    assert whole_text(tokenizer, row) == "<s>once upon a time</s>"
    assert row.labels == row.input_ids


def test_plain_text_that_begins_with_bos_does_not_get_a_second_one():
    tokenizer = tokenizer_with(None)
    row = Renderer(tokenizer, 10_000).text(Text("<s>once</s>"))
    assert whole_text(tokenizer, row) == "<s>once</s>"


def test_tools_and_tool_calls_reach_the_template():
    tokenizer = tokenizer_with(None)
    set_chat_template(tokenizer, "chatml")
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    talk = Conversation(
        [
            Message("system", "be kind"),
            user("weather?"),
            assistant("", tool_calls=[call]),
            Message("tool", "sunny"),
            assistant("fine", name="bot"),
        ],
        tools,
    )
    row = Renderer(tokenizer, 10_000).conversation(talk)
    assert "be kind" in whole_text(tokenizer, row)
    assert whole_text(tokenizer, row).count('"name": "look"') == 2
    assert trained_text(tokenizer, row) == (
        '<tool_call>\n{"name": "look", "arguments": {"at": "sky"}}\n</tool_call><|im_end|>'
        "fine<|im_end|>"
    )
    tokenizer.chat_template = None


def test_a_template_that_would_silently_lose_tools_or_tool_calls_is_an_error():
    renderer = Renderer(tokenizer_with(CHATML), 10_000)
    tools = [{"type": "function", "function": {"name": "look"}}]
    with pytest.raises(DataError, match="does not show them to the model; pass chat_template"):
        renderer.conversation(Conversation([user("a"), assistant("b")], tools))
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    with pytest.raises(DataError, match="calls the tool 'look', and the chat template does not"):
        renderer.conversation(Conversation([user("a"), assistant("", tool_calls=[call])]))


def test_stop_ids_hold_the_eos_token_and_the_template_s_own_end():
    tokenizer = tokenizer_with(LLAMA)
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert Renderer(tokenizer, 4).stop_ids == (tokenizer.eos_token_id, eot)
    assert Renderer(tokenizer_with(MISTRAL), 4).stop_ids == (tokenizer.eos_token_id,)


def test_a_word_tokenizer_that_drops_whitespace_trains_the_same_words():
    words = {
        w: i
        for i, w in enumerate(
            [
                "<unk>",
                "</s>",
                "<|im_end|>",
                "<|im_start|>",
                "user",
                "assistant",
                "hello",
                "there",
                "how",
                "are",
                "you",
            ]
        )
    }
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        eos_token="</s>",
        additional_special_tokens=["<|im_end|>", "<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    row = Renderer(tokenizer, 100).conversation(conversation("how are you", "hello there"))
    trained = [label for label in row.labels if label != IGNORE_INDEX]
    assert tokenizer.convert_ids_to_tokens(trained) == ["hello", "there", "<|im_end|>"]


def test_a_slow_tokenizer_does_as_well_as_a_fast_one():
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = ENDLESS
    row = Renderer(tokenizer, 1000).conversation(conversation("a", " bc\n", "d", "ef"))
    assert trained_text(tokenizer, row) == " bc\nef</s>"


def test_a_tokenizer_without_template_says_what_to_pass():
    tokenizer = tokenizer_with(None)
    for call in (
        lambda: set_chat_template(tokenizer, None),
        lambda: Renderer(tokenizer, 10).conversation(conversation("a", "b")),
    ):
        with pytest.raises(DataError, match=r"no chat template.*chat_template=\"chatml\""):
            call()


def test_a_template_is_taken_from_a_file_or_as_source(tmp_path):
    tokenizer = tokenizer_with(None)
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML, encoding="utf-8")
    for template in (str(path), CHATML):
        set_chat_template(tokenizer, template)
        assert tokenizer.chat_template == CHATML
        set_chat_template(tokenizer, None)  # keeps it
        assert tokenizer.chat_template == CHATML
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("nowhere.jinja", "no such file: nowhere.jinja"),
        ("chatlm", "got 'chatlm'; expected \"chatml\", the path of a .jinja file"),
        ("{% for m in messages %}", "line 1: not valid Jinja"),
    ],
)
def test_a_template_that_is_none_is_an_error(template, message):
    tokenizer = tokenizer_with(None)
    try:
        with pytest.raises(DataError, match=message):
            set_chat_template(tokenizer, template)
    finally:
        tokenizer.chat_template = None


def test_built_in_chatml_ends_turns_with_eos_where_it_has_no_token_of_its_own():
    inner = tokenizer_with(None).backend_tokenizer.to_str().replace("<|im_end|>", "<|gone|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(inner), bos_token="<s>", eos_token="</s>"
    )
    set_chat_template(tokenizer, "chatml")
    row = Renderer(tokenizer, 1000).conversation(conversation("a", "b", "c", "d"))
    assert trained_text(tokenizer, row) == "b</s>d</s>"


# SmolLM2's vocabulary lacks the bytes that begin code points beyond the planes in use
in_smollm2 = said.filter(lambda text: max(text) < "\U00010000")


@pytest.fixture(scope="module")
def smollm():
    path = os.environ.get("TUNESMITH_TEST_MODEL", "")
    if not path or not Path(path).is_dir():
        pytest.skip("TUNESMITH_TEST_MODEL names no directory of SmolLM2")
    return AutoTokenizer.from_pretrained(path)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(texts=st.lists(in_smollm2, min_size=2, max_size=6))
def test_smollm2_trains_what_the_assistant_says_and_its_ends(smollm, texts):
    row = Renderer(smollm, 10_000).conversation(conversation(*texts))
    assert trained_text(smollm, row) == "".join(t + "<|im_end|>" for t in texts[1::2])
    assert row.labels.count(smollm.eos_token_id) == len(texts) // 2


def test_smollm2_keeps_its_system_text_and_sees_what_generation_sees(smollm):
    talk = conversation("Who are you?", "A model.\n")
    row = Renderer(smollm, 100).conversation(talk)
    assert trained_text(smollm, row) == "A model.\n<|im_end|>"
    prompt = Renderer(smollm, 100).prompt(talk.messages[:1])
    assert list(row.input_ids[: len(prompt)]) == prompt
    assert smollm.decode(prompt).startswith("<|im_start|>system\nYou are a helpful AI assistant")
