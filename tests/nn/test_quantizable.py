"""Which weights go into 4 bits: a layer is known by what it does, and what stays is told."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from tunesmith import Tuner
from tunesmith.errors import ModelError, OpError, PlanError
from tunesmith.nn.nf4_linear import NF4Linear
from tunesmith.nn.quantizable import described, is_linear, split
from tunesmith.plugin.quantizers import Quantizer
from tunesmith.testing.tiny import tiny_llama, tiny_tokenizer
from tunesmith_plugins.quantizers.bitsandbytes import BitsAndBytes, BitsAndBytesConfig
from tunesmith_plugins.quantizers.nf4 import NF4, NF4Config

CPU = torch.device("cpu")
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Who keeps the {what}?"},
            {"role": "assistant", "content": f"The keeper of the {what}."},
        ]
    }
    for what in ("bees", "goats", "locks", "lamps")
]
STEPS: dict[str, Any] = {"max_steps": 2, "batch_size": 2, "gradient_accumulation": 1}
SIZES: dict[str, Any] = {
    "vocab_size": 271, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.1, "eos_token_id": 270, "pad_token_id": 268,
}  # fmt: skip
LLAMA_LIKE: dict[str, Any] = {
    **SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


class Renamed(nn.Linear):
    """As Falcon has it: the same, written otherwise."""

    def forward(self, input: Tensor) -> Tensor:
        out = input @ self.weight.T
        return out if self.bias is None else out + self.bias


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 1.01 * super().forward(input)


class Clipped(nn.Linear):
    """Shows with large numbers only."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clamp(-100, 100))


class Dropping(nn.Linear):
    """Shows in training only."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(input), 0.5, self.training)


class Rounded(nn.Linear):
    """As BitNet has it: the weight is not what is multiplied by."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.round(), self.bias)


class WithScores(nn.Linear):
    """As Llama 4's router has it."""

    def forward(self, input: Tensor) -> Any:
        out = super().forward(input)
        return out.softmax(-1), out


class Grouped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.view(*input.shape[:-1], 2, -1))


class WithScale(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, input: Tensor) -> Tensor:
        return self.scale * super().forward(input)


class Conditioned(nn.Linear):
    def forward(self, input: Tensor, gate: Tensor) -> Tensor:
        return gate * super().forward(input)


