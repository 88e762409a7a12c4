"""What a model name may mean, and that a .gguf becomes exactly what transformers makes of it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.engine.models import find_model, local_directory
from tunesmith.errors import ModelError
from tunesmith.testing.tiny import tiny_llama


def test_a_directory_a_gguf_file_and_a_hub_id_are_told_apart(tiny_model, tmp_path):
    gguf = tmp_path / "small.gguf"
    gguf.write_bytes(b"GGUF")
    assert find_model(str(tiny_model)).kind == "directory"
    assert find_model(str(gguf)).kind == "gguf"
    assert find_model("HuggingFaceTB/SmolLM2-135M-Instruct").kind == "hub"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "no such file or directory"),
        ("{dir}", "holds no config.json"),
        ("{dir}/model.bin", "a .bin file; expected a hub id"),
        ("{dir}/modell.gguf", r"no such file or directory; did you mean 'model.gguf'"),
    ],
)
def test_what_is_no_model_is_refused_with_what_was_found(tmp_path, name, message):
    (tmp_path / "model.bin").write_bytes(b"x")
    if "modell" in name:
        (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=message):
        find_model(name.format(dir=tmp_path))


def test_a_directory_of_gguf_files_asks_which(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"name one of them: a\.gguf"):
        find_model(str(tmp_path))


def test_a_hub_id_that_cannot_be_had_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="not to be had from the hub"):
        local_directory(find_model("nobody/nothing"))


def test_a_gguf_is_converted_to_what_transformers_makes_of_it(real_gguf, real_model):
    from safetensors.torch import load_file
    from transformers import GgufConfig

    theirs = AutoModelForCausalLM.from_pretrained(
        real_gguf.parent,
        gguf_file=real_gguf.name,
        quantization_config=GgufConfig(dequantize=True),
    ).state_dict()
    ours = load_file(real_model / "model.safetensors")
    assert set(theirs) - set(ours) == {"lm_head.weight"}  # tied: saved once
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    assert tokenizer.chat_template
    assert tokenizer.eos_token == "<|im_end|>"


def test_nf4_loading_never_holds_the_16_bit_model(tmp_path, load_nf4_measured):
    # 8 layers of 1024 x 1024 and 1024 x 4096: 269 MB in 16 bits, of which 4 MB are embeddings
    directory = tiny_llama(
        tmp_path / "model",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    del model
    peak, held = load_nf4_measured(directory)
    largest = 1024 * 4096 * 2
    assert held < 0.3 * dense
    assert peak < held + 4 * largest
