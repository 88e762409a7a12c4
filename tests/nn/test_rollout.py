"""Rollouts: the tokens are those of the model, and so are their log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tools.architectures.families import tiny_config
from tunesmith.errors import OpError
from tunesmith.nn import decoder, rollout
from tunesmith.nn.head_logps import Headless, split_head
from tunesmith.nn.rollout import Sampling, roll_out, token_logps
from tunesmith.ops import native_status
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


FAMILIES = [
    "llama",
    "gpt2",
    "opt",
    "mamba",
    "mixtral",
    "recurrent_gemma",
    "roberta",  # decoded with other positions than it was trained with
    "whisper",  # padding moves its positions
]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_any_length_are_decoded_as_each_alone(family: str) -> None:
    check(make(family))


def test_a_model_that_takes_no_padding_is_decoded_by_length() -> None:
    model = make("llama")
    rollout._TRIED[model] = rollout._Tried(cached=True, padded=False)
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


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_new_tokens=9, temperature=1.5)])
def test_a_models_own_generation_config_changes_nothing(sampling: Sampling) -> None:
    model = make("llama")
    expected = roll_out(model, PROMPTS, sampling, stop_ids=[], pad_id=PAD, seed=0)
    assert expected.completion_ids.shape == (4, 9)
    assert expected.completion_mask.all()
    assert expected.finish_reasons == ("length",) * 4
    first = expected.completion_ids[0].tolist()
    own = model.generation_config
    own.repetition_penalty, own.suppress_tokens, own.eos_token_id = 5.0, first[:1], first[2]
    own.do_sample, own.temperature, own.top_k = True, 0.1, 1
    own.return_dict_in_generate = True
    before = own.to_dict()
    found = roll_out(model, PROMPTS, sampling, stop_ids=[], pad_id=PAD, seed=0)
    assert found.completions() == expected.completions()
    assert found.finish_reasons == ("length",) * 4
    assert model.generation_config is own
    assert own.to_dict() == before


def test_a_rows_tokens_do_not_depend_on_who_is_beside_it() -> None:
    model = make("llama")
    sampling = Sampling(max_new_tokens=8, temperature=1.2, top_k=100)
    options = {"stop_ids": STOP, "pad_id": PAD, "seed": 7, "logps": False}
    said = roll_out(model, PROMPTS, sampling, **options).completions()
    assert roll_out(model, PROMPTS[::-1], sampling, **options).completions() == said[::-1]
    assert roll_out(model, PROMPTS[1:3], sampling, **options).completions() == said[1:3]
    assert roll_out(model, PROMPTS, sampling, batch_size=1, **options).completions() == said
    twice = roll_out(model, PROMPTS, sampling, samples=2, **options).completions()
    assert twice[::2] == said
    listed = [prompt for prompt in PROMPTS for _ in range(2)]
    assert roll_out(model, listed, sampling, **options).completions() == twice
    assert twice[0] != twice[1]


def test_random_numbers_come_from_where_they_are_said_to() -> None:
    model = make("llama")
    sampling = Sampling(max_new_tokens=8)
    options = {"stop_ids": STOP, "pad_id": PAD, "logps": False}

    def of_generator() -> list[list[list[int]]]:
        drawn = torch.Generator().manual_seed(3)
        return [
            roll_out(model, PROMPTS, sampling, seed=drawn, **options).completions()
            for _ in range(2)
        ]

    first, second = of_generator()
    assert [first, second] == of_generator()
    assert first != second

    def of_torch() -> list[list[int]]:
        torch.manual_seed(4)
        return roll_out(model, PROMPTS, sampling, **options).completions()

    assert of_torch() == of_torch()
    state = torch.get_rng_state()
    roll_out(model, PROMPTS, GREEDY, **options)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=6, temperature=0.6),
        Sampling(max_new_tokens=6, top_k=5),
        Sampling(max_new_tokens=6, temperature=1.3, top_p=0.6, repetition_penalty=2),
    ],
    ids=["temperature", "top_k", "all"],
)
def test_the_chance_of_being_drawn_is_that_of_the_sampling(sampling: Sampling) -> None:
    model = make("gpt2")
    found = roll_out(
        model, PROMPTS, sampling, stop_ids=STOP, pad_id=PAD, seed=2, sampled_logps=True, samples=2
    )
    assert found.sampled_logps.dtype == torch.float32
    assert found.sampled_logps.shape == found.completion_ids.shape
    for number, (prompt, said) in enumerate(zip(found.prompts, found.completions(), strict=True)):
        ids, expected, plain = list(prompt), [], []
        for token in said:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            plain.append(float(logits.log_softmax(-1)[token]))
            seen = torch.tensor(sorted(set(ids)))
            penalty = sampling.repetition_penalty
            was = logits[seen]
            logits[seen] = torch.where(was > 0, was / penalty, was * penalty)
            logits /= sampling.temperature
            if sampling.top_k:
                logits[logits < logits.topk(sampling.top_k).values[-1]] = -torch.inf
            chances, order = logits.softmax(-1).sort(descending=True)
            logits[order[chances.cumsum(-1) - chances >= sampling.top_p]] = -torch.inf
            expected.append(float(logits.log_softmax(-1)[token]))
            ids.append(token)
        row = found.sampled_logps[number]
        torch.testing.assert_close(row[: len(said)], torch.tensor(expected), rtol=1e-4, atol=1e-4)
        assert not row[len(said) :].any()
        torch.testing.assert_close(
            found.logps[number, : len(said)], torch.tensor(plain), rtol=1e-4, atol=1e-4
        )
    greedy = roll_out(model, PROMPTS, GREEDY, stop_ids=STOP, pad_id=PAD, sampled_logps=True)
    assert not greedy.sampled_logps.any()


def test_a_penalty_does_not_fall_on_padding() -> None:
    model = make("llama")
    sampling = Sampling(max_new_tokens=9, temperature=0, repetition_penalty=4.0)
    plain = roll_out(model, PROMPTS, GREEDY, stop_ids=[], pad_id=PAD, logps=False)
    pad = plain.completions()[0][0]  # a token that would be said
    options = {"stop_ids": [], "pad_id": pad, "logps": False}
    together = roll_out(model, PROMPTS, sampling, **options).completions()
    alone = [roll_out(model, [each], sampling, **options).completions()[0] for each in PROMPTS]
    assert together == alone
    assert together[0][0] == pad
    assert together != plain.completions()


def test_a_row_ends_where_it_is_told_to_and_no_sooner_than_allowed() -> None:
    model = make("llama")
    free = roll_out(model, PROMPTS, GREEDY, stop_ids=[], pad_id=PAD).completions()
    asked = []

    def stops(ids: list[int]) -> bool:
        asked.append(tuple(ids))
        return ids == free[1][: len(ids)] and len(ids) >= 4

    options = {"stop_ids": [free[0][1]], "pad_id": PAD, "stops": stops}
    found = roll_out(model, PROMPTS, GREEDY, **options)
    for said, whole in zip(found.completions(), free, strict=True):
        assert said == whole[: len(said)]
    assert found.completions()[0] == free[0][: free[0].index(free[0][1]) + 1]
    assert len(found.completions()[1]) <= 4
    assert found.finish_reasons[:2] == ("stop", "stop")
    assert all(found.finish_reasons[at] == "length" for at in (2, 3) if len(free[at]) == 9)
    assert max(map(len, asked)) <= 9
    least = Sampling(max_new_tokens=9, temperature=0, min_new_tokens=6)
    found = roll_out(model, PROMPTS, least, **options)
    assert min(map(len, found.completions())) >= 6


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(max_new_tokens=9, temperature=0.9)])
def test_native_decoding_says_the_same(
    sampling: Sampling,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = adapted("lora on nf4", tmp_path)
    caplog.set_level("DEBUG", logger="tunesmith")
    options = {"stop_ids": STOP, "pad_id": PAD, "seed": 0, "samples": 2, "sampled_logps": True}
    ours = roll_out(model, PROMPTS, sampling, **options)
    if native_status().why_slow_on("cpu") is None:
        assert "layer by layer" in caplog.text
        assert "as transformers" not in caplog.text
    monkeypatch.setattr(decoder, "_why_not", lambda *_: "this test asks for it")
    theirs = roll_out(model, PROMPTS, sampling, **options)
    assert "as transformers does it (this test asks for it)" in caplog.text
    assert ours.completions() == theirs.completions()
    torch.testing.assert_close(ours.sampled_logps, theirs.sampled_logps, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours.logps, theirs.logps, rtol=0, atol=0)


def test_rows_of_other_lengths_take_one_pass_a_token() -> None:
    model = make("gpt2")
    shapes = []
    model.register_forward_pre_hook(
        lambda _, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    prompts = [[7 + k] * (k + 1) for k in range(8)]
    roll_out(model, prompts, GREEDY, stop_ids=[], pad_id=PAD, logps=False)  # looks at the model
    shapes.clear()
    roll_out(model, prompts, GREEDY, stop_ids=[], pad_id=PAD, logps=False)
    assert shapes == [(8, 8)] + [(8, 1)] * 8


def test_logits_are_bounded_and_the_numbers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    said = [[7, 8], [9], [], [6, 4, 5, 3]]
    calls = []
    model.register_forward_hook(lambda _, args, out: calls.append(out.logits.shape[:2].numel()))
    with torch.no_grad():
        whole = token_logps(model, PROMPTS, said, pad_id=PAD)
        assert calls == [4 * 8]
        calls.clear()
        monkeypatch.setattr(rollout, "LOGITS_BYTES", 4 * 271 * 14)
        parted = token_logps(model, PROMPTS, said, pad_id=PAD)
    assert len(calls) > 1
    assert max(calls) <= 14
    torch.testing.assert_close(parted, whole)
    calls.clear()
    token_logps(model, PROMPTS, said, pad_id=PAD)  # with gradients all is held anyway
    assert calls == [4 * 8]


def test_a_model_without_its_head_gives_the_same_log_probabilities() -> None:
    model = make("llama").requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    headless = split_head(model)
    assert isinstance(headless, Headless)
    said = [[7, 8], [9], [], [6, 4, 5, 3]]
    grads = []
    for each in (model, headless):
        model.zero_grad()
        logps = token_logps(each, PROMPTS, said, pad_id=PAD)
        (logps * torch.arange(16.0).view(4, 4)).sum().backward()
        grads.append((logps.detach(), model.model.layers[0].self_attn.q_proj.weight.grad))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_what_training_has_set_stays_set(tmp_path: Any) -> None:
    model = adapted("lora", tmp_path)
    expected = roll_out(model, PROMPTS, GREEDY, stop_ids=STOP, pad_id=PAD)
    model.gradient_checkpointing_enable()
    model.train()
    model.config.use_cache = False
    asked = {name: each.requires_grad for name, each in model.named_parameters()}
    assert True in asked.values()
    found = roll_out(model, PROMPTS, GREEDY, stop_ids=STOP, pad_id=PAD)
    assert not found.logps.requires_grad
    assert torch.is_grad_enabled()
    assert asked == {name: each.requires_grad for name, each in model.named_parameters()}
    assert model.is_gradient_checkpointing
    assert all(module.training for module in model.modules())
    assert model.config.use_cache is False
    assert found.completions() == expected.completions()


def test_a_distributed_model_is_asked_for_its_own(tmp_path: Any) -> None:
    model = make("llama")
    expected = roll_out(model, PROMPTS, GREEDY, stop_ids=STOP, pad_id=PAD)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        found = roll_out(wrapped, PROMPTS, GREEDY, stop_ids=STOP, pad_id=PAD)
        with torch.no_grad():
            logps = token_logps(wrapped, PROMPTS, found.completions(), pad_id=PAD)
    finally:
        torch.distributed.destroy_process_group()
    assert found.completions() == expected.completions()
    torch.testing.assert_close(logps, expected.logps)


def test_no_prompts_make_no_rows() -> None:
    found = roll_out(make("llama"), [], Sampling(), stop_ids=STOP, pad_id=PAD, sampled_logps=True)
    assert found.completions() == []
    assert found.completion_ids.dtype == torch.int64
    assert found.completion_mask.dtype == found.finished.dtype == torch.bool
    assert found.logps.dtype == found.sampled_logps.dtype == torch.float32
    assert found.finish_reasons == ()


def test_a_prompt_beyond_a_models_positions_is_refused_by_its_number() -> None:
    model = make("gpt2")  # 256 positions
    edge = Sampling(max_new_tokens=7, temperature=0)
    prompts = [[5], [5] * 250]
    found = roll_out(model, prompts, edge, stop_ids=[], pad_id=PAD, logps=False)
    assert found.completion_ids.shape == (2, 7)
    with pytest.raises(OpError, match=r"prompt 2 has 250 tokens .* ask for 7 new tokens or less"):
        roll_out(model, prompts, GREEDY, stop_ids=[], pad_id=PAD)
    with pytest.raises(OpError, match="prompt 1 has 300 tokens, and the model has 256 positions"):
        roll_out(model, [[5] * 300], GREEDY, stop_ids=[], pad_id=PAD)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -1}, "temperature: got -1"),
        ({"top_p": 0}, "top_p: got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"repetition_penalty": 0}, "repetition_penalty: got 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens: got 9"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OpError, match=said):
        Sampling(**options)


@pytest.mark.parametrize("name", ["samples", "batch_size"])
def test_numbers_of_rows_that_make_no_sense_are_refused(name: str) -> None:
    options = {"stop_ids": [], "pad_id": PAD, name: 0}
    with pytest.raises(OpError, match=f"{name}: got 0; expected 1 or more"):
        roll_out(make("llama"), PROMPTS, GREEDY, **options)


def test_an_empty_prompt_is_refused_by_its_number() -> None:
    with pytest.raises(OpError, match="prompt 2 has no tokens"):
        roll_out(make("llama"), [[1], []], GREEDY, stop_ids=[], pad_id=PAD, samples=2)
