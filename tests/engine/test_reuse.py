"""What a stage makes is the same bytes whichever of the earlier stages were reused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith import Tuner
from tunesmith.engine.runner import run
from tunesmith.plugin.events import StageFinished, StageReused
from tunesmith.plugin.registry import registry

QUICK = {"batch_size": 4, "gradient_accumulation": 1, "learning_rate": 1e-2, "max_steps": 3}
CLOCKS = ("seconds", "per_second", "runtime", "memory_bytes")

Chain = Callable[[Path, Path, Path], Tuner]
CHAINS: dict[str, Chain] = {
    # a base in 16 bits that is measured before it is trained in 32
    "evaluate, full sft in bf16": lambda m, d, p: (
        Tuner(m, precision="bf16").evaluate("loss", d).sft(d, **QUICK).evaluate("loss", d)
    ),
    "full sft, evaluate, dpo, evaluate": lambda m, d, p: (
        Tuner(m, precision="fp32")
        .sft(d, **QUICK)
        .evaluate("loss", d)
        .dpo(p, **QUICK)
        .evaluate("preference_accuracy", p)
    ),
    "sft, dpo, merge": lambda m, d, p: (
        Tuner(m, precision="fp32").lora(r=4).sft(d, **QUICK).dpo(p, **QUICK).merge()
    ),
    "evaluate, sft and dpo with dropout in bf16, evaluate": lambda m, d, p: (
        Tuner(m, precision="bf16")
        .lora(r=4, dropout=0.2)
        .evaluate("loss", d)
        .sft(d, gradient_checkpointing=True, **QUICK)
        .dpo(p, varlen_attention=False, fused_layers=False, **QUICK)
        .evaluate("preference_accuracy", p)
    ),
    "evaluate twice, sft, evaluate twice, merge, evaluate, in nf4": lambda m, d, p: (
        Tuner(m, precision="bf16")
        .quantize("nf4")
        .lora(r=4, dropout=0.1)
        .evaluate("loss", d)
        .evaluate("preference_accuracy", p)
        .sft(d, **QUICK)
        .evaluate("loss", d)
        .evaluate("preference_accuracy", p)
        .merge()
        .evaluate("loss", d)
    ),
    "bitsandbytes, evaluate, sft, evaluate, dpo, merge": lambda m, d, p: (
        Tuner(m, precision="bf16")
        .quantize("bitsandbytes")
        .lora(r=4)
        .evaluate("loss", d)
        .sft(d, **QUICK)
        .evaluate("loss", d)
        .dpo(p, **QUICK)
        .merge()
    ),
    "sft and dpo with evaluations inside": lambda m, d, p: (
        Tuner(m, precision="fp32")
        .lora(r=4, dropout=0.1)
        .sft(d, eval_split=3, eval_steps=1, **QUICK)
        .dpo(p, eval_split=2, eval_steps=2, **QUICK)
    ),
}
SAMPLE = {"evaluate, full sft in bf16"}


def made(directory: Path, name: str) -> dict[str, Any]:
    """What a stage has made, but for clocks: the bytes of its weights, its figures."""
    found: dict[str, Any] = {}
    stage = directory / "stages" / name
    for file in sorted(stage.rglob("*")):
        if file.suffix in (".safetensors", ".bin") or file.name == "config.json":
            found[str(file.relative_to(stage))] = file.read_bytes()
    record = json.loads((stage / "stage.json").read_text())
    found["metrics"] = {
        key: value for key, value in record["metrics"].items() if not key.endswith(CLOCKS)
    }
    return found


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.slow) for name in CHAINS],
)
def test_a_stage_makes_the_same_whichever_earlier_ones_are_reused(
    name: str, tmp_path: Path, alpaca_file: Path, preference_file: Path
) -> None:
    from tunesmith.testing.tiny import tiny_llama

    if "bitsandbytes" in name:
        pytest.importorskip("bitsandbytes")
    model = tiny_llama(tmp_path / "model", hidden_size=64, intermediate_size=128)
    recipe = CHAINS[name](model, alpaca_file, preference_file).recipe
    whole = tmp_path / "whole"
    events: list[Any] = []
    run(recipe, whole, registry(), [lambda run, event: events.append(event)])
    stages = [event.stage for event in events if isinstance(event, StageFinished)]
    assert len(stages) >= 2
    for kept in range(1, len(stages)):
        again = tmp_path / f"again-{kept}"
        shutil.copytree(whole, again)
        for stage in stages[kept:]:
            shutil.rmtree(again / "stages" / stage)
        events.clear()
        run(recipe, again, registry(), [lambda run, event: events.append(event)])
        reused = [event.stage for event in events if isinstance(event, StageReused)]
        assert reused == stages[:kept]
        for stage in stages[kept:]:
            assert made(again, stage) == made(whole, stage), f"{stage} after {kept} reused"
