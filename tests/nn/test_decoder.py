"""Decoding layer by layer gives transformers' tokens, or leaves the model to transformers."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_sizes import SIZES
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from tunesmith.nn import fused_layers
from tunesmith.nn.decoder import Decoder, generate
from tunesmith.nn.lora_linear import register
from tunesmith.nn.nf4_linear import NF4Linear
from tunesmith.ops import native_status

pytestmark = pytest.mark.skipif(
    native_status().isa in ("", "scalar"), reason="there are no vector kernels on this machine"
)

_SIZES = {
    **SIZES,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
KNOWN: dict[str, Any] = {
    "llama": LlamaConfig(**_SIZES),
    "llama, scaled rope": LlamaConfig(
        **_SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ),
    "mistral": MistralConfig(**_SIZES, sliding_window=None),
    "mistral, wide window": MistralConfig(**_SIZES, sliding_window=64),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES, head_dim=32),
    "gemma": GemmaConfig(**_SIZES, head_dim=16),
}
STRANGE: dict[str, tuple[Any, str]] = {
    "window": (MistralConfig(**_SIZES, sliding_window=5), "sliding_window"),
    "soft caps": (Gemma2Config(**_SIZES, head_dim=16), "made otherwise|softcapping"),
    "gate and up in one": (Phi3Config(**_SIZES), "made otherwise"),
    "gpt2": (
        GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64),
        "made otherwise",
    ),
    "a rope for each kind of layer": (
        Gemma3TextConfig(**_SIZES, head_dim=16),
        "made otherwise|rot",
    ),
    "scale by position": (
        Ministral3Config(
            **_SIZES,
            head_dim=16,
            sliding_window=None,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e4,
                "llama_4_scaling_beta": 0.5,
                "original_max_position_embeddings": 16,
            },
        ),
        "goes by positions",
    ),
    "dynamic rope": (
        LlamaConfig(
            **_SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        ),
        "depends on the length",
    ),
}
PROMPTS = torch.tensor([[(7 * k + s) % 60 + 3 for k in range(9)] for s in (0, 3, 11)])


def model_of(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(dtype).eval()
    for parameter in model.parameters():  # so that no two tokens are about as likely
        parameter.data.mul_(3.0)
    return model


def with_adapter(model: Any, quantized: bool) -> Any:
    """Return the model with LoRA on its projections, and those in NF4 if asked for."""
    if quantized:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear and name.endswith("_proj"):
                    setattr(module, name, NF4Linear.from_linear(child))
    config = register(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    return get_peft_model(model, config).eval()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, logger="tunesmith")
    return caplog


def both(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Return what transformers gives and what we give."""
    options = {"input_ids": PROMPTS, "max_new_tokens": 20, "do_sample": False, **options}
    options.setdefault("attention_mask", torch.ones_like(options["input_ids"]))
    torch.manual_seed(1)
    theirs = model.generate(**options)
    torch.manual_seed(1)
    with torch.no_grad():
        return theirs, generate(model, **options)


@pytest.mark.parametrize("name", KNOWN)
def test_tokens_are_those_of_transformers(name: str, log: pytest.LogCaptureFixture) -> None:
    theirs, ours = both(model_of(KNOWN[name]))
    assert torch.equal(ours, theirs)
    assert "layer by layer" in log.text
    assert "as transformers" not in log.text


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_with_an_adapter(quantized: bool, merged: bool, log: pytest.LogCaptureFixture) -> None:
    model = with_adapter(model_of(KNOWN["llama"]), quantized)
    if merged:
        rounds = pytest.warns(UserWarning, match="4 bits again")
        with rounds if quantized else contextlib.nullcontext():
            model.merge_adapter()
    theirs, ours = both(model)
    assert torch.equal(ours, theirs)
    assert "as transformers" not in log.text


def test_layers_in_4_bits_run_in_one_native_call() -> None:
    mask = torch.ones_like(PROMPTS)

    def at_once(model: Any) -> bool:
        with torch.no_grad():
            found = Decoder.of(model.get_base_model(), PROMPTS, mask, 16)
        assert isinstance(found, Decoder)
        return found._at_once is not None

    assert at_once(with_adapter(model_of(KNOWN["qwen3"]), quantized=True))
    assert not at_once(with_adapter(model_of(KNOWN["qwen3"]), quantized=False))


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "gemma"])
def test_layers_in_4_bits_of_other_kinds(name: str, log: pytest.LogCaptureFixture) -> None:
    theirs, ours = both(with_adapter(model_of(KNOWN[name]), quantized=True))
    assert torch.equal(ours, theirs)
    assert "as transformers" not in log.text


