"""The loss from hidden states is the loss from logits, for any model that it takes apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.errors import OpError
from tunesmith.nn import head_logps as module
from tunesmith.nn.head_logps import Headless, head_logps, split_head

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": SIZES,
    "Mistral": SIZES,
    "Qwen2": SIZES,
    "Qwen3": {**SIZES, "head_dim": 8},
    "Gemma": {**SIZES, "head_dim": 8},
    "Phi3": SIZES,
    "GPT2": {**GPT2, "tie_word_embeddings": True},
}


def make_model(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**ARCHITECTURES.get(name, SIZES), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    return model.requires_grad_(False).eval()


def inputs_of(rows: int = 3, length: int = 11) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 7:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels


def from_logits(model: Any, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    wanted = labels[:, 1:] != -100
    return -F.cross_entropy(logits[wanted].float(), labels[:, 1:][wanted], reduction="none")


@pytest.mark.parametrize("tokens", [0, 1, 5, 32, 64, 75])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_log_softmax(
    tokens: int, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * VOCABULARY * 39)  # of 32 tokens
    torch.manual_seed(0)
    hidden, weight = torch.randn(tokens, 16), torch.randn(VOCABULARY, 16)
    bias = torch.randn(VOCABULARY) if with_bias else None
    labels, grad = torch.randint(VOCABULARY, (tokens,)), torch.randn(tokens)
    ours = hidden.clone().requires_grad_()
    got = head_logps(ours, weight, labels, bias)
    wide = hidden.double().requires_grad_()
    logits = F.linear(wide, weight.double(), None if bias is None else bias.double())
    expected = logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    got.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(ours.grad.double(), wide.grad, rtol=1e-5, atol=1e-5)


def test_bf16_is_as_near_as_bf16_logits_are() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 64).bfloat16(), (torch.randn(500, 64) / 8).bfloat16()
    labels = torch.randint(500, (40,))
    ours, stock = (hidden.clone().requires_grad_() for _ in range(2))
    got = head_logps(ours, weight, labels)
    expected = -F.cross_entropy(F.linear(stock, weight).float(), labels, reduction="none")
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    expected.sum().backward()
    right = hidden.double().requires_grad_()
    F.cross_entropy(right @ weight.double().T, labels, reduction="sum").neg().backward()
    assert (ours.grad - right.grad).norm() <= 1.1 * (stock.grad - right.grad).norm()


class Largest(TorchDispatchMode):
    """Notes the largest tensor that anything returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple) else (out,):
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // 4)
        return out


def test_the_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 1000 * 16)
    hidden, weight = torch.randn(200, 8, requires_grad=True), torch.randn(1000, 8)
    labels = torch.randint(1000, (200,))
    with Largest() as ours:
        head_logps(hidden, weight, labels).sum().backward()
    assert 16 * 1000 <= ours.elements < 17 * 1000
    with Largest() as stock:
        F.cross_entropy(hidden @ weight.T, labels).backward()
    assert stock.elements >= 200 * 1000


def test_a_trained_head_is_refused() -> None:
    weight = torch.randn(5, 4, requires_grad=True)
    with pytest.raises(OpError, match="head whose weight requires a gradient"):
        head_logps(torch.randn(2, 4), weight, torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_of_any_architecture_is_taken_apart(name: str) -> None:
    model = make_model(name)
    headless = split_head(model)
    assert isinstance(headless, Headless), headless
    inputs, labels = inputs_of()
    logps, wanted = headless.token_logps(inputs, labels)
    assert torch.equal(wanted, labels[:, 1:] != -100)
    torch.testing.assert_close(logps, from_logits(model, inputs, labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_adapters_get_the_same_gradients(name: str) -> None:
    model = make_model(name)
    names = {"Llama": ["q_proj", "down_proj"], "GPT2": ["c_attn"]}[name]
    config = LoraConfig(r=4, target_modules=names, fan_in_fan_out=name == "GPT2")
    model = get_peft_model(model, config)
    for each, parameter in model.named_parameters():
        if "lora_B" in each:
            torch.nn.init.normal_(parameter, std=0.1)
    headless = split_head(model)
    assert isinstance(headless, Headless), headless
    inputs, labels = inputs_of()
    trained = [each for each in model.parameters() if each.requires_grad]
    ours = torch.autograd.grad(headless.token_logps(inputs, labels)[0].mean(), trained)
    stock = torch.autograd.grad(from_logits(model, inputs, labels).mean(), trained)
    for mine, theirs in zip(ours, stock, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_trying_it_out_leaves_the_model_as_it_was() -> None:
    model = make_model("Llama").train()
    model.model.layers[0].eval()
    before = [each.training for each in model.modules()]
    assert isinstance(split_head(model), Headless)
    assert [each.training for each in model.modules()] == before


def test_a_model_that_does_more_to_its_logits_is_left_whole() -> None:
    reason = split_head(make_model("Gemma2", head_dim=8, final_logit_softcapping=5.0))
    assert isinstance(reason, str)
    assert "not what its head makes of its hidden states" in reason
    scaled = make_model("Granite", logits_scaling=3.0)
    assert "not what its head makes" in str(split_head(scaled))


def test_a_trained_or_hooked_head_is_left_whole() -> None:
    model = make_model("Llama")
    model.lm_head.weight.requires_grad_(True)
    assert split_head(model) == "its head is trained"
    model = make_model("Llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    assert split_head(model) == "something hooks into its forward pass"
