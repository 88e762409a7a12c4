"""A decoder layer in one pass gives what the layer gives, and what is not one stays as it was."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
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
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from tunesmith.data.pack import PackingCollator, PaddingCollator
from tunesmith.nn import varlen_attention
from tunesmith.nn.fused_decoder import described, find, use
from tunesmith.nn.nf4_linear import NF4Linear
from tunesmith.ops import linear, native_status
from tunesmith.ops.layers import DecoderLayer

peft = pytest.importorskip("peft")
from tunesmith.nn import lora_linear  # noqa: E402

pytestmark = pytest.mark.skipif(
    native_status().isa in ("", "scalar"), reason="there are no vector kernels on this machine"
)

_SIZES = {**SIZES, "pad_token_id": 0}
MODELS: dict[str, Any] = {
    "llama": LlamaConfig(**_SIZES),
    "mistral": MistralConfig(**_SIZES),
    "qwen2": Qwen2Config(**_SIZES),  # biases
    "qwen3": Qwen3Config(**_SIZES, head_dim=16),  # norms of heads
    "gemma": GemmaConfig(**_SIZES, head_dim=8),  # weights of norms from one, another activation
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = [
    {"input_ids": [(7 * k + s) % 64 for k in range(length)], "labels": list(range(length))}
    for s, length in enumerate((11, 5, 17, 3, 8))
]
BATCHES = {
    "packed": PackingCollator(0)([ROWS[:3], ROWS[3:]]),
    "padded": PaddingCollator(0)(ROWS[:3]),
    "one length": PaddingCollator(0)([ROWS[0], ROWS[0]]),
}


def base_of(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="sdpa")
    model = model.to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            with torch.no_grad():  # a norm's is all ones or zeros, which hides what is done to it
                parameter.add_(torch.randn(parameter.shape, dtype=dtype) * 0.3)
    return model.requires_grad_(False)


def in_4_bits(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in PROJECTIONS:
                setattr(module, name, NF4Linear.from_linear(child))


def adapted(model: Any, targets: list[str] = PROJECTIONS, **options: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options)
    model = peft.get_peft_model(model, lora_linear.register(config)).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros, which hide what comes of an adapter
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def model_of(
    name: str,
    dtype: torch.dtype = torch.float32,
    targets: list[str] = PROJECTIONS,
    **options: Any,
) -> Any:
    model = base_of(MODELS[name], dtype)
    in_4_bits(model)
    model = adapted(model, targets, **options)
    assert varlen_attention.use(model) is None
    return model


def call(model: Any, batch: dict[str, Any]) -> Any:
    return model(**{**batch, "use_cache": False})


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = call(model, batch).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What ran in one pass: "forward" and "backward", once a layer."""
    seen: list[str] = []
    for name in ("forward", "backward"):
        own = getattr(DecoderLayer, name)

        def counted(*args: Any, name: str = name, own: Any = own) -> Any:
            seen.append(name)
            return own(*args)

        monkeypatch.setattr(DecoderLayer, name, counted)
    return seen


def both_ways(model: Any, batch: dict[str, Any], passes: list[str]) -> None:
    """Compare loss and gradients of a model in fp32 before and after `use`."""
    loss, gradients = loss_and_gradients(model, batch)
    assert gradients
    ours, our_gradients = in_one_pass(model, batch, passes)
    assert error(ours, loss) <= 1e-5
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert error(our_gradients[name], gradient) <= 1e-5, name


