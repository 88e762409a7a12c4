"""DPO starts at ln 2 on every architecture, whatever its training mode throws dice for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tools.architectures.families import tiny_config
from tunesmith.data.examples import Message, Preference, Sourced
from tunesmith.errors import RunError
from tunesmith.nn.eval_mode import held_in_eval
from tunesmith.nn.own_loss import trial_batch
from tunesmith.plugin.trainers import TrainingData
from tunesmith.testing.tiny import tiny_llama, tiny_session
from tunesmith_plugins.methods.lora import Lora, LoraConfig
from tunesmith_plugins.trainers.dpo import DPO, DPOConfig

FAMILIES = [
    "llama",
    "opt",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "bloom",
    "falcon",
    "mpt",
    "phi",
    "phi3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "mistral",
    "olmo2",
    "olmoe",
    "xglm",
    "biogpt",
    "codegen",
    "gptj",
    "mamba",
    "mamba2",
    "bart",
    "mbart",
    "pegasus",
    "marian",
    "stablelm",
    "starcoder2",
    "cohere",
    "gpt_bigcode",
    "persimmon",
    "granite",
    "granitemoe",
    "deepseek_v3",
    "jamba",
    "openai-gpt",
    "roberta",
    "bert",
    "electra",
    "trocr",
    "nemotron",
    "jetmoe",
    "phimoe",
    "dbrx",
]
SAMPLE = {"opt"}
NEVER_RECOMPUTED = {"jetmoe", "openai-gpt"}
"""Families that do not support gradient checkpointing, and say so."""
RATE = 0.3


def dropped_everywhere(config: Any) -> int:
    """Set every dropout rate of a config; return how many there are."""
    count = 0
    for name, value in list(config.to_dict().items()):
        inner = getattr(config, name, None)
        if hasattr(inner, "to_dict"):
            count += dropped_everywhere(inner)
        elif "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                setattr(config, name, RATE)
            except Exception:  # one that takes whole numbers only
                continue
            count += 1
    return count


def preferences() -> list[Sourced]:
    return [
        Sourced(
            Preference(
                [Message("user", f"say {n}")],
                [Message("assistant", f"the number is {n}")],
                [Message("assistant", f"no, not {n}, I am sorry")],
            ),
            f"row {n}",
        )
        for n in range(4)
    ]


def model_in(directory: Path, family: str) -> int:
    tiny_llama(directory)  # for its tokenizer
    config = tiny_config(family)
    rates = dropped_everywhere(config)
    torch.manual_seed(0)
    for file in directory.glob("*.safetensors"):
        file.unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return rates


def dpo_trainer(
    directory: Path,
    *,
    adapter: bool = True,
    dropout: float = RATE,
    dtype: torch.dtype | None = None,
    **options: Any,
):
    method = Lora(LoraConfig(r=2, dropout=dropout, experts=False)) if adapter else None
    session = tiny_session(directory, method=method, dtype=dtype, trains=True)
    settings = {
        "batch_size": 2,
        "gradient_accumulation": 2,
        "learning_rate": 1e-2,
        "scheduler": "constant",
        "max_steps": 2,
        **options,
    }
    return DPO(DPOConfig(**settings)).build(
        session, TrainingData(preferences(), [], lambda *_: None), directory / "out"
    )


def random_in_training(model: Any) -> bool:
    inputs, _ = trial_batch(model)
    model.train()
    with torch.no_grad():
        one, other = (model(**inputs, use_cache=False).logits for _ in range(2))
    model.eval()
    return not torch.allclose(one, other, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # libraries have much to say of so many models
@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [
        pytest.param(
            each,
            checkpointing,
            id=f"{each}-{'recomputed' if checkpointing else 'stored'}",
            marks=[] if each in SAMPLE else pytest.mark.slow,
        )
        for each in FAMILIES
        for checkpointing in (False, True)
        if not (checkpointing and each in NEVER_RECOMPUTED)
    ],
)
def test_the_loss_of_the_first_step_is_ln_2(family, checkpointing, tmp_path):
    rates = model_in(tmp_path, family)
    adapter = family not in {"gpt2"}
    trainer = dpo_trainer(tmp_path, adapter=adapter, gradient_checkpointing=checkpointing)
    if family != "mpt":  # reads a rate that is a whole number, and no other
        assert not rates or random_in_training(trainer.model), "no dropout is alive"
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    trainer.train()
    first, second = [row for row in trainer.state.log_history if "loss" in row]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-3)
    # and it learns, so that ln 2 is no constant
    assert first["grad_norm"] > 0
    assert second["loss"] != pytest.approx(math.log(2), abs=1e-6)
    assert any(not torch.equal(*pair) for pair in zip(before, weights, strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_reference_of_mixed_precision_is_taken_in_mixed_precision(checkpointing, tmp_path):
    options = {"adapter": False, "dtype": torch.bfloat16, "gradient_checkpointing": checkpointing}
    trainer = dpo_trainer(tmp_path, learning_rate=1e-3, **options)
    assert trainer.accelerator.mixed_precision == "bf16"
    trainer.train()
    first, second = [row for row in trainer.state.log_history if "loss" in row]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert second["loss"] < first["loss"]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_recomputed_activations_are_the_stored_ones(family, tmp_path):
    losses = []
    for name, checkpointing in (("a", False), ("b", True)):
        model_in(tmp_path / name, family)
        trainer = dpo_trainer(tmp_path / name, gradient_checkpointing=checkpointing, max_steps=3)
        calls = []
        layer = next(
            module
            for module in trainer.model.modules()
            if hasattr(type(module), "_can_checkpoint_with_cache")
        )
        linear = next(each for each in layer.modules() if isinstance(each, torch.nn.Linear))
        linear.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        # twice a pass where it is computed again: 3 steps of 2 passes
        assert len(calls) == (12 if checkpointing else 6)
        assert "forward" not in vars(layer)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_training_mode_is_what_it_was_once_it_is_not_held():
    from transformers import OPTConfig

    model = AutoModelForCausalLM.from_config(
        OPTConfig(
            vocab_size=64,
            hidden_size=16,
            ffn_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            max_position_embeddings=32,
        )
    )
    with held_in_eval(model):
        assert model.train() is model
        assert not any(module.training for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())
    assert "train" not in vars(model)


class Restless(torch.nn.Module):
    """Throws dice in any mode, which no mode of ours can still."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * (1 + 0.1 * torch.rand_like(hidden))


def test_a_model_that_is_random_in_any_mode_is_refused_before_the_first_update(tmp_path):
    tiny_llama(tmp_path)
    trainer = dpo_trainer(tmp_path)
    base = trainer.model.get_base_model()
    base.model.norm = torch.nn.Sequential(base.model.norm, Restless())
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    with pytest.raises(RunError, match=r"dpo: row \d: before the first update .* equal") as caught:
        trainer.train()
    assert "random" in str(caught.value)
    assert all(map(torch.equal, before, weights))
