"""A model whose tokens see those after them is refused before it is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tools.architectures.families import tiny_config
from tunesmith.data.examples import Sourced
from tunesmith.errors import ModelError
from tunesmith.nn.causality import check_causal
from tunesmith.plugin.trainers import TrainingData
from tunesmith.testing.tiny import tiny_examples, tiny_session
from tunesmith_plugins.trainers.sft import SFT, SFTConfig


def make(family: str, **changed: object) -> torch.nn.Module:
    torch.manual_seed(0)
    config = tiny_config(family)
    for name, value in changed.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "family", ["llama", "mamba", "mixtral", "gpt_oss", "opt", "bert", "big_bird"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_causal_model_is_one_and_is_left_as_it_was(family: str, dtype: torch.dtype) -> None:
    model = make(family).to(dtype)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    check_causal(model)
    assert torch.rand(1) == expected
    assert not any(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore")
def test_dropout_is_not_taken_for_a_look_ahead() -> None:
    check_causal(make("opt", dropout=0.4, attention_dropout=0.4))


def test_an_adapter_that_adds_tokens_is_not_taken_for_a_look_ahead() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    check_causal(get_peft_model(make("llama"), config))


def test_a_model_that_gives_no_numbers_is_left_to_who_can_say_why() -> None:
    model = make("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    check_causal(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "changed"),
    [("bert", {"is_decoder": False}), ("cpmant", {}), ("xlnet", {})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_sees_ahead_is_refused(
    family: str, changed: dict[str, object], dtype: torch.dtype
) -> None:
    with pytest.raises(ModelError, match=f"this {family} is no causal language model"):
        check_causal(make(family, **changed).to(dtype))


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_asks_before_it_trains(tmp_path: Path) -> None:
    session = tiny_session(tmp_path / "model", trains=True)
    mask = "transformers.models.llama.modeling_llama.create_causal_mask"
    rows = [Sourced(each, f"row {n}") for n, each in enumerate(tiny_examples("conversation"))]
    data = TrainingData(rows, [], lambda *_: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask, lambda **_: None)
        for layer in session.model.model.layers:
            layer.self_attn.is_causal = False
        with pytest.raises(ModelError, match="moves with the tokens after it"):
            SFT(SFTConfig(max_steps=1)).build(session, data, tmp_path / "out")
