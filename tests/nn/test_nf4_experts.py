"""Experts in 4 bits compute, learn, merge and are saved as dense ones of their values."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tunesmith import Tuner
from tunesmith.errors import ModelError, OpError
from tunesmith.nn.lora_experts import LoraExperts
from tunesmith.nn.nf4_experts import NF4Experts, experts_in
from tunesmith.nn.quantizable import split
from tunesmith.plugin.quantizers import Quantizer
from tunesmith.testing.tiny import tiny_tokenizer
from tunesmith_plugins.quantizers.fp4 import FP4, FP4Config
from tunesmith_plugins.quantizers.nf4 import NF4, NF4Config

peft = pytest.importorskip("peft")
from tunesmith.nn import lora_linear  # noqa: E402

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 271, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1,
    "bos_token_id": None, "eos_token_id": 270, "pad_token_id": 268, "intermediate_size": 48,
}  # fmt: skip
MIXTURES: dict[str, Any] = {
    "mixtral": transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    # transposed weights, biases, gates and ups that alternate
    "gpt_oss": transformers.GptOssConfig(
        **SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen2_moe": transformers.Qwen2MoeConfig(
        **SIZES, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24,
        shared_expert_intermediate_size=32,
    ),
}  # fmt: skip
IDS = torch.arange(60).view(3, 20) * 7 % 260
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"Who keeps the {what}?"},
            {"role": "assistant", "content": f"The keeper of the {what}."},
        ]
    }
    for what in ("bees", "goats", "locks", "lamps")
]


@pytest.fixture(params=MIXTURES)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return saved(MIXTURES[request.param], tmp_path / request.param)


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    return saved(MIXTURES["mixtral"], tmp_path / "mixtral")


def saved(config: Any, directory: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zeros, which hide whether they are added
                parameter.normal_(0, 0.1)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def in_4_bits(directory: Path, **options: Any) -> Any:
    return NF4(NF4Config(**options)).load(directory, dtype=torch.float32, device=CPU)


def experts_of(model: Any) -> list[tuple[str, NF4Experts]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, NF4Experts)]


def as_dense(model: Any, directory: Path) -> Any:
    """Return the unquantized model with the very values that the 4-bit one stands for."""
    plain = Quantizer(None).load(directory, dtype=torch.float32, device=CPU)
    quantizer = NF4(NF4Config())
    with torch.no_grad():
        for name, module in plain.named_modules():
            theirs = model.get_submodule(name)
            for own, parameter in module.named_parameters(recurse=False):
                parameter.copy_(quantizer.dense_parameter(theirs, own))
    plain.set_experts_implementation("eager")
    return plain.requires_grad_(False)


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )  # fmt: skip
    made = peft.get_peft_model(model, lora_linear.register(config))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:  # zeros, which hide what comes of an adapter
                parameter.normal_(0, 0.1)
    return made


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_all_experts_go_into_4_bits(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tunesmith")
    model = in_4_bits(base)
    assert len(experts_of(model)) == 2
    dense = [n for n, p in model.named_parameters() if "experts" in n and p.dim() == 3]
    assert not dense
    assert "experts (" not in caplog.text  # among what stays as it is
    original = Quantizer(None).load(base, dtype=torch.float32, device=CPU)
    for name, module in experts_of(model):
        for own in module.stacks:
            weight = original.get_submodule(name).get_parameter(own).detach()
            held = getattr(module, own)
            assert held.shape == weight.shape
            assert float((held - weight).norm() / weight.norm()) < 0.12


def test_they_compute_what_dense_experts_of_their_values_compute(base: Path) -> None:
    model = in_4_bits(base).eval()
    with torch.no_grad():
        ours = model(input_ids=IDS).logits
        theirs = as_dense(model, base).eval()(input_ids=IDS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_adapter_on_them_learns_what_pefts_own_learns_on_dense_ones(base: Path) -> None:
    model = in_4_bits(base)
    plain = adapted(as_dense(model, base)).train()
    ours = adapted(model).train()
    layers = [m for m in ours.modules() if isinstance(m, LoraExperts)]
    assert len(layers) == 4
    names = [n for n, _ in ours.named_parameters() if "lora_" in n]
    assert names == [n for n, _ in plain.named_parameters() if "lora_" in n]
    theirs = gradients(plain)
    for name, grad in gradients(ours).items():
        scale = float(theirs[name].abs().max())
        torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-4 * scale)
    with ours.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(
            ours(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-4, atol=1e-5
        )


def test_gradient_checkpointing_gives_the_same_gradients(mixtral: Path) -> None:
    model = adapted(in_4_bits(mixtral)).train()
    expected = gradients(model)
    model.enable_input_require_grads()
    base = model.get_base_model()
    enable = getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name])


def test_two_adapters_at_once_add_up(mixtral: Path) -> None:
    model = in_4_bits(mixtral)
    plain = adapted(as_dense(model, mixtral)).eval()
    ours = adapted(model).eval()
    for each in (plain, ours):
        torch.manual_seed(2)
        config = copy.deepcopy(each.peft_config["default"])
        each.add_adapter("second", lora_linear.register(config))
        each.base_model.set_adapter(["default", "second"])
        with torch.no_grad():
            for name, parameter in each.named_parameters():
                if "lora_B.second" in name:
                    parameter.normal_(0, 0.1)
            logits = each(input_ids=IDS).logits
        each.logits = logits
    torch.testing.assert_close(ours.logits, plain.logits, rtol=1e-3, atol=1e-4)


def test_a_token_for_no_expert_gets_nothing(mixtral: Path) -> None:
    (_, experts), *_ = experts_of(in_4_bits(mixtral))
    x = torch.randn(3, 32)
    index = torch.tensor([[0, 4], [4, 4], [3, 1]])
    weights = torch.full((3, 2), 0.5)
    out = experts(x, index, weights)
    assert not out[1].any()
    torch.testing.assert_close(
        out[0], experts(x[:1], torch.tensor([[0]]), weights[:1, :1])[0], rtol=1e-5, atol=1e-6
    )


def test_casts_and_copies_leave_codes_and_scales_alone(mixtral: Path) -> None:
    model = in_4_bits(mixtral)
    (_, experts), *_ = experts_of(copy.deepcopy(model).to(torch.bfloat16))
    (_, original), *_ = experts_of(model)
    assert experts.compute_dtype == torch.bfloat16
    assert experts.gate_up_proj.dtype == torch.bfloat16
    for name, buffer in original.named_buffers():
        assert torch.equal(experts.get_buffer(name), buffer), name


def test_what_save_pretrained_writes_opens_in_stock_transformers(
    base: Path, tmp_path: Path
) -> None:
    skip = ("self_attn", "shared_expert") if "qwen2" in base.name else ("self_attn",)
    model = in_4_bits(base, skip=skip).eval()
    model.save_pretrained(tmp_path / "saved")
    opened, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(
            opened.eval()(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5
        )


# PEFT looks for its own pattern among modules, where it is a parameter's
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_a_run_on_4_bit_experts_merges_into_what_it_trained(mixtral: Path, tmp_path: Path) -> None:
    tuner = Tuner(str(mixtral), precision="fp32").quantize("nf4").lora(r=4)
    options: dict[str, Any] = {
        "max_steps": 2, "batch_size": 2, "gradient_accumulation": 1, "learning_rate": 1e-2,
        "scheduler": "constant", "warmup": 0,
    }  # fmt: skip
    result = (
        tuner.sft(ROWS, **options)
        .evaluate("loss", ROWS)
        .merge()
        .evaluate("loss", ROWS)
        .run(tmp_path / "run", progress=False)
    )
    held, merged = (m["loss"] for name, m in result.metrics.items() if "evaluate" in name)
    assert held == pytest.approx(merged, abs=1e-4)
    assert held != pytest.approx(result.metrics["03-sft"]["loss_first"], abs=1e-3)


def test_merging_in_place_rounds_and_says_so(mixtral: Path) -> None:
    model = adapted(in_4_bits(mixtral)).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        with pytest.warns(UserWarning, match="rounds"):
            merged = model.merge_and_unload()
        logits = merged(input_ids=IDS).logits
    assert len(experts_of(merged)) == 2
    assert float((logits - expected).norm() / expected.norm()) < 0.3


def test_fp4_has_experts_too(mixtral: Path) -> None:
    model = FP4(FP4Config()).load(mixtral, dtype=torch.float32, device=CPU)
    (_, experts), *_ = experts_of(model)
    assert experts.stacks["down_proj"].quant_type == "fp4"


def test_experts_named_by_skip_stay_as_they_are(mixtral: Path) -> None:
    assert not experts_of(in_4_bits(mixtral, skip=("experts",)))


def test_an_initialization_that_reads_the_base_is_refused(mixtral: Path) -> None:
    config = peft.LoraConfig(
        r=4, target_parameters=["experts.down_proj"], init_lora_weights="pissa"
    )
    with pytest.raises(ModelError, match="pissa"):
        peft.get_peft_model(in_4_bits(mixtral), lora_linear.register(config))


def test_a_state_dict_is_not_rounded_once_more(mixtral: Path) -> None:
    model = in_4_bits(mixtral)
    (name, experts), *_ = experts_of(model)
    state = {f"{name}.gate_up_proj": experts.gate_up_proj}
    with pytest.raises(OpError, match="held in 4 bits"):
        model.load_state_dict(state, strict=False)


def test_an_expert_with_nan_is_named(mixtral: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(mixtral / "model.safetensors")
    name = next(name for name in weights if "experts.2.w2" in name)
    weights[name][1, 1] = float("nan")
    save_file(weights, mixtral / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OpError, match=r"experts\.down_proj\[2\].*NaN"):
        in_4_bits(mixtral)


def skeleton() -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(MIXTURES["mixtral"]))


def test_experts_that_compute_something_else_stay_and_are_named() -> None:
    model = skeleton()
    experts = model.model.layers[0].mlp.experts

    class Louder(type(experts)):  # type: ignore[misc]
        def forward(self, *args: Any) -> Tensor:
            return 1.01 * super().forward(*args)

    experts.__class__ = Louder
    assert "computes something else" in str(experts_in(experts))
    found = split(model)
    assert "model.layers.1.mlp.experts.down_proj" in found.targets
    assert "model.layers.0.mlp.experts.down_proj" not in found.targets
    (kept,) = [each for each in found.kept if each.what == "experts"]
    assert kept.parameters == 4 * 3 * 32 * 48
    assert "Louder" in kept.why


def test_experts_with_a_weight_of_their_own_stay() -> None:
    experts = skeleton().model.layers[0].mlp.experts
    experts.register_parameter("scale", nn.Parameter(torch.ones(4, 1, 1, device="meta")))
    assert "other weights" in str(experts_in(experts))
