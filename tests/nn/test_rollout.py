"""Rollouts: the tokens are those of the model, and so are their log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tools.architectures.families import tiny_config
from tunesmith.errors import OpError
from tunesmith.nn import rollout
from tunesmith.nn.rollout import Sampling, roll_out, token_logps
from tunesmith.testing.conformance import _NF4, _LoRA, _shake
from tunesmith.testing.tiny import tiny_llama

PROMPTS = [[5, 9, 17], [33, 2, 8, 40, 7, 11], [21], [60, 61, 62, 63]]
PAD, STOP = 0, [3, 4]
TOKENS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
GREEDY = Sampling(max_new_tokens=9, temperature=0)

pytestmark = pytest.mark.filterwarnings("ignore")


def make(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family)).eval()


def adapted(kind: str, tmp_path: Any) -> Any:
    tiny_llama(tmp_path / "base")
    cpu = torch.device("cpu")
    if kind == "lora on nf4":
        base = _NF4().load(tmp_path / "base", dtype=torch.float32, device=cpu)
    else:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if kind == "prompt tuning":
        model = get_peft_model(base, PromptTuningConfig(**TOKENS))
    elif kind == "prefix tuning":
        model = get_peft_model(base, PrefixTuningConfig(**TOKENS))
    else:
        model = _LoRA(None).wrap(base)
    _shake(model)
    return model.eval()


def one_by_one(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Take the likeliest token each time, reading everything anew: no cache, no padding."""
    ids, found = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float()
            ids.append(int(logits.argmax()))
            found.append(float(logits.log_softmax(-1)[ids[-1]]))
            if ids[-1] in STOP:
                break
    return ids[len(prompt) :], found


def check(model: Any) -> None:
    found = roll_out(model, PROMPTS, GREEDY, stop_ids=STOP, pad_id=PAD)
    for number, (prompt, said) in enumerate(zip(PROMPTS, found.completions(), strict=True)):
        expected, logps = one_by_one(model, prompt, GREEDY.max_new_tokens)
        assert said == expected
        torch.testing.assert_close(
            found.logps[number, : len(said)], torch.tensor(logps), rtol=1e-4, atol=1e-4
        )
        assert not found.logps[number, len(said) :].any()
        assert bool(found.finished[number]) == (said[-1] in STOP)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mamba", "mixtral", "recurrent_gemma"])
def test_rows_of_any_length_are_decoded_as_each_alone(family: str) -> None:
    check(make(family))


def test_a_model_that_takes_no_padding_is_decoded_by_length() -> None:
    model = make("llama")
    rollout._PADDED[model] = False
    calls = []
    stock = model.generate
    model.generate = lambda **options: calls.append(options) or stock(**options)
    check(model)
    assert [tuple(each["input_ids"].shape) for each in calls] == [(1, 1), (1, 3), (1, 4), (1, 6)]


@pytest.mark.parametrize("kind", ["lora", "lora on nf4", "prompt tuning", "prefix tuning"])
def test_adapters_speak(kind: str, tmp_path: Any) -> None:
    model = adapted(kind, tmp_path)
    check(model)
    base = model.get_base_model()
    if kind.endswith("tuning"):  # what stands before the prompt changes what is said
        bare = roll_out(base, PROMPTS, GREEDY, stop_ids=STOP, pad_id=PAD)
        ours = roll_out(model, PROMPTS, GREEDY, stop_ids=STOP, pad_id=PAD)
        assert bare.completions() != ours.completions()


def test_sampled_rows_come_again_with_their_seed_and_disturb_nobody() -> None:
    model = make("llama")
    sampling = Sampling(max_new_tokens=6, temperature=0.9, top_p=0.95, top_k=50)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    options = {"stop_ids": STOP, "pad_id": PAD, "samples": 3}
    one = roll_out(model, PROMPTS, sampling, seed=1, **options)
    assert torch.rand(1) == expected
    again = roll_out(model, PROMPTS, sampling, seed=1, **options)
    other = roll_out(model, PROMPTS, sampling, seed=2, **options)
    assert len(one.prompts) == len(one.completions()) == 12
    assert one.prompts[:3] == (tuple(PROMPTS[0]),) * 3
    assert one.completions() == again.completions() != other.completions()
    assert len({tuple(each) for each in one.completions()[:3]}) > 1
    torch.testing.assert_close(one.logps, again.logps, rtol=0, atol=0)
    # whatever the sampling, log-probabilities are the model's
    ids = torch.tensor([[*one.prompts[4], *one.completions()[4]]])
    with torch.no_grad():
        full = model(input_ids=ids).logits[0].float().log_softmax(-1)
    said = one.completions()[4]
    start = len(one.prompts[4]) - 1
    expected = torch.stack([full[start + at, token] for at, token in enumerate(said)])
    torch.testing.assert_close(one.logps[4, : len(said)], expected, rtol=1e-4, atol=1e-4)


def test_the_chances_are_those_of_the_sampling() -> None:
    model = make("llama")
    sampling = Sampling(max_new_tokens=1, temperature=0.5, top_k=3)
    found = roll_out(
        model, [[5, 9, 17]], sampling, stop_ids=[], pad_id=PAD, samples=2000, seed=0, logps=False
    )
    assert found.logps is None
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 9, 17]])).logits[0, -1].float() / 0.5
    best = logits.topk(3)
    chances = best.values.softmax(-1)
    counts = [(found.completion_ids[:, 0] == token).sum() / 2000 for token in best.indices]
    torch.testing.assert_close(torch.stack(counts), chances, rtol=0, atol=0.04)


def test_a_model_is_left_as_it_was_and_gradients_flow_where_they_are_asked_for() -> None:
    model = make("opt").train()
    model.model.decoder.layers[0].eval()
    roll_out(model, PROMPTS, GREEDY, stop_ids=STOP, pad_id=PAD)
    assert model.training
    assert not model.model.decoder.layers[0].training
    assert model.model.decoder.layers[1].training
    assert all(weight.grad is None for weight in model.parameters())
    logps = token_logps(model.eval(), PROMPTS, [[7, 8], [9], [1, 2, 5], [6]], pad_id=PAD)
    assert logps.shape == (4, 3)
    assert not logps[1, 1:].any()
    logps.sum().backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -1}, "temperature: got -1"),
        ({"top_p": 0}, "top_p: got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"repetition_penalty": 0}, "repetition_penalty: got 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OpError, match=said):
        Sampling(**options)


def test_an_empty_prompt_is_refused_by_its_number() -> None:
    with pytest.raises(OpError, match="prompt 2 has no tokens"):
        roll_out(make("llama"), [[1], []], GREEDY, stop_ids=[], pad_id=PAD, samples=2)
