"""A merge gives what the adapter computes on its base, or it fails: nothing of it gets lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DeepseekV3Config, GPT2Config, MixtralConfig

from tunesmith.errors import ModelError
from tunesmith.nn import merging, proof, saving
from tunesmith.nn.checkpoint import ShardWriter
from tunesmith.nn.merging import Adapted
from tunesmith.nn.proof import row_logits
from tunesmith.plugin.methods import PeftMethod
from tunesmith.plugin.session import Session
from tunesmith.testing.tiny import tiny_llama, tiny_session, tiny_tokenizer
from tunesmith_plugins.exporters.merge import Merge, MergeConfig
from tunesmith_plugins.quantizers.bitsandbytes import BitsAndBytes, BitsAndBytesConfig
from tunesmith_plugins.quantizers.nf4 import NF4, NF4Config

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = [list(range(3, 40)), list(range(100, 150, 2))]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STACKS = ["gate_up_proj", "down_proj"]


class Lora(PeftMethod[dict[str, Any]]):
    """PEFT's LoRA with any of its options, over layers of ours."""

    def peft_config(self, model: Any) -> Any:
        options = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **self.config}
        return peft.LoraConfig(**options)


def llama(directory: Path) -> Path:
    return tiny_llama(
        directory, hidden_size=64, num_attention_heads=4, intermediate_size=64, attention_bias=True
    )


def mixtral(directory: Path) -> Path:
    return saved(
        directory,
        MixtralConfig(
            vocab_size=271,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            initializer_range=0.1,
        ),
    )


def gpt2(directory: Path) -> Path:
    """Its layers hold [in, out]; c_proj of the attention is square."""
    return saved(
        directory,
        GPT2Config(
            vocab_size=271, n_embd=64, n_layer=1, n_head=4, n_positions=64, initializer_range=0.1
        ),
    )


def saved(directory: Path, config: Any) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


BASES = {"llama": llama, "mixtral": mixtral, "gpt2": gpt2}
ADAPTERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {"target_modules": LINEAR[:4], "target_parameters": STACKS},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
}


def session_on(
    place: Path, base: str, *, quantizer: Any = None, dtype: Any = None, **options: Any
) -> Session:
    """Return a session with an adapter that says something and is on the disk."""
    method = Lora(ADAPTERS[base] | options)
    session = tiny_session(
        BASES[base](place / "base"), quantizer=quantizer, method=method, dtype=dtype
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in session.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    method.save(session.model, place / "adapter")
    return session.with_adapter("sft", place / "adapter")


def exported(session: Session, place: Path, **options: Any) -> Any:
    """Merge and return what stock transformers opens, in the saved dtype."""
    place.mkdir(exist_ok=True)
    Merge(MergeConfig(**options)).export(session, place)
    return AutoModelForCausalLM.from_pretrained(place, dtype="auto")


def distance(ours: Any, theirs: Any) -> float:
    pairs = zip(row_logits(ours, ROWS), row_logits(theirs, ROWS), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def on_dequantized_base(session: Session, place: Path) -> Any:
    """Return stock PEFT's adapter on a plain model with the values that the quantizer holds."""
    base = session.quantizer.load(session.base, dtype=torch.float32, device=torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(session.base, dtype=torch.float32)
    held = merging.merging(base, session.quantizer).weights
    missing = plain.load_state_dict({name: make() for name, make in held.items()}, strict=False)
    assert not missing.unexpected_keys
    return peft.PeftModel.from_pretrained(plain, place / "adapter")


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 40}},
    "bias": {"bias": "all"},
    "lora bias": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "head and embedding": {"target_modules": [*LINEAR, "lm_head", "embed_tokens"]},
    "embedding alone, tied": {"target_modules": ["embed_tokens"]},
    "trained whole": {"modules_to_save": ["lm_head", "norm"]},
    "a parameter and layers": {"target_parameters": ["up_proj.weight"],
                               "target_modules": ["q_proj"]},
    "tokens": {"trainable_token_indices": [5, 6, 7]},
}  # fmt: skip


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_adapter_merges_into_what_it_computes(tmp_path: Path, kind: str) -> None:
    session = session_on(tmp_path, "llama", **KINDS[kind])
    model = exported(session, tmp_path / "out")
    assert distance(model, on_dequantized_base(session, tmp_path)) < 1e-4


QUANTIZERS: dict[str, Any] = {
    "none": lambda: None,
    "nf4": lambda: NF4(NF4Config()),
    "4-bit": lambda: BitsAndBytes(BitsAndBytesConfig(bits=4)),
    "8-bit": lambda: BitsAndBytes(BitsAndBytesConfig(bits=8)),
}


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("quantizer", list(QUANTIZERS))
def test_every_base_merges_into_the_adapter_on_its_dequantized_weights(
    tmp_path: Path, base: str, quantizer: str
) -> None:
    session = session_on(tmp_path, base, quantizer=QUANTIZERS[quantizer]())
    model = exported(session, tmp_path / "out")
    assert distance(model, on_dequantized_base(session, tmp_path)) < 1e-4


