"""What quantizing while loading holds in memory, and that threads do not change what it makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tunesmith.nn.nf4_linear import NF4Linear
from tunesmith.testing.tiny import tiny_llama
from tunesmith_plugins.quantizers.nf4 import NF4, NF4Config

CPU = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def saved(directory: Path, dtype: str, **sizes: Any) -> Path:
    """Save a random Llama with its weights in that dtype; return where."""
    tiny_llama(directory, dtype=dtype, **sizes)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=DTYPES[dtype])
    model.save_pretrained(directory)
    return directory


# a weight stored in fp32 is cast as it is read, so it takes the process's own memory; one in bf16
# stays in pages of the file
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_the_peak_is_the_quantized_model_and_two_tensors(
    tmp_path: Path, load_nf4_measured: Callable[[Path], tuple[int, int]], stored: str
) -> None:
    directory = saved(
        tmp_path,
        stored,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    peak, held = load_nf4_measured(directory)
    largest = 1024 * 4096 * torch.bfloat16.itemsize
    assert peak <= 1.1 * held + 2 * largest


# 28,512 scales a weight: from 32,768 on torch itself sums with threads, so that the mean of the
# scales can differ in its last bit, there as in bitsandbytes
def test_threads_do_not_change_what_is_loaded(tmp_path: Path) -> None:
    directory = saved(
        tmp_path,
        "bfloat16",
        hidden_size=1152,
        intermediate_size=1584,
        num_hidden_layers=1,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    before = torch.get_num_threads()
    try:
        loaded = {threads: loaded_by(threads, directory) for threads in (1, 2, 3, 8)}
    finally:
        torch.set_num_threads(before)
    alone = loaded.pop(1)
    assert len(alone) == 7
    for threads, other in loaded.items():
        assert other.keys() == alone.keys()
        for name, parts in alone.items():
            assert all(map(torch.equal, parts, other[name])), (name, threads)


def loaded_by(threads: int, directory: Path) -> dict[str, list[torch.Tensor]]:
    """Load with so many threads; return the bytes of every 4-bit layer's tensors."""
    torch.set_num_threads(threads)
    model = NF4(NF4Config()).load(directory, dtype=torch.bfloat16, device=CPU)
    return {
        name: [part.reshape(-1).view(torch.uint8) for part in module.buffers()]
        for name, module in model.named_modules()
        if isinstance(module, NF4Linear)
    }
