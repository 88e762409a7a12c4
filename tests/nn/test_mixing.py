"""A mixed adapter's update is the weighted sum of the updates that stock PEFT computes."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer

from tunesmith.errors import ModelError
from tunesmith.nn.mixing import mix_loras

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def model(kind: str = "llama"):
    torch.manual_seed(0)
    if kind == "mixtral":
        config = transformers.MixtralConfig(
            **SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
        )
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=64
        )
    else:
        config = transformers.LlamaConfig(**SIZES)
    return transformers.AutoModelForCausalLM.from_config(config)


def adapter(place, kind: str = "llama", seed: int = 1, **options):
    """Save a LoRA whose matrices are both random."""
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options},
        task_type="CAUSAL_LM",
    )
    wrapped = peft.get_peft_model(model(kind), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2)
    wrapped.save_pretrained(place)
    return place


def updates(place, kind: str = "llama"):
    """Return the update of each weight, as PEFT computes it."""
    wrapped = peft.PeftModel.from_pretrained(model(kind), place)
    found = {}
    for name, module in wrapped.named_modules():
        if isinstance(module, LoraLayer) and "default" in module.scaling:
            key = name.replace(".base_layer", "") + getattr(module, "parameter_name", "")
            found[key] = module.get_delta_weight("default").detach()
    return found


CASES = {
    "as it is": ("llama", {}, {}),
    "of other ranks": ("llama", {"r": 2, "lora_alpha": 3}, {"r": 8}),
    "of other layers": ("llama", {"target_modules": ["up_proj"]}, {"target_modules": ["o_proj"]}),
    "rank-stabilized": ("llama", {"use_rslora": True}, {"r": 3}),
    "by patterns": (
        "llama",
        {
            "rank_pattern": {"layers.0.self_attn.q_proj": 6},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 5},
        },
        {},
    ),
    "on an embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, {}),
    "on a Conv1D": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    "on experts": (
        "mixtral",
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"r": 2, "target_parameters": ["mlp.experts.down_proj"]},
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_the_update_is_the_weighted_sum(tmp_path, case):
    kind, one, other = CASES[case]
    first = adapter(tmp_path / "a", kind, 1, **one)
    second = adapter(tmp_path / "b", kind, 2, **other)
    mix_loras([(first, 0.7), (second, -0.4)], tmp_path / "mixed", rank=None)
    wanted, also, got = (updates(tmp_path / name, kind) for name in ("a", "b", "mixed"))
    assert got.keys() == wanted.keys() | also.keys()
    for name, update in got.items():
        zero = torch.zeros_like(update)
        expected = 0.7 * wanted.get(name, zero) - 0.4 * also.get(name, zero)
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rslora", [False, True])
def test_one_at_weight_one_is_itself(tmp_path, rslora):
    place = adapter(tmp_path / "a", use_rslora=rslora)
    mix_loras([(place, 1.0)], tmp_path / "mixed", rank=None)
    ids = torch.arange(1, 25)[None]
    logits = [
        peft.PeftModel.from_pretrained(model(), each)(ids).logits
        for each in (place, tmp_path / "mixed")
    ]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-6)
    assert (logits[0] - model()(ids).logits).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["as it is", "on experts"])
def test_a_cut_is_the_nearest_of_its_rank(tmp_path, case):
    kind, one, other = CASES[case]
    places = [adapter(tmp_path / "a", kind, 1, **one), adapter(tmp_path / "b", kind, 2, **other)]
    parts = [(place, 1.0) for place in places]
    mix_loras(parts, tmp_path / "whole", rank=None)
    mix_loras(parts, tmp_path / "cut", rank=3)
    whole, cut = updates(tmp_path / "whole", kind), updates(tmp_path / "cut", kind)
    assert peft.PeftConfig.from_pretrained(tmp_path / "cut").r == 3
    for name, update in whole.items():
        values = torch.linalg.svdvals(update.double())
        nearest = values[..., 3:].square().sum(-1).sqrt()
        error = (update - cut[name]).double().flatten(-2).norm(dim=-1)
        torch.testing.assert_close(error, nearest, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"lora_bias": True}, r"lora_B\.bias"),
    ],
)
def test_what_no_sum_holds_is_refused_by_name(tmp_path, options, what):
    place = adapter(tmp_path / "a", **options)
    with pytest.raises(ModelError, match=rf"{what}.*cannot be mixed"):
        mix_loras([(place, 0.5)], tmp_path / "mixed", rank=None)


def test_another_kind_of_adapter_is_refused(tmp_path):
    wrapped = peft.get_peft_model(
        model(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    )
    wrapped.save_pretrained(tmp_path / "a")
    with pytest.raises(ModelError, match="only LoRA adapters are mixed"):
        mix_loras([(tmp_path / "a", 0.5)], tmp_path / "mixed", rank=None)


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_other_bases_are_refused(tmp_path):
    first = adapter(tmp_path / "a")
    other = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**{**SIZES, "hidden_size": 64})
        ),
        peft.LoraConfig(r=4, target_modules=["q_proj"]),
    )
    other.save_pretrained(tmp_path / "b")
    with pytest.raises(ModelError, match="of different bases"):
        mix_loras([(first, 0.5), (tmp_path / "b", 0.5)], tmp_path / "mixed", rank=None)
