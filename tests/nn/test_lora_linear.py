"""LoraLinear: PEFT's LoRA, in one pass over a frozen base, with PEFT itself as the oracle."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tunesmith.errors import ModelError, OpError
from tunesmith.nn.nf4_linear import NF4Linear
from tunesmith.ops import dequantize_4bit, quantize_4bit
from tunesmith.ops.dtypes import DTYPES

peft = pytest.importorskip("peft")
from peft.tuners import lora  # noqa: E402

from tunesmith.nn import lora_linear  # noqa: E402
from tunesmith.nn.adapters import open_adapter  # noqa: E402
from tunesmith.nn.lora_linear import LoraLinear  # noqa: E402

BASES = ("nf4", "fp4", "plain")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}

merging = pytest.mark.filterwarnings("ignore:(un)?merging:UserWarning")


class Net(nn.Module):
    """Two linear layers with a curve between them."""

    def __init__(self, base: str, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = self._layer(nn.Linear(96, 40), base, dtype)
        self.second = self._layer(nn.Linear(40, 96, bias=False), base, dtype)

    @staticmethod
    def _layer(linear: nn.Linear, base: str, dtype: torch.dtype) -> nn.Linear:
        linear = linear.to(dtype).requires_grad_(False)
        if base == "plain":
            return linear
        quant_type, _, dense = base.partition(" ")
        layer = NF4Linear.from_linear(linear, quant_type=quant_type)
        return layer.dense() if dense else layer

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def config(**options: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], **options}
    return peft.LoraConfig(**settings)


def fill(model: nn.Module, adapter: str = "") -> None:
    """Give an adapter (by default all) values that matter; a fresh B is zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and adapter in name and "magnitude" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)


