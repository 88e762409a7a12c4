"""Packing loses nothing, and packed samples are as if each were alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data.pack import (
    PackingCollator,
    PaddingCollator,
    PreferenceCollator,
    pack,
    packing_supported,
)
from tunesmith.data.render import IGNORE_INDEX, Rendered
from tunesmith.errors import DataError

VOCABULARY = 97
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**SMALL, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, head_dim=8, sliding_window=4),
    "phi": lambda: transformers.PhiConfig(**SMALL),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=4),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
DEAF = {
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4
    ),
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4
    ),
}


def model_of(make, attention="eager"):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make(), attn_implementation=attention)
    # larger weights than an initialisation's, so that what leaks shows
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model.eval()


def sample(length, seed, prompt=1):
    ids = torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))
    ids = ids.tolist()
    return Rendered(ids, [IGNORE_INDEX] * prompt + ids[prompt:])


def token_losses(logits, labels):
    """Loss of each label that is trained after the causal shift, in order."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).float(),
        labels[:, 1:].reshape(-1),
        reduction="none",
        ignore_index=IGNORE_INDEX,
    )
    return losses[labels[:, 1:].reshape(-1) != IGNORE_INDEX]


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        (name, attention)
        for name in CONFIGS
        for attention in ("eager", "sdpa")
        if (name, attention) != ("gemma2", "sdpa")  # transformers has no such Gemma 2
    ],
)
def test_packed_samples_get_the_logits_and_losses_they_get_alone(name, attention):
    model = model_of(CONFIGS[name], attention)
    samples = [sample(n, seed=n, prompt=p) for n, p in ((9, 3), (7, 0), (1, 0), (5, 2), (8, 0))]
    blocks = [samples[:3], samples[3:]]  # of different length: the second one is padded
    batch = PackingCollator(0)(blocks)
    with torch.no_grad():
        packed = model(**batch)
        alone = [model(torch.tensor([row.input_ids]), use_cache=False).logits for row in samples]

    found = [
        part
        for line, block in zip(packed.logits, blocks, strict=True)
        for part in line[: sum(map(len, block))].split([len(row) for row in block])
    ]
    for part, logits in zip(found, alone, strict=True):
        torch.testing.assert_close(part, logits[0], atol=1e-5, rtol=1e-5)

    expected = torch.cat(
        [
            token_losses(logits, torch.tensor([row.labels]))
            for row, logits in zip(samples, alone, strict=True)
        ]
    )
    torch.testing.assert_close(
        token_losses(packed.logits, batch["labels"]), expected, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(packed.loss, expected.mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_keeps_packed_samples_apart_is_supported_and_left_as_it_was(name):
    model = model_of(CONFIGS[name]).train()
    model.lm_head.eval()
    assert packing_supported(model) is None
    assert model.training
    assert not model.lm_head.training


def test_support_is_found_through_an_adapter_and_in_half_precision():
    import peft

    model = model_of(CONFIGS["llama"]).to(torch.bfloat16)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert packing_supported(adapted) is None


@pytest.mark.parametrize("name", DEAF)
def test_a_model_that_does_not_heed_positions_is_refused_with_the_reason(name):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(DEAF[name]())
    assert "position" in packing_supported(model)


def test_a_model_whose_attention_leaks_is_refused():
    model = model_of(CONFIGS["llama"])
    forward = model.forward

    def leaking(input_ids=None, position_ids=None, use_cache=None):
        return forward(input_ids=input_ids, position_ids=position_ids, use_cache=True)

    model.forward = leaking  # a cache switches transformers' detection of packing off
    assert "depends on the samples before it" in packing_supported(model)


def test_a_model_whose_positions_run_on_is_refused():
    model = model_of(CONFIGS["gpt2"])
    embed = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda ids: embed(torch.arange(ids.shape[1])[None])
    assert "do not start again" in packing_supported(model)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=60))
def test_packing_loses_no_row_and_cuts_none(lengths):
    rows = [Rendered([number] * n, [number] * n) for number, n in enumerate(lengths)]
    blocks = pack(rows, 40)
    packed = [row for block in blocks for row in block]
    assert sorted(packed, key=lambda row: row.input_ids[0]) == rows
    assert all(0 < sum(map(len, block)) <= 40 for block in blocks)
    assert blocks == pack(rows, 40)
    # of any two blocks of best fit, the rows of one do not all fit into the other's room
    assert len(blocks) <= 1 + 2 * sum(lengths) / 40


def test_packing_fills_blocks_with_what_fits_best():
    rows = [Rendered([n] * n, [n] * n) for n in (3, 5, 7, 5, 10)]
    assert [[len(row) for row in block] for block in pack(rows, 10)] == [[10], [7, 3], [5, 5]]


def test_a_row_longer_than_a_block_is_refused():
    with pytest.raises(DataError, match="row 2 has 9 tokens; expected at most max_length=8"):
        pack([sample(3, 0), sample(9, 0)], 8)


def test_the_first_token_of_a_packed_sample_is_a_label_of_nothing():
    block = [Rendered([5, 6, 7], [5, 6, 7]), Rendered([8, 9], [8, 9])]
    batch = PackingCollator(0)([block])
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert "attention_mask" not in batch
    assert batch["use_cache"] is False


def test_padding_goes_by_length_and_never_by_id():
    rows = [{"input_ids": [5, 2, 6, 2], "labels": [-100, -100, 6, 2]}, Rendered([7, 2], [-100, 2])]
    batch = PaddingCollator(pad_token_id=2)(rows)
    assert batch["input_ids"].tolist() == [[5, 2, 6, 2], [7, 2, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 6, 2], [-100, 2, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_batch_of_pairs_holds_all_chosen_then_all_rejected():
    rows = [
        {
            "chosen": sample(4, 1),
            "rejected": sample(6, 2),
            "reference_chosen_logps": -1.5,
            "reference_rejected_logps": -2.5,
        },
        {
            "chosen": sample(5, 3),
            "rejected": sample(3, 4),
            "reference_chosen_logps": -3.5,
            "reference_rejected_logps": -4.5,
        },
    ]
    batch = PreferenceCollator(0)(rows)
    assert batch["input_ids"].shape == (4, 6)
    assert batch["attention_mask"].sum(dim=1).tolist() == [4, 5, 6, 3]
    assert batch["input_ids"][1, :5].tolist() == list(rows[1]["chosen"].input_ids)
    assert batch["input_ids"][2].tolist() == list(rows[0]["rejected"].input_ids)
    assert batch["reference_chosen_logps"].tolist() == [-1.5, -3.5]
    assert batch["reference_rejected_logps"].dtype == torch.float32


def test_pairs_without_reference_make_a_batch_without_it():
    batch = PreferenceCollator(0)([{"chosen": sample(4, 1), "rejected": sample(6, 2)}])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
