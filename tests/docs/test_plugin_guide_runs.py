"""The package files of the guide, installed together and used in a run as a stranger's are."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tunesmith import Data, Tuner
from tunesmith.plugin.registry import registry
from tunesmith.scaffold import KINDS_OF_ONE
from tunesmith.testing import tiny_examples, tiny_llama, tiny_session

pytestmark = pytest.mark.filterwarnings("ignore")

PAGES = Path(__file__).parents[2] / "docs" / "plugins"
FENCED = re.compile(r"^```python\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"<!-- tunesmith plugins new \w+ (\w+) -->")
THINGS = ("moon", "thrush", "ferry", "bread", "lamp", "dog")
ROWS = [
    {
        "question": f"Where is the {thing}?",
        "context": f"A {thing} is in the house!",
        "answers": {"text": [f"In the house, the {thing}!"]},
    }
    for thing in THINGS
]
LONG = {"question": "Who? " * 100, "context": "", "answers": {"text": ["Nobody."]}}
PAIRS = [
    {"prompt": f"Where is the {thing}?", "chosen": f"By the {thing}!", "rejected": "No idea at all"}
    for thing in THINGS
]
PROMPTS = [{"prompt": row["question"], "answer": row["answers"]["text"][0]} for row in ROWS[:2]]
QUICK: dict[str, Any] = {
    "max_steps": 4,
    "batch_size": 2,
    "gradient_accumulation": 1,
    "learning_rate": 5e-2,
    "scheduler": "constant",
}


def blocks(page: str) -> list[str]:
    return FENCED.findall((PAGES / page).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Put the files that the pages show on the path, with metadata as pip would write it."""
    site = tmp_path_factory.mktemp("site")
    modules = {}
    for kind in KINDS_OF_ONE:
        (name,) = NAMED.findall((PAGES / f"{kind}.md").read_text(encoding="utf-8"))
        modules[f"tunesmith_{name}"] = blocks(f"{kind}.md")[0]
    modules["guide_mean_reward"] = blocks("reward.md")[1]
    lines = ["[tunesmith]"]
    for module, source in modules.items():
        (site / f"{module}.py").write_text(source, encoding="utf-8")
        lines.append(f"{module} = {module}")
    info = site / "tunesmith_guide-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tunesmith-guide\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    sys.path.insert(0, str(site))
    registry.cache_clear()
    yield
    sys.path.remove(str(site))
    for module in modules:
        sys.modules.pop(module, None)
    registry.cache_clear()


def chain(model: Path) -> Tuner:
    rows = Data([*ROWS, LONG], format="squad", context=False).transform("brief", characters=200)
    return (
        Tuner(model, device="cpu", precision="fp32")
        .quantize("int8")
        .peft("zora", r=4)
        .evaluate("hits", rows)
        .train("simpo", PAIRS, eval_split=2, **QUICK)
        .evaluate("hits", rows)
        .evaluate("mean_reward", PROMPTS, rewards="word_f1", new_tokens=8)
        .export("card", title="Moon")
    )


@pytest.fixture(scope="module")
def results(installed, tmp_path_factory):
    """Run all of it on a tokenizer without a pad token, and on one with."""
    place = tmp_path_factory.mktemp("runs")
    found = {}
    for name, pad in (("no pad", None), ("pad", "<|endoftext|>")):
        model = tiny_llama(place / name / "model", pad_token=pad)
        found[name] = chain(model).run(place / name / "run", progress=False)
    return found


def test_all_kinds_work_together_without_a_pad_token(results):
    result = results["no pad"]
    trained = result.metrics["04-simpo"]
    assert trained["loss"] < trained["loss_first"]
    assert 0 <= trained["rewards/accuracies"] <= 1
    assert trained["eval_loss"] > 0
    assert "eval_rewards/margins" in trained
    before, after = (result.metrics[name] for name in ("03-evaluate-hits", "05-evaluate-hits"))
    assert before["tokens"] == after["tokens"] > 0
    assert 0 <= result.metrics["06-evaluate-mean_reward"]["reward"] <= 1
    weights = load_file(result.adapters["simpo"] / "adapter_model.safetensors")
    assert any(float(w.abs().max()) > 0 for name, w in weights.items() if "lora_B" in name)


