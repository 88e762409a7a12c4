"""Fused layers give what a model's own give, and whatever is not known stays as it was."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny_sizes import SIZES
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from tunesmith.nn import fused_layers
from tunesmith.nn.fused_layers import described, use
from tunesmith.ops import native_status

pytestmark = pytest.mark.skipif(
    native_status().isa in ("", "scalar"), reason="there are no vector kernels on this machine"
)

_SIZES = {**SIZES, "pad_token_id": 0}
# the model and how many norms, gated MLPs and rotary embeddings are found in it
MODELS: dict[str, tuple[Any, tuple[int, int, int]]] = {
    "llama": (LlamaConfig(**_SIZES), (5, 2, 1)),
    "mistral": (MistralConfig(**_SIZES), (5, 2, 1)),
    "qwen2": (Qwen2Config(**_SIZES), (5, 2, 1)),
    "qwen3": (Qwen3Config(**_SIZES, head_dim=16), (9, 2, 1)),
    "gemma": (GemmaConfig(**_SIZES, head_dim=8), (5, 2, 1)),
    "phi": (PhiConfig(**{**_SIZES, "num_key_value_heads": 4}), (0, 0, 1)),
    "phi3": (Phi3Config(**_SIZES), (5, 0, 1)),
}
IDS = torch.tensor([[(7 * k + s) % 64 for k in range(11)] for s in (0, 3)])


@pytest.fixture(autouse=True)
def own_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every model file its own rotary embedding back afterwards."""
    import sys

    for name, (config, _) in MODELS.items():
        AutoModelForCausalLM.from_config(config)  # imports it
        module = sys.modules[f"transformers.models.{name}.modeling_{name}"]
        monkeypatch.setattr(module, fused_layers._ROTARY, getattr(module, fused_layers._ROTARY))


def model_of(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype).train()
    # frozen but for the projections, whose gradients show those of all that comes after them
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            with torch.no_grad():  # a norm's is all ones or zeros, which hides what is done to it
                parameter.add_(torch.randn(parameter.shape, dtype=dtype) * 0.3)
        parameter.requires_grad_(name.endswith("_proj.weight"))
    return model


NONE_TRAINED = {"trained": 0}


def loss_and_gradients(model: Any) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1.6e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_models_own(name: str, dtype: torch.dtype, limit: float) -> None:
    config, counts = MODELS[name]
    model = model_of(config, dtype)
    loss, gradients = loss_and_gradients(model)
    assert use(model) == dict(zip(("norms", "gated", "rotary"), counts, strict=True)) | NONE_TRAINED
    ours, our_gradients = loss_and_gradients(model)
    assert error(ours, loss) <= limit
    assert len(our_gradients) == len(gradients) > 0
    for a, b in zip(our_gradients, gradients, strict=True):
        assert error(a, b) <= limit


def test_a_norm_that_is_trained_runs_its_own_code_and_is_not_counted() -> None:
    model = model_of(MODELS["llama"][0])
    model.model.norm.weight.requires_grad_(True)
    loss, gradients = loss_and_gradients(model)
    found = use(model)
    assert isinstance(found, dict)
    assert found["trained"] == 1
    assert found["norms"] == len([n for n, _ in model.named_modules() if n.endswith("norm")]) - 1
    assert "but not 1 norms, whose weights are trained" in described(found)
    ours, our_gradients = loss_and_gradients(model)
    assert error(ours, loss) <= 1e-5
    assert len(our_gradients) == len(gradients)
    assert "their weights are trained" in str(use(nn.ModuleList([nn.RMSNorm(32, eps=1e-6)])))


def test_a_model_without_such_layers_says_so() -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    assert "nothing in it" in str(use(AutoModelForCausalLM.from_config(config)))


def test_decoding_gives_the_same_tokens() -> None:
    model = model_of(MODELS["llama"][0]).eval()
    before = model.generate(IDS, max_new_tokens=9, do_sample=False)
    use(model)
    assert torch.equal(model.generate(IDS, max_new_tokens=9, do_sample=False), before)


