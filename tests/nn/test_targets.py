"""What an adapter is put on: names that match nothing are errors, and defaults do no harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
)
from transformers import Qwen2MoeConfig as Qwen2Moe

from tunesmith import Tuner
from tunesmith.errors import ModelError, PlanError
from tunesmith.nn.targets import Targets, find_targets
from tunesmith.plugin.methods import PeftMethod
from tunesmith.testing.tiny import tiny_llama

SIZES: dict[str, Any] = {
    "vocab_size": 271,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ROWS = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]


def skeleton(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def llama() -> Any:
    return skeleton(LlamaConfig(**SIZES))


def mixtral() -> Any:
    return skeleton(MixtralConfig(num_local_experts=4, **SIZES))


def qwen_moe() -> Any:
    """Layer 0 is dense; layer 1 has experts, one of them shared."""
    return skeleton(
        Qwen2Moe(
            num_experts=4,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=24,
            mlp_only_layers=[0],
            **SIZES,
        )
    )


def endings(targets: Targets) -> set[str]:
    return {name.rpartition(".")[2] for name in (*targets.modules, *targets.parameters)}


class TestNames:
    def test_one_name_as_text_is_that_name(self) -> None:
        assert find_targets(llama(), "q_proj") == find_targets(llama(), ("q_proj",))
        assert len(find_targets(llama(), "q_proj").modules) == 2

    def test_a_typo_beside_a_name_is_an_error_with_the_near_name(self) -> None:
        with pytest.raises(ModelError, match=r"'v_porj' matches no layer.*did you mean 'v_proj'"):
            find_targets(llama(), ("q_proj", "v_porj"))

    def test_a_name_of_another_architecture_is_told_what_there_is(self) -> None:
        with pytest.raises(ModelError, match=r"'c_attn' matches no layer.*down_proj.*q_proj"):
            find_targets(llama(), "c_attn")

    def test_every_wrong_name_is_told_at_once(self) -> None:
        with pytest.raises(ModelError, match=r"'nothing'.*'nowhere'"):
            find_targets(llama(), ("nothing", "nowhere", "q_proj"))

    def test_a_module_that_is_no_layer_is_told_its_layers(self) -> None:
        with pytest.raises(ModelError, match=r"'self_attn' is a LlamaAttention.*k_proj, o_proj"):
            find_targets(llama(), "self_attn")

    def test_the_end_of_a_name_begins_at_a_dot(self) -> None:
        with pytest.raises(ModelError, match="'proj' matches no"):
            find_targets(llama(), "proj")
        found = find_targets(llama(), "layers.1.mlp.up_proj")
        assert found.modules == ("model.layers.1.mlp.up_proj",)

    def test_a_regular_expression_matches_whole_names(self) -> None:
        found = find_targets(llama(), r".*layers\.0\..*[qv]_proj")
        assert found.modules == (
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.v_proj",
        )
        with pytest.raises(ModelError, match="no regular expression"):
            find_targets(llama(), "(q_proj")

    def test_head_and_embedding_are_adapted_when_they_are_named(self) -> None:
        found = find_targets(llama(), ("lm_head", "embed_tokens"))
        assert endings(found) == {"lm_head", "embed_tokens"}

    def test_no_name_at_all_is_an_error(self) -> None:
        with pytest.raises(ModelError, match="got no name"):
            find_targets(llama(), ())
        with pytest.raises(ModelError, match="stands alone"):
            find_targets(llama(), ("all-linear", "lm_head"))


class TestAllLinear:
    def test_it_is_every_linear_layer_but_the_head(self) -> None:
        found = find_targets(llama(), "all-linear")
        assert len(found.modules) == 14
        assert "the head" in str(found)

    def test_it_takes_in_stacked_experts_and_leaves_the_router(self) -> None:
        found = find_targets(mixtral(), "all-linear")
        assert len(found.parameters) == 4
        assert endings(found) == {
            *("q_proj", "k_proj", "v_proj", "o_proj"),
            *("gate_up_proj", "down_proj"),
        }
        assert "4 stacked expert weights (down_proj, gate_up_proj)" in str(found)

    def test_experts_can_be_left_out_and_that_is_said(self) -> None:
        found = find_targets(mixtral(), "all-linear", experts=False)
        assert not found.parameters
        assert "not down_proj, gate_up_proj: experts=False" in str(found)

    def test_a_method_that_cannot_adapt_stacks_says_so_and_what_to_do(self) -> None:
        with pytest.raises(ModelError, match=r"dropout=0.1 needs one; set experts=False"):
            find_targets(mixtral(), "all-linear", stackable="dropout=0.1 needs one")

    def test_a_linear_router_is_left_out_by_what_it_does(self) -> None:
        found = find_targets(qwen_moe(), "all-linear")
        assert not {"gate", "shared_expert_gate"} & endings(found)
        assert "shared_expert_gate: a router" in str(found)

    def test_a_layer_whose_weight_is_read_past_it_is_left_out(self) -> None:
        """An adapter on it would train nothing, and a merged model compute something else."""
        model = skeleton(MambaConfig(vocab_size=271, hidden_size=32, num_hidden_layers=1))
        found = find_targets(model, "all-linear")
        assert endings(found) == {"in_proj"}
        assert "dt_proj, out_proj, x_proj: the module it is in reads its weight" in str(found)
        with pytest.raises(ModelError, match=r"'dt_proj': .*past the layer.*leave it out"):
            find_targets(model, "dt_proj")

    def test_a_layer_that_computes_something_else_is_left_out(self) -> None:
        class Doubled(nn.Linear):
            def forward(self, x: torch.Tensor) -> Any:
                return super().forward(x), x

        model = llama()
        with torch.device("meta"):
            model.model.layers[0].mlp.up_proj = Doubled(32, 48, bias=False)
        found = find_targets(model, "all-linear")
        assert "model.layers.0.mlp.up_proj" not in found.modules
        assert "a Doubled computes something else" in str(found)


class TestStackedExperts:
    def test_they_are_named_by_their_weight(self) -> None:
        found = find_targets(mixtral(), ("q_proj", "experts.gate_up_proj"))
        assert found.parameters == tuple(
            f"model.layers.{n}.mlp.experts.gate_up_proj" for n in range(2)
        )
        assert len(found.modules) == 2

    def test_names_of_transformers_4_mean_the_stack_they_have_become(self) -> None:
        found = find_targets(mixtral(), ("w1", "w2", "w3"))
        assert found == find_targets(mixtral(), ("gate_up_proj", "down_proj")) or (
            set(found.parameters)
            == set(find_targets(mixtral(), ("gate_up_proj", "down_proj")).parameters)
        )

    def test_half_of_a_stack_is_an_error_that_names_the_other_half(self) -> None:
        with pytest.raises(ModelError, match=r"'w1' is one weight with w3.*gate_up_proj"):
            find_targets(mixtral(), ("w1", "w2"))

    def test_layers_whose_name_peft_takes_for_experts_are_told(self) -> None:
        """PEFT rewrites targets of that name, so that an adapter on them would not open again."""
        config = Glm4MoeConfig(
            n_routed_experts=4, moe_intermediate_size=16, first_k_dense_replace=1, **SIZES
        )
        found = find_targets(skeleton(config), "all-linear")
        assert "PEFT takes that name for the stacked experts" in str(found)
        assert not any("shared_experts" in name for name in found.modules)
        assert len(found.parameters) == 2


class TestInAPlan:
    @pytest.mark.parametrize("targets", [("q_proj", "v_porj"), ("c_attn",), "self_attn"])
    def test_names_that_do_not_fit_are_found_before_a_weight_is_read(
        self, tmp_path: Path, targets: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = tiny_llama(tmp_path / "base")
        # whoever loads the weights fails
        monkeypatch.setattr("tunesmith.nn.pretrained.load_model", None)
        tuner = Tuner(str(base)).lora(targets=targets).sft(ROWS)
        with pytest.raises(PlanError, match=r"step 1 \(lora\): targets: "):
            tuner.run(tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()

    def test_it_says_what_is_adapted_and_what_is_not(self, tmp_path: Path) -> None:
        plan = str(Tuner(str(tiny_llama(tmp_path / "base"))).lora().sft(ROWS).explain())
        assert "adapts   14 layers (down_proj, gate_proj," in plan
        assert "not lm_head: the head" in plan


def test_a_name_that_peft_would_pass_over_is_told_for_any_method() -> None:
    """A method that hands its targets to PEFT as they are is checked all the same."""

    class Plain(PeftMethod[None]):
        def peft_config(self, model: Any) -> Any:
            return peft.LoraConfig(target_modules=["q_proj", "v_porj"], task_type="CAUSAL_LM")

    assert Plain(None).check(llama()) == ("targets: 'v_porj' matches no layer of this model",)


def test_what_peft_refuses_is_told_before_a_weight_is_read() -> None:
    class Refused(PeftMethod[None]):
        def peft_config(self, model: Any) -> Any:
            return peft.LoraConfig(target_modules=["act_fn"], task_type="CAUSAL_LM")

    (problem,) = Refused(None).check(llama())
    assert problem.startswith("PEFT refuses this model: ValueError: Target module")
