"""Chat prompts become ids as inference has them, and answers become texts."""

from __future__ import annotations

import pytest

from tunesmith.data.examples import Message
from tunesmith.errors import DataError, OpError
from tunesmith.nn.rollout import Sampling
from tunesmith.plugin.rollouts import ask, prompt_ids, stop_ids
from tunesmith.testing.tiny import tiny_session

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    place = tmp_path_factory.mktemp("base") / "model"
    return tiny_session(place, pad_token="<|endoftext|>")


def test_a_text_and_its_message_are_one_prompt_and_as_the_tokenizer_renders_it(session):
    tokenizer = session.tokenizer
    turns = [{"role": "user", "content": "Where is the moon?"}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert prompt_ids(tokenizer, "Where is the moon?") == expected
    assert prompt_ids(tokenizer, turns) == expected
    assert prompt_ids(tokenizer, [Message("user", "Where is the moon?")]) == expected


def test_answers_are_those_of_the_ids(session):
    sampling = Sampling(max_new_tokens=6, temperature=1.0)
    prompts = ["Where is the moon?", [{"role": "user", "content": "Hi"}]]
    found = ask(session.model, session.tokenizer, prompts, sampling, samples=2, seed=3, logps=True)
    assert len(found.texts) == 4
    for ids, text in zip(found.rollout.completions(), found.texts, strict=True):
        assert session.tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert found.rollout.logps.shape == found.rollout.completion_ids.shape
    again = ask(session.model, session.tokenizer, prompts, sampling, samples=2, seed=3)
    assert again.texts == found.texts


def test_an_answer_ends_with_a_string_and_its_text_before_it(session):
    sampling = Sampling(max_new_tokens=24, temperature=1.0)
    prompts = ["Where is the moon?", "Hi", "What?"]
    model, tokenizer = session.model, session.tokenizer
    free = ask(model, tokenizer, prompts, sampling, seed=3)
    strings = [text[3:6] for text in free.texts if len(text) > 6]
    assert strings
    found = ask(model, tokenizer, prompts, sampling, seed=3, stop=strings)
    whole, ended = free.rollout.completions(), found.rollout.completions()
    for number, text in enumerate(found.texts):
        assert ended[number] == whole[number][: len(ended[number])]
        assert not any(each in text for each in strings)
        said = tokenizer.decode(ended[number], skip_special_tokens=True)
        if found.rollout.finish_reasons[number] == "stop" and any(each in said for each in strings):
            shorter = tokenizer.decode(ended[number][:-1], skip_special_tokens=True)
            assert not any(each in shorter for each in strings)
            assert said.strip().startswith(text)
    assert found.texts != free.texts


def test_a_special_token_may_be_a_stop_string(session):
    model, tokenizer = session.model, session.tokenizer
    sampling = Sampling(max_new_tokens=200, temperature=4.0)
    special = next(each for each in tokenizer.all_special_ids if each not in stop_ids(tokenizer))
    name = tokenizer.convert_ids_to_tokens(special)
    found = ask(model, tokenizer, ["Hi"] * 8, sampling, seed=0, stop=[name])
    ended = found.rollout.completions()
    assert any(each[-1] == special for each in ended)
    assert all(special not in each[:-1] for each in ended)


@pytest.mark.parametrize("stop", ["ab", ["a", ""]])
def test_a_stop_string_that_is_none_is_refused(session, stop):
    with pytest.raises(OpError, match="stop: got"):
        ask(session.model, session.tokenizer, ["Hi"], Sampling(), stop=stop)


def test_an_answer_ends_with_the_templates_own_end(session):
    ends = {session.tokenizer.convert_ids_to_tokens(each) for each in stop_ids(session.tokenizer)}
    assert "<|im_end|>" in ends


def test_a_prompt_that_the_template_refuses_is_named(session):
    with pytest.raises(DataError, match="prompt 2: "):
        ask(session.model, session.tokenizer, ["Hi", [{"role": "user"}]], Sampling())
