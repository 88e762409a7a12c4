"""What once broke the contract, each in a real run; the host knows nothing of any of it."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tunesmith import Data, Tuner
from tunesmith.errors import PlanError, RunError

TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"Where is the {topic}?"},
            {"role": "assistant", "content": f"The {topic} is in the house."},
        ]
    }
    for topic in ("moon", "thrush", "ferry", "bread", "lamp", "dog")
]
PAIRS = [
    {"prompt": f"Where is the {topic}?", "chosen": f"By the {topic}.", "rejected": "No idea."}
    for topic in ("moon", "thrush", "ferry", "bread")
]
QUICK: dict[str, Any] = {
    "max_steps": 3,
    "batch_size": 2,
    "gradient_accumulation": 1,
    "learning_rate": 5e-2,
    "scheduler": "constant",
}
ADAPTER = "adapter_model.safetensors"
BASES = pytest.mark.parametrize("base", ["plain", "nf4"])

pytestmark = pytest.mark.filterwarnings("ignore")


def tuner(model: Path, base: str = "plain", **settings: Any) -> Tuner:
    made = Tuner(str(model), device="cpu", **settings)
    return made if base == "plain" else made.quantize(base)


def run(made: Tuner, place: Path) -> Any:
    return made.run(place, progress=False)


class TestPromptTuning:
    """Tokens of its own before a row."""

    @BASES
    def test_it_trains_is_measured_and_answers(self, tiny_model, tmp_path, base):
        made = tuner(tiny_model, base).peft("prompt_tuning", tokens=4)
        made = made.evaluate("loss", TALKS).sft(TALKS, **QUICK).evaluate("loss", TALKS)
        result = run(made.dpo(PAIRS, **QUICK), tmp_path / "run")
        before, after = (
            found["loss"] for name, found in result.metrics.items() if "evaluate" in name
        )
        assert after < before - 0.02
        dpo = result.metrics[next(name for name in result.metrics if name.endswith("dpo"))]
        assert dpo["loss_first"] == pytest.approx(0.6931, abs=1e-3)
        weights = load_file(result.adapters["sft"] / "adapter_model.safetensors")
        assert weights["prompt_embeddings"].shape[0] == 4

    def test_an_answer_is_not_the_bare_bases(self, tiny_model, tmp_path):
        made = tuner(tiny_model).peft("prompt_tuning", tokens=4).sft(TALKS, **QUICK)
        result = run(made, tmp_path / "run")
        model, tokenizer = result.model, result.tokenizer
        ids = tokenizer("Where is the moon?", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            adapted = model(input_ids=ids).logits[:, -1]
            bare = model.get_base_model()(input_ids=ids).logits[:, -1]
        assert float((adapted - bare).abs().max()) > 1e-2

    def test_what_cannot_be_merged_or_packed_is_refused_in_the_plan(self, tiny_model):
        made = tuner(tiny_model).peft("prompt_tuning")
        with pytest.raises(PlanError, match=r"step 3 \(merge\): what prompt_tuning trains"):
            made.sft(TALKS, **QUICK).merge().explain().raise_if_problems()
        with pytest.raises(PlanError, match=r"step 2 \(sft\): packs several rows.* packing=False"):
            made.sft(TALKS, packing=True, **QUICK).explain().raise_if_problems()


class TestBitFit:
    """A method that is none of PEFT's and trains the base's own weights."""

    @BASES
    def test_only_vectors_are_kept_and_merged(self, tiny_model, tmp_path, base):
        made = tuner(tiny_model, base).peft("bitfit").sft(TALKS, **QUICK)
        made = made.evaluate("loss", TALKS).merge().evaluate("loss", TALKS)
        result = run(made, tmp_path / "run")
        kept = load_file(result.adapters["sft"] / "trained.safetensors")
        assert kept
        assert all(tensor.dim() == 1 for tensor in kept.values())
        alone, merged = (
            found["loss"] for name, found in result.metrics.items() if "evaluate" in name
        )
        assert alone == pytest.approx(merged, abs=1e-4)
        assert result.metrics["02-sft" if base == "plain" else "03-sft"]["loss"] > alone

    def test_its_weights_are_in_fp32_while_they_are_trained(self, tiny_model, tmp_path):
        made = tuner(tiny_model, precision="bf16").peft("bitfit")
        result = run(made.sft(TALKS, **{**QUICK, "learning_rate": 1e-4}), tmp_path / "run")
        kept = load_file(result.adapters["sft"] / "trained.safetensors")
        # an update of 1e-4 is lost beside 1.0 in 16 bits
        assert all(tensor.dtype == torch.float32 for tensor in kept.values())
        assert any(float((tensor - 1).abs().max()) > 1e-5 for tensor in kept.values())


class TestRewardHead:
    """A head of another kind, on the same base."""

    @BASES
    def test_the_head_and_the_adapter_are_kept_and_open_in_stock_peft(
        self, tiny_model, tmp_path, base
    ):
        import peft
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        made = tuner(tiny_model, base).lora(r=4).train("reward_head", PAIRS, **QUICK)
        result = run(made, tmp_path / "run")
        adapter = result.adapters["reward_head"]
        weights = load_file(adapter / "adapter_model.safetensors")
        assert any("score" in name for name in weights)
        assert any(float(w.abs().max()) > 0 for name, w in weights.items() if "lora_B" in name)
        figures = result.metrics[f"0{2 if base == 'plain' else 3}-reward_head"]
        assert figures["loss"] < figures["loss_first"]
        with pytest.raises(RunError, match=r"is for sequence-classification.*does not write"):
            result.generate("Where is the moon?")
        in_hand, ids = result.model, result.tokenizer("By the moon.", return_tensors="pt")
        with torch.no_grad():
            assert in_hand(**ids).logits.shape == (1, 1)
        result.unload()
        if base == "nf4":
            return
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
        opened = peft.PeftModel.from_pretrained(model, adapter).eval()
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        opened.config.pad_token_id = tokenizer.pad_token_id
        scores = []
        for answer in ("By the moon.", "No idea."):
            turns = [
                {"role": "user", "content": "Where is the moon?"},
                {"role": "assistant", "content": answer},
            ]
            ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
            with torch.no_grad():
                scores.append(float(opened(**ids).logits))
        assert scores[0] > scores[1]

    def test_a_resumed_training_keeps_its_head(self, tiny_model, tmp_path):
        from tunesmith.plugin.events import Progress

        class StopError(Exception):
            pass

        def stop(_, event):
            if isinstance(event, Progress) and event.step == 2:
                raise StopError

        made = tuner(tiny_model).lora(r=4).train("reward_head", PAIRS, save_steps=1, **QUICK)
        whole = run(made, tmp_path / "whole").adapters["reward_head"]
        with pytest.raises(StopError):
            made.run(tmp_path / "run", progress=False, listeners=[stop])
        resumed = run(made, tmp_path / "run").adapters["reward_head"]
        name = "adapter_model.safetensors"
        assert (whole / name).read_bytes() == (resumed / name).read_bytes()

    def test_it_does_not_go_on_from_another_tasks_adapter(self, tiny_model):
        made = tuner(tiny_model).lora().sft(TALKS, **QUICK).train("reward_head", PAIRS, **QUICK)
        with pytest.raises(PlanError, match=r"step 3 \(reward_head\): trains for sequence-class"):
            made.explain().raise_if_problems()


class TestExporters:
    """Two that build on each other, and an export between two trainings."""

    def test_one_finds_what_another_has_made_and_training_goes_on(self, tiny_model, tmp_path):
        made = tuner(tiny_model).lora(r=4).sft(TALKS, **QUICK)
        made = made.export("checksums").dpo(PAIRS, **QUICK).merge()
        made = made.export("release_note", title="Moon")
        result = run(made, tmp_path / "run")
        note = result.stages[-1].paths["note"]
        text = note.read_text()
        assert text.startswith("# Moon\n")
        assert "02-sft: loss" in text
        sums = next(stage for stage in result.stages if "checksums" in stage.name)
        assert sums.paths["checksums"].read_text().splitlines()[0] in text
        # reused, and found again
        again = run(made, tmp_path / "run")
        assert again.stages[-1].paths == result.stages[-1].paths
        assert set(again.adapters) == {"sft", "dpo"}

    def test_an_artefact_that_nobody_makes_is_named(self, tiny_model, tmp_path):
        made = tuner(tiny_model).lora(r=4).sft(TALKS, **QUICK).export("release_note")
        with pytest.raises(RunError, match="no earlier step has made 'checksums'; there is: "):
            run(made, tmp_path / "run")

    def test_a_model_that_was_merged_is_trained_on(self, tiny_model, tmp_path):
        made = tuner(tiny_model).quantize("nf4").lora(r=4).sft(TALKS, **QUICK).merge()
        made = made.evaluate("loss", TALKS).quantize("nf4").lora(r=2).sft(TALKS, **QUICK)
        result = run(made.evaluate("loss", TALKS), tmp_path / "run")
        merged, on = (found["loss"] for name, found in result.metrics.items() if "eval" in name)
        assert on < merged
        assert isinstance(result.generate("Where is the moon?", max_new_tokens=4), str)


class TestTrlGrpo:
    """A library's trainer with a library's arguments, and an objective that is no loss."""

    def test_it_runs_and_goes_on_to_the_same_bytes(self, tiny_model, tmp_path):
        from tunesmith.plugin.events import Progress

        class StopError(Exception):
            pass

        def stop(_, event):
            if isinstance(event, Progress) and event.step == 2:
                raise StopError

        options = {"reward": "tunesmith_growth.rewards:vowels", "save_steps": 1, **QUICK}
        options |= {"batch_size": 4, "new_tokens": 6}
        made = tuner(tiny_model).lora(r=4).train("trl_grpo", TALKS, **options)
        result = run(made, tmp_path / "whole")
        figures = result.metrics["02-trl_grpo"]
        assert 0 <= figures["reward"] <= 1
        with pytest.raises(StopError):
            made.run(tmp_path / "run", progress=False, listeners=[stop])
        name = "adapter_model.safetensors"
        whole = (result.adapters["trl_grpo"] / name).read_bytes()
        assert (run(made, tmp_path / "run").adapters["trl_grpo"] / name).read_bytes() == whole

    def test_rows_held_out_for_a_trainer_that_does_not_evaluate_are_not_passed_over(
        self, tiny_model, tmp_path
    ):
        options = {"reward": "tunesmith_growth.rewards:vowels", "new_tokens": 6, **QUICK}
        made = tuner(tiny_model).lora(r=4)
        made = made.train("trl_grpo", TALKS, **{**options, "batch_size": 4}, eval_split=2)
        with pytest.raises(RunError, match=r"2 rows are held out .* 'trl_grpo' does not evaluate"):
            run(made, tmp_path / "run")


class TestOrpo:
    """A trainer on pairs that was written by the guide alone, with a figure of its own."""

    def test_it_trains_without_a_pad_token_and_evaluates_its_figure(self, tmp_path):
        from tunesmith.testing import tiny_llama

        model = tiny_llama(tmp_path / "model", pad_token=None)
        options = {**QUICK, "max_steps": 6, "gradient_accumulation": 2, "learning_rate": 2e-2}
        made = tuner(model).lora(r=4).train("orpo", PAIRS, eval_split=1, eval_steps=2, **options)
        figures = run(made, tmp_path / "run").metrics["02-orpo"]
        assert figures["loss"] < figures["loss_first"] < 10
        assert figures["eval_loss"] < 10
        assert 0 <= figures["odds"] <= 1
        assert figures["eval_odds"] in (0, 1)


class TestTwoAdapters:
    """Roll-outs, a reward, and two named adapters on one base."""

    def test_it_learns_is_held_near_and_goes_on_to_the_same_bytes(self, tiny_model, tmp_path):
        from tunesmith.plugin.events import Progress

        class StopError(Exception):
            pass

        def stop(_, event):
            if isinstance(event, Progress) and event.step == 3 and "two" in event.stage:
                raise StopError

        reward = "tunesmith_growth.rewards:vowels"
        options = {**QUICK, "max_steps": 6, "learning_rate": 2e-2, "batch_size": 6, "samples": 8}
        made = tuner(tiny_model).lora(r=4).sft(TALKS, **QUICK)
        made = made.train("two_adapters", TALKS, reward=reward, save_steps=2, **options)
        result = run(made, tmp_path / "whole")
        log = (result.stages[-1].path / "log.jsonl").read_text().splitlines()
        rewards = [row["reward"] for row in map(json.loads, log) if "reward" in row]
        assert max(rewards[3:]) > rewards[0] + 0.02
        names = {file.name for file in result.adapters["two_adapters"].iterdir()}
        assert "reference" not in names
        assert load_file(result.adapters["sft"] / ADAPTER).keys() == (
            load_file(result.adapters["two_adapters"] / ADAPTER).keys()
        )
        with pytest.raises(StopError):
            made.run(tmp_path / "run", progress=False, listeners=[stop])
        resumed = run(made, tmp_path / "run").adapters["two_adapters"] / ADAPTER
        assert resumed.read_bytes() == (result.adapters["two_adapters"] / ADAPTER).read_bytes()


class TestAnswers:
    """A metric with texts."""

    def test_its_samples_are_kept_and_shown_side_by_side(self, tiny_model, tmp_path):
        options = {**QUICK, "max_steps": 60, "learning_rate": 2e-2}
        made = tuner(tiny_model).lora(r=8).evaluate("answers", TALKS).sft(TALKS, **options)
        result = run(made.evaluate("answers", TALKS), tmp_path / "run")
        before, after = (result.stages[0], result.stages[-1])
        assert before.metrics["recall"] < after.metrics["recall"]
        rows = [
            [json.loads(line) for line in stage.paths["samples"].read_text().splitlines()]
            for stage in (before, after)
        ]
        assert [row["prompt"] for row in rows[0]] == [row["prompt"] for row in rows[1]]
        assert len(rows[0]) == 4
        page = (tmp_path / "run" / "report.html").read_text()
        assert "Samples" in page
        for stage in rows:
            shown = [row["completion"] for row in stage if row["completion"].isprintable()]
            assert all(html.escape(text)[:20] in page for text in shown)
        assert f'<th scope="col">{after.name}</th>' in page


class TestShortFirst:
    """A transform before a split that a trainer evaluates on."""

    def test_rows_are_ordered_and_what_is_held_out_is_evaluated_on(self, tiny_model, tmp_path):
        data = Data(TALKS).transform("short_first").split(1)
        made = tuner(tiny_model).lora(r=4).sft(data, **QUICK)
        rows = [row.example for row in made.explain().steps[1].data.examples]
        lengths = [sum(len(turn.content) for turn in row.messages) for row in rows]
        assert len(rows) == 5
        assert lengths == sorted(lengths)
        assert run(made, tmp_path / "run").metrics["02-sft"]["eval_loss"] > 0