def in_one_pass(
    model: Any, batch: dict[str, Any], passes: list[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    assert use(model) == 2
    passes.clear()
    found = loss_and_gradients(model, batch)
    assert sorted(passes) == ["backward"] * 2 + ["forward"] * 2
    return found


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_the_layers_own(name: str, batch: str, passes: list[str]) -> None:
    both_ways(model_of(name), BATCHES[batch], passes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODELS)
def test_in_16_bits_they_are_as_near_to_those_in_32(
    name: str, dtype: torch.dtype, passes: list[str]
) -> None:
    model, batch = model_of(name, dtype), BATCHES["packed"]
    loss, gradients = loss_and_gradients(copy.deepcopy(model).float(), batch)
    their_loss, theirs = loss_and_gradients(model, batch)
    our_loss, ours = in_one_pass(model, batch, passes)
    epsilon = torch.finfo(dtype).eps
    assert error(our_loss, loss) <= error(their_loss, loss) + epsilon
    assert ours.keys() == gradients.keys()
    for part, gradient in gradients.items():
        assert error(ours[part], gradient) <= 1.5 * error(theirs[part], gradient) + epsilon, part


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["down_proj"], PROJECTIONS[:4]], ids="/".join
)
def test_some_projections_may_have_no_adapter(targets: list[str], passes: list[str]) -> None:
    both_ways(model_of("llama", targets=targets), BATCHES["packed"], passes)


def test_what_is_frozen_gets_no_gradient(passes: list[str]) -> None:
    model = model_of("llama")
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "layers.0" in name:
            parameter.requires_grad_(False)
    loss, gradients = loss_and_gradients(model, BATCHES["padded"])
    assert use(model) == 2
    passes.clear()
    ours, our_gradients = loss_and_gradients(model, BATCHES["padded"])
    assert error(ours, loss) <= 1e-5
    # the first layer has nothing that is trained before or in it
    assert sorted(passes) == ["backward", "forward", "forward"]
    assert our_gradients.keys() == gradients.keys()
    assert all("lora_B" in name and "layers.1" in name for name in gradients)
    for name, gradient in gradients.items():
        assert error(our_gradients[name], gradient) <= 1e-5


def saved_bytes(model: Any) -> int:
    """Return how much the forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(model, BATCHES["packed"]).loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_can_be_computed_again_in_the_backward_pass(
    reentrant: bool, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama")
    model.enable_input_require_grads()
    loss, gradients = loss_and_gradients(model, BATCHES["packed"])
    assert use(model) == 2
    held = saved_bytes(model)
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    seen: list[int] = []
    own = DecoderLayer.recompute

    def counted(layer: Any, *args: Any) -> Any:
        seen.append(1)
        return own(layer, *args)

    monkeypatch.setattr(DecoderLayer, "recompute", counted)
    passes.clear()
    ours, our_gradients = loss_and_gradients(model, BATCHES["packed"])
    assert sorted(passes) == ["backward"] * 2 + ["forward"] * 2
    assert len(seen) == 2
    assert saved_bytes(model) < held / 2
    assert error(ours, loss) <= 1e-5
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert error(our_gradients[name], gradient) <= 1e-5
    model.eval()  # then nothing is computed again
    seen.clear()
    loss_and_gradients(model, BATCHES["packed"])
    assert not seen


def test_without_a_gradient_it_runs_forward_only(passes: list[str]) -> None:
    model = model_of("llama").eval()
    with torch.no_grad():
        logits = call(model, BATCHES["packed"]).logits
        assert use(model) == 2
        passes.clear()
        ours = call(model, BATCHES["packed"]).logits
    assert passes == ["forward", "forward"]
    assert error(ours, logits) <= 1e-5


def test_decoding_with_a_cache_is_left_to_the_layer(passes: list[str]) -> None:
    model = model_of("llama").eval()
    ids = BATCHES["one length"]["input_ids"]
    expected = model.generate(input_ids=ids, max_new_tokens=7, do_sample=False)
    assert use(model) == 2
    passes.clear()
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=7, do_sample=False), expected)
    assert not passes


@contextmanager
def hooked(module: nn.Module) -> Iterator[None]:
    handle = module.register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced(module: nn.Module) -> Iterator[None]:
    module.forward = module.forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    with model.disable_adapter():
        yield


@contextmanager
def autocasting(_: Any) -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@contextmanager
def masked(model: Any) -> Iterator[None]:
    model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = varlen_attention.NAME


@contextmanager
def many_tokens(_: Any) -> Iterator[None]:
    kept = linear._OWN_TOKENS_FP32
    linear._OWN_TOKENS_FP32 = 4
    try:
        yield
    finally:
        linear._OWN_TOKENS_FP32 = kept


LAYER = "base_model.model.model.layers.0"
CHANGES: dict[str, Any] = {
    "a hook on a projection": lambda m: hooked(m.get_submodule(f"{LAYER}.self_attn.k_proj")),
    "a hook on a base layer": lambda m: hooked(
        m.get_submodule(f"{LAYER}.mlp.up_proj").get_base_layer()
    ),
    "a hook on a norm": lambda m: hooked(m.get_submodule(f"{LAYER}.input_layernorm")),
    "a hook on attention": lambda m: hooked(m.get_submodule(f"{LAYER}.self_attn")),
    "another forward of a block": lambda m: replaced(m.get_submodule(f"{LAYER}.mlp")),
    "adapters switched off": disabled,
    "autocast": autocasting,
    "other attention": masked,
    "many tokens": many_tokens,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_is_not_for_the_kernels_is_the_layers_own(
    change: str, passes: list[str]
) -> None:
    model, untouched = model_of("llama"), model_of("llama")
    assert use(model) == 2
    with CHANGES[change](model), CHANGES[change](untouched), torch.no_grad():
        passes.clear()
        ours = call(model, BATCHES["one length"]).logits
        assert passes.count("forward") < 2
        expected = call(untouched, BATCHES["one length"]).logits
        torch.testing.assert_close(ours, expected)
    passes.clear()
    call(model, BATCHES["one length"])
    assert passes == ["forward", "forward"]  # and the next one is for them again


def test_dropout_in_adapters_is_left_to_the_layer() -> None:
    found = use(model_of("llama", lora_dropout=0.1))
    assert "adapter without dropout" in str(found)


def test_a_base_that_is_not_in_4_bits_is_left_to_the_layer() -> None:
    model = adapted(base_of(MODELS["llama"]))
    assert varlen_attention.use(model) is None
    assert "not in 4 bits" in str(use(model))


class Residual(modeling_llama.LlamaDecoderLayer):
    """A layer that has the parts of Llama's, and adds half of what its block gives."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        x = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(hidden_states=x, **kwargs)[0]
        return hidden_states + 0.5 * self.mlp(self.post_attention_layernorm(hidden_states))