def test_a_pad_token_changes_nothing(results):
    without, with_pad = (results[name].metrics for name in ("no pad", "pad"))
    assert without.keys() == with_pad.keys()
    for stage in without:
        for name in ("loss", "eval_loss", "rewards/margins", "hits", "reward"):
            if name in without[stage]:
                assert without[stage][name] == pytest.approx(with_pad[stage][name], rel=1e-4), stage


def test_the_card_tells_what_the_adapter_was_made_from(results, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    result = results["no pad"]
    stage = result.stages[-1]
    card = stage.paths["card"].read_text(encoding="utf-8")
    lock = json.loads((result.path / "lock.json").read_text())
    assert "# Moon\n" in card
    assert f"base model: sha256 {lock['model']['sha256']}" in card
    assert f"04-simpo: 6 rows, sha256 {lock['data']['04-simpo']['sha256']}" in card
    assert "- peft: zora\n" in card
    assert "- 04-simpo: loss " in card
    assert card.count("- export: card") == 1
    weights = load_file(stage.paths["weights"])
    assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.float16"}
    base = AutoModelForCausalLM.from_pretrained(result.path.parent / "model")
    peft.PeftModel.from_pretrained(base, stage.paths["card"].parent)


def test_a_row_that_is_too_long_is_told(results):
    plan = chain(results["no pad"].path.parent / "model").explain()
    (dropped,) = plan.steps[2].data.dropped
    assert dropped.reason == "longer than 200 characters"
    assert dropped.where.endswith("row 7")
    assert len(plan.steps[2].data.examples) == len(ROWS)
    listed = results["no pad"].stages[0].path / "dropped.jsonl"
    assert json.loads(listed.read_text())["reason"] == dropped.reason


def test_the_guides_metric_of_answers_measures(tmp_path):
    (block,) = [each for each in blocks("rollouts.md") if "class Exact(" in each]
    names = {"__name__": "exact"}
    exec(compile(block, "rollouts.md", "exec"), names)
    session = tiny_session(tmp_path / "base")
    examples = tiny_examples("conversation")
    measured = names["Exact"](names["ExactConfig"](new_tokens=4)).measure(session, examples)
    assert 0 <= measured.values["exact"] <= 1
    assert len(measured.samples) == min(4, len(examples))
    assert all("\n" not in sample.completion for sample in measured.samples)


def test_the_guides_fast_trainer_trains(tmp_path):
    from tunesmith.data.examples import Sourced
    from tunesmith.plugin.conditions import Conditions
    from tunesmith.plugin.trainers import TrainingData

    (block,) = [each for each in blocks("trainer.md") if "class Quick(" in each]
    names = {"__name__": "quick"}
    exec(compile(block, "trainer.md", "exec"), names)
    session = tiny_session(tmp_path / "base", trains=True)
    rows = [Sourced(example, "here") for example in tiny_examples("conversation")]
    trainer = names["Quick"](names["QuickConfig"](max_steps=1, batch_size=2))
    data = TrainingData(rows, rows, lambda *_: None)
    built = trainer.build(session, data, tmp_path / "work")
    assert type(built).__name__ == "FastTrainer"
    built.train()
    assert built.evaluate()["eval_loss"] > 0
    told = trainer.explain(Conditions(trains_base=True, model=session.model))
    assert told[0].text.startswith("loss:")


def test_the_page_about_watching_runs_as_it_stands(tiny_model, alpaca_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in json.loads(alpaca_file.read_text()))
    )
    listening, callbacks = blocks("watching.md")
    for block in (listening, callbacks):
        code = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(tiny_model))
        exec(compile(code, "watching.md", "exec"), {"__name__": "watching"})