def saved(config: Any, directory: Path) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def skeleton(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_linear_layer_is_one_that_does_what_a_linear_layer_does(bias: bool, device: str) -> None:
    for kind in (nn.Linear, Renamed):
        assert is_linear(kind(96, 40, bias, device=device)), kind
    assert is_linear(Conv1D(8, 4))


@pytest.mark.parametrize(
    "kind", [Scaled, Clipped, Dropping, Rounded, WithScores, Grouped, WithScale, Conditioned]
)
def test_a_subclass_that_does_something_else_is_none(kind: type[nn.Linear]) -> None:
    assert not is_linear(kind(96, 40))


def test_a_linear_layer_that_somebody_listens_to_is_tried_no_further() -> None:
    layer = Renamed(4, 4)
    layer.register_forward_hook(lambda *_: None)
    assert not is_linear(layer)


def test_trying_a_layer_leaves_it_as_it_was() -> None:
    layer = Renamed(4, 4).eval()
    weight = layer.weight
    assert is_linear(layer)
    assert layer.weight is weight
    assert (layer.in_features, layer.out_features, layer.training) == (4, 4, False)


def test_falcon_goes_into_4_bits_and_opens_again_as_it_was_saved(tmp_path: Path) -> None:
    base = saved(transformers.FalconConfig(**SIZES), tmp_path / "falcon")
    model = NF4(NF4Config()).load(base, dtype=torch.float32, device=CPU)
    layer = model.get_submodule("transformer.h.0.mlp.dense_h_to_4h")
    assert isinstance(layer, NF4Linear)
    ids = torch.arange(1, 41).view(2, -1)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        plain = Quantizer(None).load(base, dtype=torch.float32, device=CPU)(input_ids=ids).logits
    assert float((logits - plain).norm() / plain.norm()) < 0.3
    # stock transformers has no 4-bit layer in the place of a FalconLinear: its weight is plain
    model.save_pretrained(tmp_path / "saved")
    again = Quantizer(None).load(tmp_path / "saved", dtype=torch.float32, device=CPU)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_gpt2_goes_into_4_bits_the_other_way_round(tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=271, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.1,
        eos_token_id=270,
    )  # fmt: skip
    base = saved(config, tmp_path / "gpt2")
    model = NF4(NF4Config()).load(base, dtype=torch.float32, device=CPU)
    plain = Quantizer(None).load(base, dtype=torch.float32, device=CPU)
    layer = model.get_submodule("transformer.h.0.attn.c_attn")
    original = plain.get_submodule("transformer.h.0.attn.c_attn")
    assert isinstance(layer, NF4Linear)
    assert (layer.out_features, layer.in_features) == (192, 64)
    weight = original.weight.detach()
    assert float((layer.weight.T - weight).norm() / weight.norm()) < 0.12
    ids = torch.arange(1, 41).view(2, -1)
    with torch.no_grad():
        logits, theirs = (each(input_ids=ids).logits for each in (model, plain))
    assert float((logits - theirs).norm() / theirs.norm()) < 0.3


def test_what_stays_in_16_bits_is_told_with_why(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(**LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2)
    found = split(skeleton(config))
    assert found.quantized + found.plain == sum(p.numel() for p in skeleton(config).parameters())
    assert "model.layers.1.self_attn.q_proj.weight" in found.targets
    assert not any("lm_head" in name or "embed" in name for name in found.targets)
    text = " ".join(described(found, 1000, 2, "bf16"))
    assert "embeddings and head (as QLoRA leaves them)" in text
    assert "stay in bf16" in text


def test_routers_stay_as_they_are(tmp_path: Path) -> None:
    config = transformers.Qwen2MoeConfig(
        **LLAMA_LIKE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
    )  # fmt: skip
    found = split(skeleton(config))
    assert not any(name.endswith("shared_expert_gate.weight") for name in found.targets)
    assert any(name.endswith("shared_expert.gate_proj.weight") for name in found.targets)
    assert any(each.what == "routers" for each in found.kept)


def test_a_layer_that_computes_something_else_stays_and_is_named() -> None:
    model = skeleton(transformers.LlamaConfig(**LLAMA_LIKE))
    model.model.layers[0].mlp.up_proj = Scaled(32, 64, False, device="meta")
    found = split(model)
    assert "model.layers.0.mlp.up_proj.weight" not in found.targets
    (kept,) = [each for each in found.kept if "Scaled" in each.what]
    assert kept.parameters == 32 * 64


def test_a_model_without_anything_to_quantize_is_refused_in_the_plan(tmp_path: Path) -> None:
    config = transformers.CTRLConfig(vocab_size=271, n_embd=32, dff=64, n_layer=1, n_head=2)
    model = skeleton(config)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, Scaled(4, 4, device="meta"))
    with pytest.raises(ModelError, match=r"no weight that can be held in 4 bits, only .*Scaled"):
        split(model)


def test_bitsandbytes_says_that_it_leaves_falcon_in_16_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = saved(transformers.FalconConfig(**SIZES), tmp_path / "falcon")
    tuner = Tuner(str(base)).quantize("bitsandbytes").lora(r=4).sft(ROWS, **STEPS)
    with pytest.raises(PlanError, match="FalconLinear is none of the classes"):
        tuner.run(tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_plan_says_what_goes_into_4_bits_and_counts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_llama(tmp_path / "llama", hidden_size=64)
    plan = Tuner(str(base)).quantize("nf4").lora(r=4).sft(ROWS, **STEPS).explain()
    shown = capsys.readouterr().out
    assert "    holds    " in shown
    assert "stay in fp32" in shown
    estimate = plan.steps[2].estimate
    assert estimate is not None
    found = split(plan.shapes.model)
    quantizer = NF4(NF4Config())
    held = sum(quantizer.nbytes(shape, 4) for shape in found.targets.values())
    assert held + 4 * found.plain <= estimate.weights_bytes < held + 4 * found.plain + 4 * 64 * 128


def test_much_that_stays_in_16_bits_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="tunesmith")
    base = tiny_llama(tmp_path / "llama", hidden_size=64)
    quantizer = NF4(NF4Config(skip=("mlp",)))
    quantizer.load(base, dtype=torch.float32, device=CPU)
    (record,) = [each for each in caplog.records if each.message.startswith("quantized:")]
    assert record.levelno == logging.WARNING
    assert "gate_proj ('skip' names it)" in record.message


def test_a_weight_with_nan_is_named_as_we_name_it(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = tiny_llama(tmp_path / "llama")
    file = base / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    tuner = Tuner(str(base)).quantize("nf4").lora(r=4).sft(ROWS, **STEPS)
    with pytest.raises(OpError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN"):
        tuner.run(tmp_path / "run", progress=False)


def test_a_saved_model_of_bitsandbytes_is_kept_from_repacking_too(tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = tiny_llama(tmp_path / "llama", hidden_size=64)
    quantizer = BitsAndBytes(BitsAndBytesConfig())
    quantizer.load(base, dtype=torch.float32, device=CPU).save_pretrained(tmp_path / "saved")
    tiny_tokenizer().save_pretrained(tmp_path / "saved")
    model = quantizer.load(tmp_path / "saved", dtype=torch.float32, device=CPU).eval()
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    before = [quantizer.dense_weight(layer) for layer in layers]
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    assert layers
    for layer, was in zip(layers, before, strict=True):
        assert torch.equal(quantizer.dense_weight(layer), was)


def test_a_layer_that_was_repacked_is_not_misread(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = tiny_llama(tmp_path / "llama", hidden_size=64)
    quantizer = BitsAndBytes(BitsAndBytesConfig())
    model = quantizer.load(base, dtype=torch.float32, device=CPU).eval()
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match="repacked its weight"):
        quantizer.dense_weight(layer)
