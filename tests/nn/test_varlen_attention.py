"""Attention sample by sample gives what it gives under a mask, and steps back where it cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_sizes import SIZES
from torch import Tensor
from transformers import (
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from tunesmith.data.pack import PackingCollator, PaddingCollator
from tunesmith.nn import varlen_attention
from tunesmith.nn.varlen_attention import NAME, segments_of, use
from tunesmith.ops import attention as op
from tunesmith.ops import native_status

pytestmark = pytest.mark.skipif(
    native_status().isa in ("", "scalar"), reason="there are no vector kernels on this machine"
)

_NO_GROUPS = {**SIZES, "num_key_value_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "phi": PhiConfig(**_NO_GROUPS),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}
ROWS = [
    {"input_ids": [(7 * k + s) % 64 for k in range(length)], "labels": list(range(length))}
    for s, length in enumerate((11, 5, 17, 3, 8))
]


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    for part in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, part):
            setattr(config, part, 0.0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(**{"use_cache": False, **batch}).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many segments each call of the op was given."""
    seen: list[int] = []
    real = op.attention

    def counted(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float) -> Tensor:
        seen.append(len(segments))
        return real(q, k, v, segments, scale)

    monkeypatch.setattr(varlen_attention, "attention", counted)
    return seen


BATCHES = {
    "packed": PackingCollator(0)([ROWS[:3], ROWS[3:]]),
    "padded": PaddingCollator(0)(ROWS[:3]),
    "one length": PaddingCollator(0)([ROWS[0], ROWS[0]]),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_under_a_mask(name: str, batch: str, calls: list[int]) -> None:
    model = model_of(name)
    loss, gradients = loss_and_gradients(model, BATCHES[batch])
    assert use(model) is None
    ours, ours_gradients = loss_and_gradients(model, BATCHES[batch])
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    for a, b in zip(ours_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    windowed = name == "mistral"  # some row is longer than its window
    assert bool(calls) != windowed


def test_packed_samples_and_padding_are_runs_of_their_own(calls: list[int]) -> None:
    model = model_of("llama")
    use(model)
    loss_and_gradients(model, BATCHES["packed"])
    assert calls == [3 + 2 + 1] * 2  # and what pads the second block
    calls.clear()
    loss_and_gradients(model, BATCHES["padded"])
    assert calls == [2 + 2 + 1] * 2  # two rows are padded


def test_under_autocast_it_is_the_models_own_and_no_error(calls: list[int]) -> None:
    model = model_of("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = loss_and_gradients(model, BATCHES["packed"])
        assert use(model) is None
        # the rotary embedding is in fp32 and turns queries and keys into that, but no values
        ours, ours_gradients = loss_and_gradients(model, BATCHES["packed"])
    assert not calls
    torch.testing.assert_close(ours, loss, rtol=0, atol=0)
    for a, b in zip(ours_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_generating_is_left_to_torch(calls: list[int]) -> None:
    model = model_of("llama").eval()
    prompt = torch.tensor([[1, 2, 3]])
    before = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    use(model)
    after = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(before, after)
    assert not calls


def test_what_is_not_torchs_attention_is_left_alone() -> None:
    model = AutoModelForCausalLM.from_config(
        Gemma2Config(**SIZES, head_dim=8), attn_implementation="eager"
    )
    assert "'eager'" in str(use(model))
    assert model.config._attn_implementation != NAME


def test_a_mask_of_anything_else_has_no_runs() -> None:
    at = torch.arange(6)
    causal = at[:, None] >= at
    assert segments_of(causal[None, None], 2) is not None
    window = causal & (at[:, None] - at < 3)
    assert segments_of(window[None, None], 1) is None
    holes = causal.clone()
    holes[5, 2] = False
    assert segments_of(holes[None, None], 1) is None
    blind = causal.clone()
    blind[3] = False
    assert segments_of(blind[None, None], 1) is None
    assert segments_of(causal[None, None].float(), 1) is None
    assert segments_of(causal[None, None, :3], 1) is None


def plain_varlen(
    q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, of_keys: Tensor, *longest: int, **how: Any
) -> Tensor:
    """Do what torch's varlen_attn does on CUDA, one sample after another."""
    assert offsets is of_keys
    assert offsets.dtype == torch.int32
    assert how.pop("window_size") == (-1, 0)
    lengths = offsets.diff().tolist()
    assert set(longest) == {max(lengths)}
    parts = (tensor.split(lengths) for tensor in (q, k, v))
    return torch.cat(
        [
            torch.nn.functional.scaled_dot_product_attention(
                *(part.transpose(0, 1) for part in sample), is_causal=True, **how
            ).transpose(0, 1)
            for sample in zip(*parts, strict=True)
        ]
    )


@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_by_offsets_is_attention_under_a_mask(key_heads: int) -> None:
    sample = torch.tensor([[0] * 5 + [1] * 9 + [2] * 2, [3] * 1 + [4] * 15])
    mask = ((sample[:, :, None] == sample[:, None]).tril())[:, None]
    offsets, longest = varlen_attention._find_offsets(mask, 2)
    assert offsets.tolist() == [0, 5, 14, 16, 17, 32]
    torch.manual_seed(0)
    shapes = ((2, 16, 4, 8), (2, 16, key_heads, 8), (2, 16, key_heads, 8))
    q, k, v = (torch.randn(shape) for shape in shapes)
    ours = varlen_attention._attend_by_offsets(q, k, v, offsets, longest, 0.3, plain_varlen)
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_mask_of_anything_else_has_no_offsets() -> None:
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    assert varlen_attention._find_offsets(causal, 2)[0].tolist() == [0, 6, 12]
    padded = causal.clone()
    padded[..., 4:] = False  # two tokens at the end are padding
    window = causal & ~causal.tril(-3)
    whole = torch.ones_like(causal)
    for mask in (padded, window, whole):
        assert varlen_attention._find_offsets(mask, 1) is None


def test_torchs_attention_for_samples_is_taken_only_where_it_gives_the_same() -> None:
    cpu = torch.device("cpu")
    assert varlen_attention._agrees(cpu, plain_varlen)

    def off(*args: Any, **how: Any) -> Tensor:
        return plain_varlen(*args, **{**how, "scale": how["scale"] * 1.5})

    def missing(*args: Any) -> Tensor:
        return plain_varlen(*args)

    assert not varlen_attention._agrees(cpu, off)
    assert not varlen_attention._agrees(cpu, missing)