class Centered(modeling_llama.LlamaRMSNorm):
    """A norm that looks like Llama's and is not."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class Sum(modeling_llama.LlamaMLP):
    """A block that has the names of a gated one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class Tail(modeling_llama.LlamaMLP):
    """A gated MLP that does something after its last projection."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


def test_what_only_looks_like_it_is_left_alone() -> None:
    config = MODELS["llama"][0]
    relu = copy.deepcopy(config)
    relu.hidden_act = "relu"
    strangers = [
        Centered(32),
        Sum(config),
        Tail(config),
        modeling_llama.LlamaMLP(relu),
        nn.LayerNorm(32, bias=False),
        nn.LayerNorm(32),
    ]
    for stranger in strangers:
        use(nn.ModuleList([stranger]))
        assert "forward" not in stranger.__dict__


def test_torchs_own_rms_norm_is_known() -> None:
    norm = nn.RMSNorm(32, eps=1e-6)
    norm.weight.requires_grad_(False)
    x = torch.randn(3, 32)
    expected = norm(x)
    assert use(nn.ModuleList([norm])) == {"norms": 1, "gated": 0, "rotary": 0} | NONE_TRAINED
    torch.testing.assert_close(norm(x), expected)


def test_another_rotary_embedding_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_llama.apply_rotary_pos_emb

    def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        return own(q.flip(-1), k, cos, sin, unsqueeze_dim)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    found = use(model_of(MODELS["llama"][0]))
    assert isinstance(found, dict)
    assert found["rotary"] == 0
    assert modeling_llama.apply_rotary_pos_emb is interleaved


def test_a_second_time_changes_nothing() -> None:
    model = model_of(MODELS["llama"][0])
    first = use(model)
    forwards = [module.__dict__.get("forward") for module in model.modules()]
    rotary = modeling_llama.apply_rotary_pos_emb
    assert use(model) == first
    assert [module.__dict__.get("forward") for module in model.modules()] == forwards
    assert modeling_llama.apply_rotary_pos_emb is rotary


def test_a_trained_norm_weight_gets_its_gradient() -> None:
    model = model_of(MODELS["llama"][0])
    weight = model.model.norm.weight.requires_grad_()
    loss_and_gradients(model)
    expected = weight.grad.clone()
    use(model)
    loss_and_gradients(model)
    assert error(weight.grad, expected) <= 2e-6


def test_under_autocast_nothing_changes() -> None:
    model = model_of(MODELS["llama"][0])

    def step() -> tuple[Tensor, list[Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            return loss_and_gradients(model)

    loss, gradients = step()
    use(model)
    ours, our_gradients = step()
    assert torch.equal(ours, loss)
    assert all(map(torch.equal, our_gradients, gradients))


def test_copies_and_pickles_stand_on_their_own() -> None:
    model = model_of(MODELS["llama"][0]).eval()
    use(model)
    with torch.no_grad():
        before = model(IDS).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other.model.norm.weight.zero_()
            assert not other(IDS).logits.any()
        assert torch.equal(model(IDS).logits, before)


def test_hooks_and_projections_put_in_later_are_called() -> None:
    model = model_of(MODELS["llama"][0])
    use(model)
    block = model.model.layers[0].mlp
    seen: list[str] = []
    block.register_forward_hook(lambda *_: seen.append("block"))
    block.up_proj.register_forward_hook(lambda *_: seen.append("up"))
    block.down_proj = nn.Linear(48, 32)
    loss_and_gradients(model)
    assert seen == ["up", "block"]
    assert block.down_proj.weight.grad is not None


def test_a_rotary_embedding_that_is_called_with_less_is_the_files_own(own_rotary: None) -> None:
    def own(q: Tensor, k: Any = None, cos: Any = None, sin: Any = None) -> Any:
        turned = modeling_llama.apply_rotary_pos_emb(q, q if k is None else k, cos, sin)
        return turned if k is not None else turned[0]

    fused = fused_layers._fused_rotary(own)
    q, cos, sin = torch.randn(1, 2, 5, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    torch.testing.assert_close(fused(q, cos=cos, sin=sin), own(q, cos=cos, sin=sin))
    torch.testing.assert_close(fused(q, q, cos, sin), own(q, q, cos, sin))