def test_dora_merges_on_a_base_of_bitsandbytes(tmp_path: Path) -> None:
    session = session_on(tmp_path, "llama", quantizer=QUANTIZERS["4-bit"](), use_dora=True)
    model = exported(session, tmp_path / "out")
    assert distance(model, on_dequantized_base(session, tmp_path)) < 1e-3


@pytest.mark.parametrize("saved_as", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("base", ["llama", "mixtral"])
def test_weights_are_rounded_once_to_the_dtype_that_is_asked_for(
    tmp_path: Path, base: str, saved_as: str
) -> None:
    session = session_on(tmp_path, base, dtype=torch.bfloat16)
    exact = merging.merging(session.model, session.quantizer).weights
    want = {name: make() for name, make in exact.items()}
    state = exported(session, tmp_path / "out", dtype=saved_as).state_dict()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[saved_as]
    assert all(state[name].equal(weight.to(dtype)) for name, weight in want.items())


def test_merging_leaves_the_adapter_and_its_base_as_they_were(tmp_path: Path) -> None:
    """In fp32 the base's weights are read as they lie in memory, and must not be added to."""
    session = session_on(tmp_path, "llama")
    model = session.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for make in merging.merging(model, session.quantizer).weights.values():
        make()
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_a_tied_head_stays_tied_where_neither_is_adapted(tmp_path: Path) -> None:
    model = exported(session_on(tmp_path, "llama"), tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_without_verifying_it_writes_the_same_files(tmp_path: Path) -> None:
    session = session_on(tmp_path, "mixtral")
    exported(session, tmp_path / "a")
    exported(session, tmp_path / "b", verify=False)
    a, b = (load_file(tmp_path / each / "model.safetensors") for each in "ab")
    assert a.keys() == b.keys()
    assert all(a[name].equal(b[name]) for name in a)


def test_an_adapter_of_nan_is_not_merged(tmp_path: Path) -> None:
    session = session_on(tmp_path, "llama")
    with torch.no_grad():
        next(p for n, p in session.model.named_parameters() if "lora_A" in n)[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"lora_A.* holds NaN or Inf"):
        exported(session, tmp_path / "out", verify=False)


class TestPlantedFaults:
    """What has gone wrong, or could, is put in; each must be found and named."""

    def fails(self, session: Session, tmp_path: Path, match: str) -> None:
        with pytest.raises(ModelError, match=match):
            exported(session, tmp_path / "out")

    def plant(self, monkeypatch: pytest.MonkeyPatch, name: str, spoil: Any) -> None:
        """Spoil what merging makes of the first weight of that name."""
        honest = merging.merged_weight
        count = {"left": 1}

        def once(each: Adapted, value: torch.Tensor, dense: Any) -> torch.Tensor:
            merged = honest(each, value, dense)
            if each.name == name and count["left"] and merged.dim() > 1:
                count["left"] -= 1
                return spoil(merged, value)
            return merged

        monkeypatch.setattr(merging, "merged_weight", once)

    @pytest.mark.parametrize(
        ("fault", "spoil"),
        {
            "one update left out": lambda merged, base: base,
            "scaled by two": lambda merged, base: 2 * merged - base,
            "the wrong way round": lambda merged, base: base + (merged - base).T,
            "subtracted": lambda merged, base: 2 * base - merged,
        }.items(),
    )
    def test_one_layer_that_is_wrong(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, spoil: Any
    ) -> None:
        session = session_on(tmp_path, "llama", target_modules=["q_proj", "o_proj"])
        self.plant(monkeypatch, "weight", spoil)
        self.fails(session, tmp_path, r"layers\.0.*does not do what the adapter does")

    def test_one_layer_whose_update_is_tiny(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Far below what bf16 can show in the logits."""
        session = session_on(tmp_path, "llama", lora_alpha=0.02)
        self.plant(monkeypatch, "weight", lambda merged, base: base)
        self.fails(session, tmp_path, r"differs by 1 of the adapter's update")

    @pytest.mark.parametrize("stack", STACKS)
    def test_one_expert_left_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stack: str
    ) -> None:
        def without(merged: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
            merged[2] = base[2]
            return merged

        session = session_on(tmp_path, "mixtral")
        self.plant(monkeypatch, stack, without)
        self.fails(session, tmp_path, rf"experts\.{stack}: .*in part 2")

    def test_one_of_two_nested_wrappers_left_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As it was: the walk stopped at the outer of PEFT's two wrappers around the experts."""
        session = session_on(tmp_path, "mixtral")
        monkeypatch.setattr(
            Adapted,
            "own",
            property(
                lambda each: tuple(
                    layer
                    for layer in each.layers[:1]
                    if getattr(layer, "parameter_name", each.name) == each.name
                )
            ),
        )
        self.fails(session, tmp_path, r"experts.*lora_A.weight.* would not be merged exactly once")

    def test_another_adapter_than_the_active_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        session = session_on(tmp_path, "llama")
        model = session.model
        model.add_adapter("other", model.peft_config["default"])
        honest = merging.LoraLayer.merge
        monkeypatch.setattr(
            merging,
            "_merge",
            lambda layer: honest(layer, safe_merge=False, adapter_names=["other"]),
        )
        self.fails(session, tmp_path, "does not do what the adapter does")

    def test_a_weight_of_conv1d_the_wrong_way_round(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As it was: on a base of bitsandbytes, whose layers hold [out, in]."""
        session = session_on(tmp_path, "gpt2", quantizer=QUANTIZERS["4-bit"]())
        monkeypatch.setattr(Adapted, "transposed", property(lambda each: False))
        self.fails(session, tmp_path, "does not|merged to|of another shape|mat1|is not what")

    def test_a_tied_head_lost(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        session = session_on(tmp_path, "llama", target_modules=["lm_head"])
        monkeypatch.setattr(merging, "_tied", lambda base, walk: {"lm_head.weight"})
        self.fails(session, tmp_path, r"lm_head.*would not be merged exactly once")

    def test_a_weight_that_is_written_otherwise(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        honest = ShardWriter.add

        def add(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
            honest(self, name, tensor + (name == "model.norm.weight"))

        monkeypatch.setattr(ShardWriter, "add", add)
        session = session_on(tmp_path, "llama")
        self.fails(session, tmp_path, r"is not what was to be written: model\.norm\.weight")

    def test_a_weight_that_is_not_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        honest = ShardWriter.add

        def add(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
            if "experts.3.w2" not in name:
                honest(self, name, tensor)

        monkeypatch.setattr(ShardWriter, "add", add)
        self.fails(session_on(tmp_path, "mixtral"), tmp_path, "does not take the merged model")

    def test_a_setting_that_is_lost(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """No weight is wrong then, only what is made of them."""
        honest = saving._save_config

        def other(model: Any, directory: Path, *rest: Any) -> None:
            honest(model, directory, *rest)
            config = json.loads((directory / "config.json").read_text())
            config["rms_norm_eps"] = 1.0
            (directory / "config.json").write_text(json.dumps(config))

        monkeypatch.setattr(saving, "_save_config", other)
        session = session_on(tmp_path, "llama")
        self.fails(session, tmp_path, "does not compute what the adapter on its base computes")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_quantizer_that_reads_its_weights_back_as_others(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
    ) -> None:
        session = session_on(tmp_path, "llama", quantizer=NF4(NF4Config()), dtype=dtype)
        honest = NF4.dense_weight
        monkeypatch.setattr(NF4, "dense_weight", lambda self, m: honest(self, m).flip(0))
        self.fails(session, tmp_path, "does not compute what the adapter on its base computes")

    def test_each_of_them_passes_without_the_fault(self, tmp_path: Path) -> None:
        for number, base in enumerate(BASES):
            exported(session_on(tmp_path / base, base), tmp_path / f"out{number}")


class TestLogits:
    def test_one_token_sent_to_another_expert_is_no_fault(self) -> None:
        logits = [torch.randn(20, 50)]
        other = [logits[0].clone()]
        other[0][3] = torch.randn(50)
        assert proof.compare_logits(logits, other, 1e-3) == 0.0

    def test_every_token_a_little_off_is_one(self) -> None:
        logits = [torch.randn(20, 50)]
        with pytest.raises(ModelError, match="does not compute"):
            proof.compare_logits(logits, [logits[0] * 1.01], 1e-3)

    def test_numbers_that_are_not_finite_are_one(self) -> None:
        logits = [torch.randn(20, 50)]
        with pytest.raises(ModelError, match="does not compute"):
            proof.compare_logits(logits, [logits[0] * float("nan")], 1e-1)


def test_what_a_model_computes_in_fp32_is_not_rounded(tmp_path: Path) -> None:
    """DeepSeek's bias that decides between experts, which 16 bits would make another one."""
    config = DeepseekV3Config(
        vocab_size=271,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    base = saved(tmp_path / "base", config)
    tensors = load_file(base / "model.safetensors")
    name = next(key for key in tensors if "e_score_correction_bias" in key)
    tensors[name] = torch.tensor([0.1234567, 0.7654321, 0.3, 0.0])
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    session = tiny_session(base, dtype=torch.bfloat16)
    (tmp_path / "out").mkdir()
    Merge(MergeConfig()).export(session, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged[name].equal(tensors[name])
    assert merged["model.norm.weight"].dtype == torch.bfloat16
