"""What is predicted before a run is near what the run takes."""

from __future__ import annotations

import pytest

from tunesmith.testing.tiny import tiny_llama

MEASURE = """
import json, sys, threading, time
from pathlib import Path
import torch, peft, transformers
from transformers.models.llama import modeling_llama
from tunesmith import Tuner
from tunesmith.engine.plan import make_plan
from tunesmith.engine.runner import run
from tunesmith.plugin.registry import registry

model, out, checkpointing = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "yes"
rows = [{"instruction": f"write {n}", "output": "the quick brown fox " * 200} for n in range(4)]
tuner = Tuner(model, precision=sys.argv[4]).quantize("nf4").lora(r=16).sft(
    rows, max_steps=2, batch_size=4, gradient_accumulation=1, max_length=512,
    gradient_checkpointing=checkpointing,
)
predicted = make_plan(tuner.recipe, registry()).steps[2].estimate.memory_bytes
with Peak() as peak:
    run(tuner.recipe, out, registry())
print(json.dumps([predicted, peak.bytes]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", ["no", "yes"])
def test_predicted_memory_is_within_half_of_what_is_measured(
    tmp_path, measured, checkpointing, precision
):
    model = tiny_llama(
        tmp_path / "model",
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=16000,
    )
    predicted, peak = measured(MEASURE, model, tmp_path / "run", checkpointing, precision)
    assert 1 / 1.5 < predicted / peak < 1.5
