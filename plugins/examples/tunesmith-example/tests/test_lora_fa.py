"""What LoRA-FA trains and what it leaves alone."""

from __future__ import annotations

import pytest
from tunesmith_example.lora_fa import LoraFA, LoraFAConfig

from tunesmith.plugin.options import structure
from tunesmith.testing import tiny_session


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def session(tmp_path):
    return tiny_session(tmp_path / "base", method=LoraFA(LoraFAConfig(r=4)))


def test_only_b_is_trained(session):
    assert trained(session.model)
    assert all(".lora_B." in name for name in trained(session.model))


def test_a_stays_frozen_when_a_saved_adapter_is_trained_on(session, tmp_path):
    fresh = trained(session.model)
    session.method.save(session.model, tmp_path / "adapter")
    session = session.with_adapter("sft", tmp_path / "adapter")
    assert trained(session.model_for(trains=True)) == fresh
    assert not trained(session.model)


def test_a_saved_adapter_holds_a_as_well_as_b(session, tmp_path):
    from safetensors.torch import load_file

    session.method.save(session.model, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("lora_A" in name for name in names)
    assert any("lora_B" in name for name in names)


def test_alpha_is_twice_the_rank_unless_given(session):
    model = session.model
    assert LoraFA(LoraFAConfig(r=4)).peft_config(model).lora_alpha == 8
    assert LoraFA(LoraFAConfig(r=4, alpha=1)).peft_config(model).lora_alpha == 1


def test_named_targets_are_the_only_ones_adapted(tmp_path):
    options = structure(LoraFAConfig, {"targets": ["q_proj"]}, name="lora_fa")
    model = tiny_session(tmp_path / "base", method=LoraFA(options)).model
    assert all(".q_proj." in name for name in trained(model))