def ours(base: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Return the net with LoraLinear layers."""
    model = peft.get_peft_model(Net(base, dtype), lora_linear.register(config(**options)))
    fill(model)
    return model


def stock(base: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Return the net over the same values in a dense base, with PEFT's own layers."""
    dense = base if base == "plain" else f"{base} dense"
    model = peft.get_peft_model(Net(dense, dtype), config(**options))
    fill(model)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    return model


def layers(model: nn.Module) -> list[LoraLinear]:
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def random_x(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(model: nn.Module, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """Return output and all gradients of a seeded pass."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(3)
    y = model(x, **kwargs)
    y.float().square().mean().backward()
    assert x.grad is not None
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        other = expected[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        error = (tensor - other).abs().max() / other.abs().max()
        assert error <= tolerance, (name, float(error))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Yield a list that grows by one with every fused pass."""
    calls: list[int] = []
    frozen_linear = lora_linear.frozen_linear

    def count(*args: Any) -> Tensor:
        calls.append(1)
        return frozen_linear(*args)

    with monkeypatch.context() as patch:
        patch.setattr(lora_linear, "frozen_linear", count)
        yield calls


def parts_of(layer: LoraLinear) -> list[Tensor]:
    base = layer.get_base_layer()
    parts = (base.packed, base.absmax, base.nested_absmax, base.nested_offset)
    return [part.clone() for part in parts]


# --- who gets one


@pytest.mark.parametrize("base", BASES)
def test_peft_builds_it_over_a_4_bit_and_over_a_plain_layer(base: str) -> None:
    model = ours(base)
    assert len(layers(model)) == 2
    assert all(isinstance(layer, lora.Linear) for layer in layers(model))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in stock(base).named_parameters() if p.requires_grad}
    assert "lora.LoraLinear" in repr(model)


def test_layers_of_other_kinds_stay_with_peft() -> None:
    class Other(nn.Linear):
        pass

    class Wrapped(Tensor):
        """As a quantization library keeps its data."""

    net = nn.ModuleDict(
        {
            "linear": nn.Linear(8, 8),
            "other": Other(8, 8),
            "embedding": nn.Embedding(8, 8),
            "conv": nn.Conv1d(8, 8, 1),
            "wrapped": nn.Linear(8, 8),
        }
    )
    data = net["wrapped"].weight.detach().as_subclass(Wrapped)
    net["wrapped"].weight = nn.Parameter(data, requires_grad=False)
    targets = list(net)
    model = peft.get_peft_model(net, lora_linear.register(config(target_modules=targets)))
    kinds = {name: type(model.base_model.model[name]) for name in targets}
    assert kinds == {
        "linear": LoraLinear,
        "other": lora.Linear,
        "embedding": lora.Embedding,
        "conv": lora.layer.Conv1d,
        "wrapped": lora.Linear,
    }


def test_bitsandbytes_layers_stay_with_peft() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    net = nn.ModuleDict({"linear": bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")})
    net.to("cpu")
    net.is_loaded_in_4bit = True
    model = peft.get_peft_model(net, lora_linear.register(config(target_modules=["linear"])))
    assert type(model.base_model.model["linear"]) is lora.Linear4bit


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_initialization_that_would_rewrite_a_4_bit_weight_is_refused(init: str) -> None:
    with pytest.raises(ModelError, match=f"initialization '{init}', which rewrites the base"):
        ours("nf4", init_lora_weights=init)
    ours("plain", init_lora_weights=init)
    ours("nf4", init_lora_weights="gaussian")


# --- the fused pass gives what PEFT gives


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("adapter", ["fp32", "as the base"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_outputs_and_all_gradients_are_peft_s(
    base: str,
    dtype: torch.dtype,
    adapter: str,
    dropout: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = [build(base, dtype, lora_dropout=dropout) for build in (ours, stock)]
    if adapter == "as the base":
        for model in models:
            model.to(dtype)
    for shape in ((1, 96), (7, 96), (2, 9, 96), (150, 96)):
        x = random_x(*shape, dtype=dtype)
        with counted(monkeypatch) as calls:
            got = run(models[0], x)
        assert len(calls) == 2
        assert_same(got, run(models[1], x), TOLERANCE[dtype])


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_alpha": 1},
        {"r": 64},
        {"rank_pattern": {"first": 2}, "alpha_pattern": {"second": 9}},
        {"bias": "all"},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_options_of_lora_mean_what_they_mean_to_peft(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = ours("nf4", **options), random_x(2, 9, 96)
    with counted(monkeypatch) as calls:
        got = run(model, x)
    assert len(calls) == 2
    assert_same(got, run(stock("nf4", **options), x), 1e-5)


def test_dropout_rests_in_eval_mode_and_follows_its_module() -> None:
    model, other = ours("nf4", lora_dropout=0.5), stock("nf4", lora_dropout=0.5)
    x = random_x(2, 9, 96)
    trained = run(model, x)
    assert_same(run(model.eval(), x), run(other.eval(), x), 1e-5)
    assert not torch.allclose(trained["y"], run(model, x)["y"])
    # as DPO does, whose policy must equal its reference at step 0
    for each in (model.train(), other.train()):
        for module in each.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    got = run(model, x)
    assert_same(got, run(other, x), 1e-5)
    assert torch.equal(got["y"], run(model.eval(), x)["y"])


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", ["nf4", "plain"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_decides_the_dtype_as_it_does_for_peft(
    dropout: float,
    base: str,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, other = (build(base, dtype, lora_dropout=dropout) for build in (ours, stock))
    x = random_x(2, 9, 96, dtype=x_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with counted(monkeypatch) as calls:
            got = run(model, x)
        expected = run(other, x)
    assert len(calls) == 2
    assert got["y"].dtype == torch.bfloat16
    assert_same(got, expected, TOLERANCE[torch.bfloat16])


def test_without_autocast_another_dtype_than_a_plain_weight_s_is_torch_s_error() -> None:
    with pytest.raises(RuntimeError, match="same dtype"):
        ours("plain", torch.float32)(random_x(2, 96, dtype=torch.bfloat16))
    assert ours("nf4", torch.bfloat16)(random_x(2, 96)).dtype == torch.float32


def test_a_frozen_a_keeps_no_input_for_backward() -> None:
    model = ours("nf4")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    x = random_x(8, 96)
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model(x)
    assert x.data_ptr() not in saved
    y.square().mean().backward()
    other = stock("nf4")
    expected = run(other, x)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)
    assert sum(p.grad is not None for p in model.parameters()) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing_with_dropout(reentrant: bool) -> None:
    model = ours("nf4", lora_dropout=0.5)
    x = random_x(2, 9, 96)

    class Checkpointed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(model, x, use_reentrant=reentrant)

    expected = run(model, x)
    model.zero_grad()
    got = run(Checkpointed(), x)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same({**got, **grads}, expected, 1e-6)


def test_no_gradient_is_recorded_under_no_grad() -> None:
    with torch.no_grad():
        assert not ours("nf4")(random_x(2, 96)).requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_computes_the_same(copied: Callable[[Any], Any]) -> None:
    model = ours("nf4", lora_dropout=0.3)
    other = copied(model)
    assert len(layers(other)) == 2
    assert_same(run(other, random_x(3, 96)), run(model, random_x(3, 96)), 0)


# --- what is left to PEFT


def test_what_is_no_plain_single_adapter_is_peft_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def two_active(model: Any) -> None:
        model.add_adapter("other", config(r=2))
        fill(model)
        model.base_model.set_adapter(["default", "other"])

    def hooked(part: str) -> Callable[[Any], None]:
        def hook(model: Any) -> None:
            for name, module in model.named_modules():
                if name.endswith(part):
                    module.register_forward_hook(lambda m, args, out: 2 * out)

        return hook

    def patched(model: Any) -> None:
        for name, module in model.named_modules():
            if name.endswith("base_layer"):
                forward = module.forward
                module.forward = lambda x, forward=forward: 2 * forward(x)

    def no_casts(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, lora.LoraLayer):
                module.cast_input_dtype_enabled = False

    def nothing(model: Any) -> None:
        pass

    cases: dict[str, tuple[dict[str, Any], Callable[[Any], None]]] = {
        "dora": ({"use_dora": True}, nothing),
        "lora_bias": ({"lora_bias": True, "target_modules": ["first"]}, nothing),
        "two active": ({}, two_active),
        "base hook": ({}, hooked("base_layer")),
        "A hook": ({}, hooked("lora_A.default")),
        "dropout hook": ({}, hooked("lora_dropout.default")),
        "patched forward": ({}, patched),
        "no casts": ({}, no_casts),
        "disabled": ({}, lambda model: model.base_model.disable_adapter_layers()),
    }
    x = random_x(2, 9, 96)
    for name, (options, change) in cases.items():
        models = [build("nf4", **options) for build in (ours, stock)]
        for model in models:
            change(model)
        with counted(monkeypatch) as calls:
            got = run(models[0], x)
        assert calls == [], name
        assert_same(got, run(models[1], x), 1e-5)


def test_a_batch_of_several_adapters_is_peft_s_own() -> None:
    models = [build("nf4") for build in (ours, stock)]
    x = random_x(3, 96)
    outputs = []
    for model in models:
        model.add_adapter("other", config(r=2))
        fill(model)
        model.eval()
        with torch.no_grad():
            outputs.append(model(x, adapter_names=["default", "other", "__base__"]))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_a_base_weight_that_is_trained_gets_its_gradient() -> None:
    models = [build("plain") for build in (ours, stock)]
    for model in models:
        for name, parameter in model.named_parameters():
            if name.endswith("base_layer.weight"):
                parameter.requires_grad_()
    got, expected = (run(model, random_x(2, 96)) for model in models)
    assert sum("base_layer.weight" in name for name in got) == 2
    assert_same(got, expected, 1e-5)


def test_fp64_is_peft_s_own() -> None:
    x = random_x(3, 96, dtype=torch.float64)
    assert ours("nf4")(x).dtype == torch.float64


# --- several adapters, as DPO over an SFT adapter uses them


def test_switching_adapters_leaves_the_reference_what_it_was() -> None:
    models = [build("nf4") for build in (ours, stock)]
    x = random_x(4, 96)
    results = []
    for model in models:
        with torch.no_grad():
            sft = model(x)
        model.add_adapter("policy", config(r=2))
        fill(model, "policy")
        model.set_adapter("policy")
        frozen = {n: p.clone() for n, p in model.named_parameters() if ".default." in n}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        policy = model(x).detach()
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
        assert all(p.grad is None for n, p in model.named_parameters() if n in frozen)
        model.set_adapter("default")
        with torch.no_grad():
            assert torch.equal(model(x), sft)
        with torch.no_grad(), model.disable_adapter():
            bare = model(x)
        results.append({"sft": sft, "policy": policy, "bare": bare})
    assert not torch.allclose(results[0]["sft"], results[0]["policy"])
    assert_same(results[0], results[1], 1e-5)


# --- files


@pytest.mark.parametrize("base", ["nf4", "plain"])
def test_an_adapter_goes_to_stock_peft_and_back(base: str, tmp_path: Path) -> None:
    model, x = ours(base, lora_dropout=0.1).eval(), random_x(2, 9, 96)
    expected = model(x).detach()
    model.save_pretrained(tmp_path / "ours")
    dense = Net(base if base == "plain" else f"{base} dense", torch.float32)
    other = peft.PeftModel.from_pretrained(dense, tmp_path / "ours", is_trainable=True)
    assert not layers(other)
    torch.testing.assert_close(other.eval()(x), expected, rtol=1e-5, atol=1e-5)
    ours_state, other_state = (peft.get_peft_model_state_dict(m) for m in (model, other))
    assert ours_state.keys() == other_state.keys()
    assert all(torch.equal(ours_state[key], other_state[key]) for key in ours_state)

    other.save_pretrained(tmp_path / "theirs")
    config = lora_linear.register(peft.LoraConfig.from_pretrained(tmp_path / "theirs"))
    back = open_adapter(Net(base, torch.float32), tmp_path / "theirs", config)
    assert len(layers(back)) == 2
    trained = {name for name, p in back.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    torch.testing.assert_close(back.eval()(x), expected, rtol=0, atol=0)


def test_what_is_saved_is_what_stock_peft_saves(tmp_path: Path) -> None:
    for name, model in (("ours", ours("nf4")), ("theirs", stock("nf4"))):
        model.save_pretrained(tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


def test_a_second_adapter_loads_into_the_same_layers(tmp_path: Path) -> None:
    stock("nf4", r=2).save_pretrained(tmp_path)
    model = ours("nf4")
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert len(layers(model)) == 2
    assert_same(
        {"y": model(random_x(3, 96)).detach()},
        {"y": stock("nf4", r=2)(random_x(3, 96)).detach()},
        1e-5,
    )


def test_the_lora_method_wraps_and_loads_with_it(tiny_model: Path, tmp_path: Path) -> None:
    from tunesmith.plugin.quantizers import Quantizer
    from tunesmith_plugins.methods.lora import Lora, LoraConfig

    method = Lora(LoraConfig(r=4, dropout=0.1))
    ids = torch.arange(24).reshape(2, 12)

    def base() -> Any:
        return Quantizer[None](None).load(
            tiny_model, dtype=torch.float32, device=torch.device("cpu")
        )

    model = method.wrap(base())
    assert len(layers(model)) == 14
    fill(model)
    method.save(model, tmp_path)
    again = method.load(base(), tmp_path, trainable=True)
    assert len(layers(again)) == 14
    assert any(p.requires_grad for p in again.parameters())
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        assert torch.equal(again.eval()(input_ids=ids).logits, logits)
        other = peft.PeftModel.from_pretrained(base(), tmp_path)
        torch.testing.assert_close(other(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-5)


# --- merging


@pytest.mark.parametrize("base", ["nf4", "fp4"])
@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_4_bits_quantizes_the_sum_and_warns_that_it_rounds(
    base: str, safe: bool
) -> None:
    model = ours(base)
    before = model(random_x(5, 96)).detach()
    expected = [
        quantize_4bit(
            layer.get_base_layer().dense(torch.float32).weight + layer.get_delta_weight("default"),
            quant_type=base,
        )
        for layer in layers(model)
    ]
    with pytest.warns(UserWarning, match=r"merging into a 4-bit weight rounds.*\.merge\(\) merges"):
        model.merge_adapter(safe_merge=safe)
    for layer, w in zip(layers(model), expected, strict=True):
        assert layer.merged_adapters == ["default"]
        assert type(layer.base_layer) is NF4Linear
        assert layer.base_layer.quant_type == base
        for part, other in zip(
            parts_of(layer),
            (w.packed, w.absmax, w.nested_absmax, w.nested_offset),
            strict=True,
        ):
            assert other is not None
            assert torch.equal(part, other)
    merged = model(random_x(5, 96)).detach()
    bare = Net(f"{base} dense", torch.float32)(random_x(5, 96))
    assert (merged - before).norm() < 0.3 * (before - bare).norm()


@merging
def test_merge_and_unload_leaves_a_4_bit_model_that_holds_the_adapter() -> None:
    model, x = ours("nf4"), random_x(5, 96)
    before, bare = model(x).detach(), Net("nf4", torch.float32)(x)
    net = model.merge_and_unload()
    assert type(net.first) is type(net.second) is NF4Linear
    after = net(x)
    assert (after - before).norm() < 0.3 * (before - bare).norm()


@merging
def test_unmerging_takes_the_adapter_out_again_but_for_rounding() -> None:
    model, x = ours("nf4"), random_x(5, 96)
    before = model(x).detach()
    weights = [layer.get_base_layer().weight for layer in layers(model)]
    model.merge_adapter()
    merged = [layer.get_base_layer().weight for layer in layers(model)]
    with pytest.warns(UserWarning, match="unmerging from a 4-bit weight rounds"):
        model.unmerge_adapter()
    for layer, weight, other in zip(layers(model), weights, merged, strict=True):
        assert layer.merged_adapters == []
        back = layer.get_base_layer().weight
        assert (back - weight).norm() < 0.5 * (other - weight).norm()
    assert (model(x) - before).norm() < 0.3 * before.norm()


@merging
def test_disabling_a_merged_adapter_unmerges_it() -> None:
    model, x = ours("nf4"), random_x(5, 96)
    bare = Net("nf4", torch.float32)(x)
    model.merge_adapter()
    with model.disable_adapter():
        out = model(x).detach()
    assert (out - bare).norm() < 0.3 * bare.norm()
    assert all(layer.merged_adapters == [] for layer in layers(model))


def test_a_plain_base_merges_as_peft_merges_it_without_a_warning() -> None:
    model, other, x = ours("plain"), stock("plain"), random_x(5, 96)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same({"y": model.merge_and_unload()(x)}, {"y": other.merge_and_unload()(x)}, 1e-6)


@merging
def test_two_adapters_merge_one_after_the_other() -> None:
    model = ours("nf4")
    model.add_adapter("other", config(r=2))
    fill(model)
    layer = layers(model)[0]
    expected = layer.get_base_layer().dense(torch.float32).weight.detach().clone()
    expected += layer.get_delta_weight("default") + layer.get_delta_weight("other")
    model.merge_adapter(["default", "other"])
    assert layer.merged_adapters == ["default", "other"]
    w = quantize_4bit(expected)
    torch.testing.assert_close(layer.get_base_layer().weight, dequantize_4bit(w))


@merging
@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_variants_merge_into_4_bits_by_peft_s_own_rule(options: dict[str, Any]) -> None:
    options = {**options, "target_modules": ["first"]}
    model, other, x = ours("nf4", **options), stock("nf4", **options), random_x(5, 96)
    model.merge_adapter()
    other.merge_adapter()
    mine, theirs = layers(model)[0].get_base_layer(), other.base_model.model.first.get_base_layer()
    assert torch.equal(mine.weight, dequantize_4bit(quantize_4bit(theirs.weight.detach())))
    assert torch.equal(mine.bias, theirs.bias)
    assert (model(x) - other(x)).norm() < 0.3 * other(x).norm()


@pytest.mark.filterwarnings("ignore:merging:UserWarning")
@pytest.mark.parametrize("safe", [False, True])
def test_a_merge_that_is_not_finite_is_refused_and_changes_nothing(safe: bool) -> None:
    model = ours("nf4")
    layer = layers(model)[0]
    before = parts_of(layer)
    layer.lora_A["default"].weight.data[1, 2] = float("nan")
    with pytest.raises(OpError, match="merged weight holds NaN or Inf"):
        layer.merge(safe_merge=safe)
    assert layer.merged_adapters == []
    assert type(layer.base_layer) is NF4Linear
    assert all(torch.equal(a, b) for a, b in zip(parts_of(layer), before, strict=True))


@merging
def test_merging_what_is_merged_or_not_there_changes_nothing() -> None:
    model = ours("nf4")
    layer = layers(model)[0]
    layer.merge()
    before = parts_of(layer)
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    assert all(torch.equal(a, b) for a, b in zip(parts_of(layer), before, strict=True))
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    layer.merge(adapter_names=[])
    assert layer.merged_adapters == []


# --- torch.compile


@pytest.mark.parametrize("base", ["nf4", "plain"])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_is_traced_without_a_break(base: str, autocast: bool) -> None:
    torch._dynamo.reset()
    model = ours(base)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for tokens in (3, 5, 9):  # the second and third with dynamic shapes
            x = random_x(tokens, 96)
            expected = run(model, x)
            got = run(compiled, x)
            got = {name.removeprefix("_orig_mod."): tensor for name, tensor in got.items()}
            assert_same(got, expected, 1e-6)


@pytest.mark.slow
def test_it_compiles_with_dropout_through_inductor() -> None:
    torch._dynamo.reset()
    model = ours("nf4", lora_dropout=0.5)
    x = random_x(64, 96)
    compiled = torch.compile(model, fullgraph=True)
    got = run(compiled, x)
    # inductor draws other numbers; their effect is a mask of the same rate
    expected = run(model, x)
    assert got["y"].shape == expected["y"].shape
    assert 0.5 < got["y"].norm() / expected["y"].norm() < 2
    model.eval()
    got = run(compiled, x)
    got = {name.removeprefix("_orig_mod."): tensor for name, tensor in got.items()}
    assert_same(got, run(model, x), 1e-5)
