"""What a model's own loss is made of decides how its loss is computed, and is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from tunesmith.nn.head_logps import Headless, split_head
from tunesmith.nn.own_loss import own_loss, trial_batch

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
BART = {
    "vocab_size": 97,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def make(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    made = getattr(transformers, f"{name}Config")(**config)
    model = transformers.AutoModelForCausalLM.from_config(made)
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize(
    "name", ["Llama", "Qwen2", "Mixtral"], ids=["llama", "qwen2", "experts that add nothing"]
)
def test_a_loss_of_next_tokens_alone_is_plain(name):
    model = make(name, **SIZES)
    assert own_loss(model).plain
    assert isinstance(split_head(model), Headless)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("Mixtral", {**EXPERTS, "router_aux_loss_coef": 0.5}),
        ("Mixtral", {**EXPERTS, "router_aux_loss_coef": 0.001}),
        ("Qwen2Moe", {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}),
        ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}),
        ("GraniteMoe", {**EXPERTS, "router_aux_loss_coef": 0.1}),
    ],
    ids=["mixtral", "mixtral, a thousandth", "qwen2 moe", "olmoe", "granite moe"],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_what_routers_cost_is_found_and_the_head_stays_on(name, config, adapted):
    model = make(name, **SIZES, **config)
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    own = own_loss(model)
    assert own.usable
    assert own.further
    assert "further terms" in own.text
    assert split_head(model) == own.text


@pytest.mark.parametrize("name", ["Bart", "MBart", "Pegasus", "BlenderbotSmall"])
def test_a_decoder_that_scores_tokens_against_their_own_place_is_trained_on_the_next(name):
    model = make(name, **BART)
    own = own_loss(model)
    assert not own.usable
    assert "its own place" in own.text
    assert isinstance(split_head(model), Headless)


class Smoothed(transformers.LlamaForCausalLM):
    """Another formula: labels smoothed by a tenth."""

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if labels is not None:
            output.loss = F.cross_entropy(
                output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
            )
        return output


def test_another_formula_is_left_to_the_model():
    model = Smoothed(transformers.LlamaConfig(**SIZES)).requires_grad_(False)
    own = own_loss(model)
    assert own.usable
    assert not own.further
    assert (
        split_head(model)
        == own.text
        == ("its own loss is another than the likelihood of the next tokens")
    )


def test_a_model_that_takes_no_labels_is_trained_on_the_next_tokens():
    class Silent(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Any, attention_mask: Any = None, use_cache: Any = None) -> Any:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    own = own_loss(Silent(transformers.LlamaConfig(**SIZES)))
    assert not own.usable
    assert own.plain


def test_a_prompt_of_the_adapter_is_no_further_term():
    model = make("Llama", **SIZES)
    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert own_loss(model).plain


def test_asking_leaves_the_model_and_the_random_numbers_as_they_were():
    model = make("Mixtral", **SIZES, **EXPERTS)
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    own_loss(model)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes


def test_the_trial_has_rows_of_other_lengths_and_labels():
    inputs, labels = trial_batch(make("Llama", **SIZES))
    counts = (labels != -100).sum(1)
    assert counts[0] != counts[1]
    assert inputs["attention_mask"].sum(1).tolist() == [8, 6]
    assert int(inputs["input_ids"].max()) < 97
