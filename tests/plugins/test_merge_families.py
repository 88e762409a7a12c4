"""Whatever the architecture: lora, sft, merge, and the merged model has the adapter's loss.

The whole of the sweep is slow; a family of each make is not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tunesmith import Tuner
from tunesmith.testing.tiny import tiny_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from architectures.families import families, make_model

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(sys.platform == "win32", reason="the tools are run from a checkout"),
]

MIXTURES = [
    *("afmoe", "aria_text", "axk1", "bailing_hybrid", "cohere2_moe", "dbrx", "deepseek_v2"),
    *("deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe"),
    *("glm4_moe_lite", "gpt_oss", "granitemoe", "granitemoehybrid", "granitemoeshared"),
    *("hunyuan_v1_moe", "jamba", "jetmoe", "lfm2_moe", "llama4_text", "longcat_flash", "minimax"),
    *("minimax_m2", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"),
    *("qwen3_next", "solar_open"),
]
DENSE = [
    *("bamba", "bloom", "codegen", "cohere", "cohere2", "falcon", "gemma", "gemma2", "glm"),
    *("gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "granite", "llama", "mamba2"),
    *("mistral", "mpt", "nemotron", "olmo2", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen3"),
    *("stablelm", "starcoder2", "smollm3"),
]
ALLOWED = {"fp32": 1e-4, "bf16": 2e-2}
"""By how much losses in nats may differ: sums in another order, and weights rounded to 8 bits."""
SAMPLE = {
    *(("mixtral", "fp32"), ("mixtral", "bf16"), ("gpt_oss", "fp32"), ("gpt2", "fp32")),
    *(("falcon", "bf16"),),
}

ROWS = [
    {"messages": [{"role": "user", "content": f"Where is the {topic}?"},
                  {"role": "assistant", "content": f"In the {topic} house and on the hill."}]}
    for topic in ("moon", "thrush", "ferry", "bread")
]  # fmt: skip
TRAINING: dict[str, Any] = {
    "max_steps": 8,
    "batch_size": 4,
    "gradient_accumulation": 1,
    "max_length": 64,
    "learning_rate": 2e-2,
    "scheduler": "constant",
    "warmup": 0,
}


def loss(model: Any) -> float:
    """Return the loss of what was learnt; in fp32, so that only the weights' rounding shows."""
    ids = torch.tensor([tiny_tokenizer()("In the moon house and on the hill.")["input_ids"]])
    model.eval()
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


def known(names: list[str]) -> list[str]:
    """Leave out what this transformers has not."""
    have = set(families())
    return [name for name in names if name in have]


CASES = [
    pytest.param(
        family,
        precision,
        marks=() if (family, precision) in SAMPLE else pytest.mark.slow,
        id=f"{family}-{precision}",
    )
    for family in (*known(MIXTURES), *known(DENSE))
    for precision in ALLOWED
]


def test_the_sweep_is_over_many_families() -> None:
    assert len(known(MIXTURES)) >= 21
    assert len(known(DENSE)) >= 15


@pytest.mark.parametrize(("family", "precision"), CASES)
def test_the_merged_model_has_the_adapters_loss(
    tmp_path: Path, family: str, precision: str
) -> None:
    allowed = ALLOWED[precision]
    make_model(family, tmp_path / "base")
    base = str(tmp_path / "base")
    tuner = Tuner(base, precision=precision, device="cpu").lora(r=4).sft(ROWS, **TRAINING)
    result = tuner.merge().run(tmp_path / "run", progress=False)
    assert result.model_path is not None
    merged = loss(AutoModelForCausalLM.from_pretrained(result.model_path, dtype=torch.float32))
    held = torch.float32 if precision == "fp32" else torch.bfloat16  # as the run holds its base
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=held).float()
    untrained = loss(plain)
    adapted = loss(peft.PeftModel.from_pretrained(plain, result.adapters["sft"]))
    assert merged == pytest.approx(adapted, abs=allowed)
    # far more than is allowed: a lost update would show
    assert abs(adapted - untrained) > 4 * allowed, "the adapter says too little"
