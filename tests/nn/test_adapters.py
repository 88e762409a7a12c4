"""Adapters are counted on saving and on loading: by names, shapes and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tools.architectures.families import make_model
from tunesmith.errors import ModelError
from tunesmith.nn.adapters import check_loaded, check_saved, open_adapter
from tunesmith.plugin.methods import PeftMethod
from tunesmith.testing.conformance import _shake
from tunesmith.testing.tiny import tiny_llama, tiny_session

FILE = "adapter_model.safetensors"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "lora bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "embedding trained whole": {"modules_to_save": ["embed_tokens"]},
    "alpha and rank patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 9}},
    "tokens": {"trainable_token_indices": [3, 7]},
    "stacked": {"target_parameters": ["up_proj.weight"], "target_modules": ["q_proj"]},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "base", attention_bias=True)


def adapted(base: Path, **options: Any) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"], **options}
    model = AutoModelForCausalLM.from_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    _shake(wrapped)
    return wrapped


def loaded(base: Path, directory: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, directory, is_trainable=True)


def edited(directory: Path, edit: Any) -> None:
    tensors = load_file(directory / FILE)
    edit(tensors)
    save_file(tensors, directory / FILE, metadata={"format": "pt"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", list(KINDS))
def test_whatever_is_trained_goes_through_a_file_and_is_counted(
    base: Path, tmp_path: Path, kind: str
) -> None:
    model = adapted(base, **KINDS[kind])
    model.save_pretrained(tmp_path / "adapter")
    check_saved(model, tmp_path / "adapter")
    check_loaded(loaded(base, tmp_path / "adapter"), tmp_path / "adapter")


@pytest.mark.filterwarnings("ignore")
def test_names_that_are_right_already_are_not_changed_as_those_of_old_checkpoints(
    tmp_path: Path,
) -> None:
    """For transformers' pattern `mlp.shared_expert.` ends in any character, in PEFT as well."""
    make_model("laguna", tmp_path / "base")
    experts = ["shared_experts.gate_proj", "shared_experts.down_proj"]
    adapted(tmp_path / "base", target_modules=experts).save_pretrained(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    check_loaded(open_adapter(model, tmp_path / "adapter"), tmp_path / "adapter")


class TestLoading:
    @pytest.fixture
    def adapter(self, base: Path, tmp_path: Path) -> Path:
        adapted(base).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    @pytest.mark.filterwarnings("ignore:Found missing adapter keys")
    def test_a_missing_key_is_an_error_that_names_it(self, base: Path, adapter: Path) -> None:
        """PEFT warns, and leaves the layer as it was made: B = 0, so that half an adapter acts."""
        edited(adapter, lambda t: t.pop(sorted(t)[0]))
        with pytest.raises(ModelError, match=r"layers.0.*lora_A.weight missing in the file"):
            check_loaded(loaded(base, adapter), adapter)

    def test_an_unknown_key_is_an_error_that_names_it(self, base: Path, adapter: Path) -> None:
        edited(adapter, lambda t: t.update({"base_model.model.extra.lora_A.weight": torch.ones(1)}))
        with pytest.raises(ModelError, match=r"extra\.lora_A\.weight not in the model"):
            check_loaded(loaded(base, adapter), adapter)

    def test_other_values_than_the_files_are_an_error(self, base: Path, adapter: Path) -> None:
        model = loaded(base, adapter)
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad)[0, 0] += 1
        with pytest.raises(ModelError, match=r"lora_A\.weight of other values"):
            check_loaded(model, adapter)

    def test_an_adapter_kept_in_16_bits_is_no_other(self, base: Path, adapter: Path) -> None:
        edited(adapter, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
        check_loaded(loaded(base, adapter), adapter)

    @pytest.mark.filterwarnings("ignore:Found missing adapter keys")
    def test_a_session_that_goes_on_from_a_broken_adapter_stops(
        self, base: Path, adapter: Path
    ) -> None:
        class Lora(PeftMethod[None]):
            def peft_config(self, model: Any) -> Any:
                return peft.LoraConfig.from_pretrained(adapter)

        session = tiny_session(base, method=Lora(None)).with_adapter("sft", adapter)
        assert session.model is not None
        session.unload()
        edited(adapter, lambda t: t.pop(sorted(t)[0]))
        with pytest.raises(ModelError, match="missing in the file"):
            assert session.model is not None


class TestSaving:
    def test_a_trained_tensor_that_peft_would_not_keep_is_an_error(
        self, base: Path, tmp_path: Path
    ) -> None:
        model = adapted(base)
        model.base_model.model.model.norm.weight.requires_grad_(True)
        model.save_pretrained(tmp_path / "adapter")
        with pytest.raises(ModelError, match=r"norm\.weight was trained and would not be kept"):
            check_saved(model, tmp_path / "adapter")

    def test_a_file_that_holds_something_else_is_an_error(self, base: Path, tmp_path: Path) -> None:
        model = adapted(base)
        model.save_pretrained(tmp_path / "adapter")
        edited(tmp_path / "adapter", lambda t: t[sorted(t)[1]].mul_(2))
        with pytest.raises(ModelError, match=r"not the one that was trained: .*of other values"):
            check_saved(model, tmp_path / "adapter")

    def test_half_a_file_is_an_error(self, base: Path, tmp_path: Path) -> None:
        model = adapted(base)
        model.save_pretrained(tmp_path / "adapter")
        whole = (tmp_path / "adapter" / FILE).read_bytes()
        (tmp_path / "adapter" / FILE).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ModelError, match="cannot be read"):
            check_saved(model, tmp_path / "adapter")