class Dropping(modeling_llama.LlamaDecoderLayer):
    """A layer that drops some of its output while it is trained."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        out = super().forward(hidden_states, **kwargs)
        return nn.functional.dropout(out, 0.2, self.training)


class Unturned(modeling_llama.LlamaDecoderLayer):
    """A layer whose attention knows nothing of positions."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        cos, sin = kwargs.pop("position_embeddings")
        still = (torch.ones_like(cos), torch.zeros_like(sin))
        return super().forward(hidden_states, position_embeddings=still, **kwargs)


class Failing(modeling_llama.LlamaDecoderLayer):
    """A layer that wants more than it is given in a trial."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        raise KeyError("ids")


class Scaling(modeling_llama.LlamaDecoderLayer):
    """A layer whose attention is scaled by where a token stands, as Ministral 3's."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        scale = 1 + 0.5 * (kwargs["position_ids"][..., None] // 4096).log1p()
        return super().forward(hidden_states * scale, **kwargs)


class Tuple(modeling_llama.LlamaDecoderLayer):
    """A layer that returns more than its output."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return super().forward(hidden_states, **kwargs), None


@pytest.mark.parametrize(
    ("impostor", "reason"),
    [
        (Residual, "outputs of a Residual differ"),
        (Dropping, "outputs of a Dropping differ"),
        (Unturned, "outputs of a Unturned differ"),
        (Failing, "a Failing does not take made-up input"),
        (Scaling, "outputs of a Scaling differ"),
        (Tuple, "a Tuple returns something else"),
    ],
)
def test_a_layer_that_only_looks_like_one_stays_as_it_is(impostor: type, reason: str) -> None:
    model = model_of("llama").eval()
    layers = model.base_model.model.model.layers
    layers[1].__class__ = impostor
    assert use(model) == 1
    assert "forward" not in layers[1].__dict__
    layers[0].__class__ = impostor
    del layers[0].forward
    assert reason in str(use(model))
    assert not any(module.training for module in model.modules())  # as it was before the trial


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64), "none is"),
        (Phi3Config(**_SIZES), "is made otherwise"),
    ],
)
def test_a_model_without_such_layers_says_so(config: Any, reason: str) -> None:
    assert reason in str(use(base_of(config)))
    assert "as the model has them" in described(str(find(base_of(config), "cpu")))


def test_each_reason_is_named() -> None:
    model = model_of("llama")
    assert find(model, "cpu") == 2
    assert "CPU" in str(find(model, "cuda"))
    attention = model.get_submodule(f"{LAYER}.self_attn")
    attention.config.attn_logit_softcapping = 30.0
    assert "attn_logit_softcapping" in str(find(model, "cpu"))


@pytest.mark.parametrize("setting", ["clip_qkv", "router_clamp", "attn_logit_softcapping"])
def test_a_model_that_bounds_its_numbers_is_left_to_itself(setting: str) -> None:
    model = model_of("llama")
    setattr(model.get_submodule(f"{LAYER}.self_attn").config, setting, 8.0)
    assert setting in str(find(model, "cpu"))


def test_a_gate_that_comes_with_the_queries_is_left_to_the_layer() -> None:
    # Qwen 3.5: q_proj gives queries and a gate for them, so its output is twice as wide
    config = Qwen3_5TextConfig(
        **_SIZES, head_dim=16, layer_types=["full_attention", "full_attention"]
    )
    model = base_of(config)
    in_4_bits(model)
    model = adapted(model)
    assert varlen_attention.use(model) is None
    assert "do not fit together" in str(use(model))


def test_weights_that_change_between_the_passes_are_an_error() -> None:
    model = model_of("llama")
    assert use(model) == 2
    loss = call(model, BATCHES["packed"]).loss
    with torch.no_grad():
        model.get_submodule(f"{LAYER}.mlp.up_proj").lora_A["default"].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_can_be_gone_through_twice_but_not_differentiated_twice() -> None:
    model = model_of("llama")
    assert use(model) == 2
    weight = model.get_submodule(f"{LAYER}.mlp.up_proj").lora_A["default"].weight
    loss = call(model, BATCHES["packed"]).loss
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight, create_graph=True)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        second.sum().backward()


def parameters_called(model: Any, *names: str) -> list[nn.Parameter]:
    found = [p for n, p in model.named_parameters() if any(name in n for name in names)]
    assert found
    return found


def bases_of(model: Any) -> list[NF4Linear]:
    return [module for module in model.modules() if isinstance(module, NF4Linear)]


def written(model: Any) -> None:
    with torch.no_grad():
        for each in parameters_called(model, "lora_", "norm", "bias"):
            each.mul_(1.5)


def assigned(model: Any) -> None:
    for each in parameters_called(model, "lora_", "norm", "bias"):
        each.data = each.data * 1.5


def cast_and_back(model: Any) -> None:
    # the second cast may be given the memory that the first has left
    for each in parameters_called(model, "lora_", "norm", "bias"):
        each.data = each.data.double()
        each.data = (each.data * 1.5).float()


def adapters_in_bf16(model: Any) -> None:
    for each in parameters_called(model, "lora_"):
        # in the memory that the wider one has, as it may happen after a cast or two
        narrow = each.data.bfloat16()
        same_memory = each.data.contiguous().view(torch.bfloat16).flatten()[: narrow.numel()]
        each.data = same_memory.view(narrow.shape).copy_(narrow)


def turned_in_memory(model: Any) -> None:
    for each in parameters_called(model, "lora_"):
        each.data = each.data.t().contiguous().t()


def weights_replaced(model: Any) -> None:
    for base in bases_of(model):
        base.packed = base.packed.flip(0)


def weights_written(model: Any) -> None:
    for base in bases_of(model):
        base.packed.copy_(base.packed.flip(0))


def scales_assigned(model: Any) -> None:
    for base in bases_of(model):
        assert base.nested_offset is not None
        base.nested_offset = base.nested_offset * 1.5


def scaling_changed(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, lora_linear.LoraLinear):
            module.scaling["default"] *= 2.0


AFTERWARDS = [
    written,
    assigned,
    cast_and_back,
    adapters_in_bf16,
    turned_in_memory,
    weights_replaced,
    weights_written,
    scales_assigned,
    scaling_changed,
]


@pytest.mark.parametrize("change", AFTERWARDS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("before", [(), (turned_in_memory,)], ids=["plain", "of copies"])
def test_what_changes_after_a_step_shows_in_the_next(
    before: tuple[Any, ...], change: Any, passes: list[str]
) -> None:
    theirs, ours = model_of("qwen2"), model_of("qwen2")
    for each in before:  # of what is no matrix without gaps a layer works on a copy
        each(theirs), each(ours)
    assert use(ours) == 2
    first, _ = loss_and_gradients(ours, BATCHES["packed"])
    change(theirs), change(ours)
    loss, gradients = loss_and_gradients(theirs, BATCHES["packed"])
    passes.clear()
    got, our_gradients = loss_and_gradients(ours, BATCHES["packed"])
    assert sorted(passes) == ["backward"] * 2 + ["forward"] * 2
    limit = 2e-2 if change is adapters_in_bf16 else 1e-5
    assert change in (adapters_in_bf16, turned_in_memory) or error(got, first) > 1e-4
    assert error(got, loss) <= limit
    for name, gradient in gradients.items():
        assert our_gradients[name].dtype == gradient.dtype
        assert error(our_gradients[name], gradient) <= limit, name


def test_a_change_between_the_passes_does_not_leave_the_kernels_with_freed_memory() -> None:
    ours, theirs = model_of("llama"), model_of("llama")
    assert use(ours) == 2
    gradients = []
    for model in (ours, theirs):
        loss = call(model, BATCHES["packed"]).loss
        # what the passes were given may be gone; both are to go back with what is there then
        for each in parameters_called(model, "lora_B"):
            each.data = each.data.clone()
        for base in bases_of(model):
            base.packed = base.packed.clone()
        loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        assert error(gradients[0][name], gradient) <= 1e-5


def test_a_layer_lets_go_of_weights_that_it_no_longer_runs(passes: list[str]) -> None:
    model = model_of("llama")
    assert use(model) == 2
    loss_and_gradients(model, BATCHES["packed"])
    gone = [weakref.ref(base.packed) for base in bases_of(model)]
    weights_replaced(model)
    loss_and_gradients(model, BATCHES["packed"])
    gc.collect()
    assert not any(each() is not None for each in gone)
    gone = [weakref.ref(base.packed) for base in bases_of(model)]
    weights_replaced(model)
    passes.clear()
    with disabled(model), torch.no_grad():  # the layers' own code
        call(model, BATCHES["packed"])
    gc.collect()
    assert not passes
    assert not any(each() is not None for each in gone)


def test_a_layer_is_looked_at_once_for_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    assert use(model) == 2
    made: list[int] = []
    own = DecoderLayer._prepare

    def counted(layer: DecoderLayer) -> None:
        made.append(1)
        own(layer)

    monkeypatch.setattr(DecoderLayer, "_prepare", counted)
    for batch in ("packed", "padded", "packed"):
        loss_and_gradients(model, BATCHES[batch])
        written(model)
    assert len(made) <= 2  # each layer's once, if it was not made when it was tried


def test_copies_and_pickles_run_their_own_weights(passes: list[str]) -> None:
    model = model_of("llama")
    assert use(model) == 2
    logits = call(model, BATCHES["packed"]).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        passes.clear()
        with torch.no_grad():
            assert torch.equal(call(twin, BATCHES["packed"]).logits, logits)
            assert passes == ["forward", "forward"]
            twin.get_submodule(f"{LAYER}.mlp.up_proj").lora_B["default"].weight.zero_()
            assert not torch.equal(call(twin, BATCHES["packed"]).logits, logits)
    assert torch.equal(call(model, BATCHES["packed"]).logits, logits)
    assert use(model) == 2  # once more is the same