def test_in_bf16_logits_are_close(log: pytest.LogCaptureFixture) -> None:
    model = with_adapter(model_of(KNOWN["llama"], torch.bfloat16), quantized=True)
    inner = model.get_base_model()
    mask = torch.ones_like(PROMPTS)
    with torch.no_grad():
        found = Decoder.of(inner, PROMPTS, mask, 16)
        assert isinstance(found, Decoder)
        ids = PROMPTS
        for token in range(3, 8):
            ids = torch.cat([ids, torch.full((3, 1), token)], dim=-1)
            ours = found.step(ids[:, -1]).float()
            theirs = inner(ids).logits[:, -1].float()
            assert float((ours - theirs).norm() / theirs.norm()) <= 3e-2


def test_padded_prompts_and_rows_that_end_early(log: pytest.LogCaptureFixture) -> None:
    mask = torch.ones_like(PROMPTS)
    mask[1, :4] = 0
    mask[2, :1] = 0
    prompts = PROMPTS * mask
    model = model_of(KNOWN["llama"])
    free, _ = both(model, input_ids=prompts, attention_mask=mask)
    stop = int(free[1, 12])  # the second row's fourth new token
    theirs, ours = both(model, input_ids=prompts, attention_mask=mask, eos_token_id=[1, stop])
    assert torch.equal(ours, theirs)
    assert int((ours[1, 13:] != 0).sum()) == 0
    assert "as transformers" not in log.text


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0},
        {"do_sample": True, "top_k": 5},
        {"repetition_penalty": 1.4},
        {"do_sample": True, "num_return_sequences": 2},
        {"min_new_tokens": 20, "eos_token_id": list(range(64))},
        {"use_cache": False},
    ],
    ids=str,
)
def test_options_mean_the_same(options: dict[str, Any], log: pytest.LogCaptureFixture) -> None:
    theirs, ours = both(model_of(KNOWN["llama"]), **options)
    assert torch.equal(ours, theirs)
    assert "layer by layer" in log.text
    assert "as transformers" not in log.text


@pytest.mark.parametrize("name", STRANGE)
def test_other_models_are_decoded_by_transformers(name: str, log: pytest.LogCaptureFixture) -> None:
    config, why = STRANGE[name]
    theirs, ours = both(model_of(config), pad_token_id=0)
    assert torch.equal(ours, theirs)
    [line] = [r.getMessage() for r in log.records if "as transformers" in r.getMessage()]
    assert re.search(why, line)


def test_what_only_the_numbers_show_is_found(log: pytest.LogCaptureFixture) -> None:
    model = model_of(KNOWN["llama"])

    class Scaled(type(model.model.layers[1])):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs) * 1.3 + 0.1

    model.model.layers[0].__class__ = Scaled
    theirs, ours = both(model)
    assert torch.equal(ours, theirs)
    assert "logits differ" in log.text


def test_hooks_and_options_that_are_not_known(log: pytest.LogCaptureFixture) -> None:
    model = model_of(KNOWN["llama"])
    theirs, ours = both(model, num_beams=2)
    assert torch.equal(ours, theirs)
    assert "num_beams is set" in log.text
    generate(model, input_ids=PROMPTS, max_new_tokens=2, return_dict_in_generate=True)
    assert "the option return_dict_in_generate is given" in log.text
    seen: list[int] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    both(model, max_new_tokens=3)
    assert len(seen) == 6
    assert "a hook on LlamaMLP" in log.text
    log.clear()
    model.train()
    both(model, max_new_tokens=3)
    assert "training mode" in log.text


def test_a_window_that_is_reached_is_left_to_transformers(log: pytest.LogCaptureFixture) -> None:
    model = model_of(KNOWN["mistral, wide window"])
    theirs, ours = both(model, max_new_tokens=64)
    assert torch.equal(ours, theirs)
    assert "sliding_window" in log.text


def test_fused_layers_do_not_stand_in_the_way(log: pytest.LogCaptureFixture) -> None:
    model = model_of(KNOWN["llama"])
    fused_layers.use(model)
    theirs, ours = both(model)
    assert torch.equal(ours, theirs)
    assert "as transformers" not in log.text


def test_a_prompt_of_one_token(log: pytest.LogCaptureFixture) -> None:
    theirs, ours = both(model_of(KNOWN["llama"]), input_ids=PROMPTS[:, :1])
    assert torch.equal(ours, theirs)
    assert "as transformers" not in log.text


def test_what_was_trained_in_between_counts() -> None:
    model = with_adapter(model_of(KNOWN["llama"]), quantized=True)
    before = both(model)[1]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(-2.0)
    theirs, ours = both(model)
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, before)
