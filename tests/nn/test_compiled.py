"""Compiled layers give what the model gives, and nothing of ours breaks their graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_sizes import SIZES
from torch import Tensor
from transformers import GemmaConfig, LlamaConfig, Phi3Config, Qwen2Config
from transformers.models.auto import AutoModelForCausalLM

from tunesmith.nn import lora_linear
from tunesmith.nn.compiled import compile_layers, described, repeated
from tunesmith.nn.lora_linear import LoraLinear
from tunesmith.nn.nf4_linear import NF4Linear

# torch's compiler looks at it itself
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

_SIZES = {**SIZES, "pad_token_id": 0}
MODELS = {
    "llama": LlamaConfig(**_SIZES),
    "qwen2": Qwen2Config(**_SIZES),
    "gemma": GemmaConfig(**_SIZES, head_dim=8),
    "phi3": Phi3Config(**_SIZES),
}


@pytest.fixture(autouse=True)
def forget_what_was_compiled() -> None:
    torch._dynamo.reset()


def adapted(config: Any) -> Any:
    """A model with every linear layer in 4 bits, and an adapter that is not the identity."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, NF4Linear.from_linear(layer))
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    lora_linear.register(lora)
    model = get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def loss_and_gradients(model: Any, tokens: int) -> list[Tensor]:
    ids = torch.tensor([[(7 * k + s) % 64 for k in range(tokens)] for s in (0, 3)])
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = [p.grad.clone() for _, p in sorted(model.named_parameters()) if p.grad is not None]
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("name", MODELS)
def test_layers_compile_whole_and_give_the_same(name: str) -> None:
    model = adapted(MODELS[name])
    lengths = (5, 9, 12)  # the others with shapes that are not fixed
    expected = [loss_and_gradients(model, tokens) for tokens in lengths]
    names = sorted(name for name, _ in model.named_parameters())
    # a break in the graph of a layer is an error
    assert compile_layers(model, fullgraph=True, backend="aot_eager") == 2
    assert sorted(name for name, _ in model.named_parameters()) == names
    assert any(isinstance(module, LoraLinear) for module in model.modules())
    for tokens, wanted in zip(lengths, expected, strict=True):
        found = loss_and_gradients(model, tokens)
        assert len(found) == len(wanted) > 2
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_each_layer_is_called_compiled() -> None:
    model = adapted(MODELS["llama"])
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compile_layers(model, fullgraph=True, backend=backend)
    loss_and_gradients(model, 5)
    assert graphs
    ops = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("tunesmith" in op for op in ops)


def test_which_layers_is_said() -> None:
    assert described(repeated(adapted(MODELS["llama"]))) == (
        "torch.compile: each LlamaDecoderLayer, when it is first called"
    )
    assert repeated(torch.nn.Linear(2, 2)) == []
    assert "none is compiled" in described([])
