"""Whole runs on a tiny model: what they make and reuse, and what stock libraries make of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith import Tuner
from tunesmith.engine.result import RunResult
from tunesmith.engine.runner import run
from tunesmith.errors import RunError
from tunesmith.nn.nf4_linear import NF4Linear
from tunesmith.plugin.events import RowsDropped, StageFinished, StageReused, Warned
from tunesmith.plugin.registry import registry
from tunesmith.testing.tiny import tiny_llama

QUICK = {"batch_size": 4, "gradient_accumulation": 1}


def recorded(tuner: Tuner, directory: Path) -> tuple[RunResult, list]:
    events: list = []
    result = run(tuner.recipe, directory, registry(), [lambda run, event: events.append(event)])
    return result, events


def names(events: list, kind: type) -> list[str]:
    return [event.stage for event in events if isinstance(event, kind)]


def logits_of(model, tokenizer, text: str = "user says the number is 3") -> torch.Tensor:
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return model.eval()(ids).logits.float()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """The whole expression, run once on a model with tied embeddings."""
    root = tmp_path_factory.mktemp("whole")
    model = tiny_llama(root / "model", tied=True)
    rows = [
        {"instruction": f"say the number {n}", "output": f"the number is {n}"} for n in range(12)
    ]
    pairs = [
        {"prompt": f"say {n}", "chosen": f"the number is {n}", "rejected": f"no, not {n}, sorry"}
        for n in range(8)
    ]
    (root / "train.json").write_text(json.dumps(rows))
    (root / "prefs.json").write_text(json.dumps(pairs))
    tuner = (
        Tuner(model)
        .quantize("nf4")
        .lora(r=4)
        .sft(root / "train.json", epochs=4, learning_rate=1e-2, **QUICK)
        .dpo(root / "prefs.json", epochs=3, learning_rate=1e-3, **QUICK)
        .merge()
    )
    result, _ = recorded(tuner, root / "run")
    return tuner, result, model


def test_training_lowers_the_loss_and_raises_the_margin(finished):
    _, result, _ = finished
    assert result.metrics["03-sft"]["loss"] < result.metrics["03-sft"]["loss_first"] - 0.5
    assert result.metrics["04-dpo"]["loss_first"] == pytest.approx(0.693147, abs=1e-5)
    assert result.metrics["04-dpo"]["rewards/margins"] > 0.1
    assert result.metrics["04-dpo"]["rewards/accuracies"] == 1.0


def test_the_run_directory_is_plain_to_read(finished):
    tuner, result, _ = finished
    assert Tuner.from_yaml(result.path / "recipe.yaml") == Tuner.from_yaml(tuner.to_yaml())
    lock = json.loads((result.path / "lock.json").read_text())
    assert lock["versions"]["torch"] == torch.__version__
    assert len(lock["model"]["sha256"]) == 64
    assert lock["data"]["03-sft"]["rows"] == 12
    assert set(lock["plugins"]) == {
        f"tunesmith:{name}" for name in ("nf4", "lora", "sft", "dpo", "merge")
    }
    assert sorted(entry.name for entry in (result.path / "stages").iterdir()) == [
        "03-sft",
        "04-dpo",
        "05-merge",
    ]


def test_running_again_reuses_every_stage_and_says_so(finished):
    tuner, result, _ = finished
    again, events = recorded(tuner, result.path)
    assert names(events, StageReused) == ["03-sft", "04-dpo", "05-merge"]
    assert names(events, StageFinished) == []
    assert again.metrics == result.metrics


def test_each_adapter_opens_with_stock_peft(finished):
    from peft import PeftModel

    _, result, model = finished
    assert list(result.adapters) == ["sft", "dpo"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(model), tokenizer)
    seen = [plain]
    for directory in result.adapters.values():
        stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), directory)
        seen.append(logits_of(stock, tokenizer))
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
    assert not torch.allclose(seen[1], seen[2], atol=1e-4)


def adapter_on_dequantized_base(model: Path, adapter: Path):
    """Stock PEFT on stock layers that hold what NF4 decodes to: the model that was trained."""
    from peft import PeftModel

    from tunesmith_plugins.quantizers.nf4 import NF4, NF4Config

    base = NF4(NF4Config()).load(model, dtype=torch.float32, device=torch.device("cpu"))
    for name, module in list(base.named_modules()):
        if isinstance(module, NF4Linear):
            base.set_submodule(name, module.dense())
    return PeftModel.from_pretrained(base, adapter)


def test_the_merged_model_reloads_in_a_clean_process_with_equal_logits(finished, tmp_path):
    _, result, model = finished
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = logits_of(adapter_on_dequantized_base(model, result.adapters["dpo"]), tokenizer)
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "ids = tokenizer('user says the number is 3', return_tensors='pt').input_ids\n"
        "assert 'tunesmith' not in sys.modules\n"
        "with torch.no_grad(): torch.save(model(ids).logits.float(), sys.argv[2])\n"
    )
    out = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", code, result.model_path, out], check=True)
    assert torch.allclose(torch.load(out), expected, atol=1e-4)


def test_tied_embeddings_stay_tied_and_are_saved_once(finished):
    from safetensors import safe_open

    _, result, _ = finished
    with safe_open(result.model_path / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    assert "lm_head.weight" not in stored
    merged = AutoModelForCausalLM.from_pretrained(result.model_path)
    assert merged.config.tie_word_embeddings is True
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_the_merged_directory_has_template_and_generation_config(finished):
    _, result, model = finished
    assert AutoTokenizer.from_pretrained(result.model_path).chat_template == (
        AutoTokenizer.from_pretrained(model).chat_template
    )
    assert (result.model_path / "generation_config.json").exists()
    config = json.loads((result.model_path / "config.json").read_text())
    assert config["use_cache"] is True
    assert "quantization_config" not in config


def test_a_result_generates_and_can_be_opened_later(finished):
    _, result, _ = finished
    answer = result.generate("say the number 3", max_new_tokens=8)
    assert isinstance(answer, str)
    assert RunResult.open(result.path).generate("say the number 3", max_new_tokens=8) == answer


def test_a_run_without_a_merge_generates_with_its_adapter(tiny_model, alpaca_file, tmp_path):
    tuner = Tuner(tiny_model).lora(r=4).sft(alpaca_file, max_steps=2, **QUICK)
    result, _ = recorded(tuner, tmp_path / "run")
    assert result.model_path is None
    assert isinstance(result.generate("say 3", max_new_tokens=4), str)


def test_opening_what_is_no_run_says_so(tmp_path):
    with pytest.raises(RunError, match="holds no run: it is empty"):
        RunResult.open(tmp_path)


def test_a_changed_option_redoes_that_stage_and_what_follows(tiny_model, alpaca_file, tmp_path):
    prefix = Tuner(tiny_model).lora(r=2)
    first = prefix.sft(alpaca_file, max_steps=2, **QUICK).merge()
    second = prefix.sft(alpaca_file, max_steps=3, **QUICK).merge()
    recorded(first, tmp_path / "run")
    _, events = recorded(second, tmp_path / "run")
    assert names(events, StageFinished) == ["02-sft", "03-merge"]
    warned = [event.text for event in events if isinstance(event, Warned)]
    assert any("02-sft was made by another recipe" in text for text in warned)
    assert len(list((tmp_path / "run" / "superseded").iterdir())) == 2


def test_an_option_that_changes_nothing_but_the_view_keeps_the_stage(
    tiny_model, alpaca_file, tmp_path
):
    prefix = Tuner(tiny_model).lora(r=2)
    recorded(prefix.sft(alpaca_file, max_steps=2, **QUICK), tmp_path / "run")
    _, events = recorded(
        prefix.sft(alpaca_file, max_steps=2, logging_steps=2, **QUICK), tmp_path / "run"
    )
    assert names(events, StageReused) == ["02-sft"]


def test_changed_data_redoes_the_stage(tiny_model, alpaca_file, tmp_path):
    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file, max_steps=2, **QUICK)
    recorded(tuner, tmp_path / "run")
    rows = json.loads(alpaca_file.read_text())
    rows[0]["output"] += "!"
    alpaca_file.write_text(json.dumps(rows))
    _, events = recorded(tuner, tmp_path / "run")
    assert names(events, StageFinished) == ["02-sft"]


def test_an_evaluation_can_be_added_without_training_again(tiny_model, alpaca_file, tmp_path):
    prefix = Tuner(tiny_model).lora(r=2).sft(alpaca_file, max_steps=2, **QUICK)
    recorded(prefix, tmp_path / "run")
    result, events = recorded(prefix.evaluate("loss", alpaca_file), tmp_path / "run")
    assert names(events, StageReused) == ["02-sft"]
    assert names(events, StageFinished) == ["03-evaluate-loss"]
    assert result.metrics["03-evaluate-loss"]["perplexity"] > 1


def test_an_evaluation_measures_the_model_of_its_place_in_the_chain(
    tiny_model, alpaca_file, tmp_path
):
    tuner = (
        Tuner(tiny_model)
        .lora(r=4)
        .evaluate("loss", alpaca_file)
        .sft(alpaca_file, epochs=4, learning_rate=1e-2, **QUICK)
        .evaluate("loss", alpaca_file)
        .merge()
        .evaluate("loss", alpaca_file)
    )
    result, _ = recorded(tuner, tmp_path / "run")
    before, after, merged = (
        values["loss"] for name, values in result.metrics.items() if "evaluate" in name
    )
    assert after < before - 0.5
    assert merged == pytest.approx(after, abs=1e-4)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(
    tiny_model, alpaca_file, tmp_path
):
    from safetensors.torch import load_file

    def adapter(seed: int, where: str) -> torch.Tensor:
        tuner = Tuner(tiny_model, seed=seed).lora(r=2, dropout=0.1)
        result, _ = recorded(tuner.sft(alpaca_file, max_steps=3, **QUICK), tmp_path / where)
        weights = load_file(result.adapters["sft"] / "adapter_model.safetensors")
        return torch.cat([weights[key].flatten() for key in sorted(weights)])

    first, again, other = adapter(1, "a"), adapter(1, "b"), adapter(2, "c")
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_dropped_rows_are_counted_and_listed(tiny_model, tmp_path):
    rows = [{"instruction": f"q{n}", "output": f"a{n}"} for n in range(6)]
    rows += [rows[0], {"instruction": "empty", "output": "  "}]
    rows.append({"instruction": "too long to leave room " * 40, "output": "never seen"})
    tuner = Tuner(tiny_model).lora(r=2).sft(rows, max_steps=1, max_length=64, **QUICK)
    _, events = recorded(tuner, tmp_path / "run")
    [dropped] = [event for event in events if isinstance(event, RowsDropped)]
    assert (dropped.count, dropped.total) == (3, 9)
    listed = [json.loads(line) for line in dropped.path.read_text().splitlines()]
    assert {row["where"] for row in listed} == {"row 7", "row 8", "row 9"}
    assert sum(dropped.reasons.values()) == 3


def test_full_fine_tuning_trains_every_weight_and_saves_a_model(tiny_model, alpaca_file, tmp_path):
    tuner = Tuner(tiny_model).sft(alpaca_file, max_steps=3, learning_rate=1e-2, **QUICK).merge()
    result, _ = recorded(tuner, tmp_path / "run")
    tuned = AutoModelForCausalLM.from_pretrained(result.model_path).state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    unchanged = [name for name in base if torch.equal(base[name], tuned[name])]
    assert unchanged == []
    assert result.adapters == {}


def test_dpo_on_full_weights_starts_from_the_sft_model(
    tiny_model, alpaca_file, preference_file, tmp_path
):
    tuner = Tuner(tiny_model).sft(alpaca_file, max_steps=3, learning_rate=1e-2, **QUICK)
    tuner = tuner.dpo(preference_file, max_steps=3, learning_rate=1e-3, **QUICK)
    result, _ = recorded(tuner, tmp_path / "run")
    assert result.metrics["02-dpo"]["loss_first"] == pytest.approx(0.693147, abs=1e-5)
    assert result.metrics["02-dpo"]["loss"] < 0.69


def test_evaluation_during_training_and_early_stopping(tiny_model, alpaca_file, tmp_path):
    tuner = Tuner(tiny_model).lora(r=2)
    # a rate so high that an evaluation soon comes out worse than the one before it
    tuner = tuner.sft(
        alpaca_file, epochs=10, eval_split=3, early_stopping=1, learning_rate=0.1, **QUICK
    )
    result, _ = recorded(tuner, tmp_path / "run")
    rows = [
        json.loads(line)
        for line in (result.path / "stages" / "02-sft" / "log.jsonl").read_text().splitlines()
    ]
    evaluations = [row["eval_loss"] for row in rows if "eval_loss" in row]
    assert 2 <= len(evaluations) < 10


def test_packing_trains_on_the_same_tokens(tiny_model, alpaca_file, tmp_path):
    plain = Tuner(tiny_model).lora(r=2).sft(alpaca_file, epochs=1, **QUICK)
    packed = Tuner(tiny_model).lora(r=2).sft(alpaca_file, epochs=1, packing=True, **QUICK)
    one, _ = recorded(plain, tmp_path / "plain")
    two, _ = recorded(packed, tmp_path / "packed")
    assert two.metrics["02-sft"]["tokens"] == one.metrics["02-sft"]["tokens"]


def test_an_interrupted_stage_goes_on_from_its_checkpoint(tiny_model, alpaca_file, tmp_path):
    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file, max_steps=6, save_steps=2, **QUICK)

    class PulledError(Exception):
        """The plug was pulled."""

    def pull(run, event):
        if getattr(event, "step", 0) == 5:
            raise PulledError

    with pytest.raises(PulledError):
        run(tuner.recipe, tmp_path / "cut", registry(), [pull])
    cut, events = recorded(tuner, tmp_path / "cut")
    assert any("goes on from checkpoint-4" in e.text for e in events if isinstance(e, Warned))
    whole, _ = recorded(tuner, tmp_path / "whole")
    log = (cut.path / "stages" / "02-sft" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    from safetensors.torch import load_file

    left = load_file(cut.adapters["sft"] / "adapter_model.safetensors")
    right = load_file(whole.adapters["sft"] / "adapter_model.safetensors")
    assert all(torch.allclose(left[key], right[key], atol=1e-6) for key in right)


def test_a_loss_that_is_not_a_number_ends_the_run_with_advice(tiny_model, alpaca_file, tmp_path):
    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file, epochs=8, learning_rate=1e18, **QUICK)
    with pytest.raises(RunError, match="lower learning_rate"):
        recorded(tuner, tmp_path / "run")
    assert not (tmp_path / "run" / "stages" / "02-sft").exists()


def test_the_bitsandbytes_quantizer_trains_and_merges(alpaca_file, tmp_path):
    pytest.importorskip("bitsandbytes")
    # rows of whole blocks: with AVX-512, bitsandbytes 0.50.2 decodes others to other values
    model = tiny_llama(tmp_path / "model", hidden_size=64, intermediate_size=128)
    tuner = Tuner(model).quantize("bitsandbytes").lora(r=2)
    result, _ = recorded(
        tuner.sft(alpaca_file, max_steps=3, learning_rate=1e-2, **QUICK).merge(), tmp_path / "run"
    )
    expected = logits_of(
        adapter_on_dequantized_base(model, result.adapters["sft"]),
        AutoTokenizer.from_pretrained(model),
    )
    merged = logits_of(
        AutoModelForCausalLM.from_pretrained(result.model_path),
        AutoTokenizer.from_pretrained(model),
    )
    # one table, one block size: what bitsandbytes decodes to is what NF4Linear decodes to, but for
    # its coarse lookup of a few nested scales
    assert torch.allclose(merged, expected, atol=2e-2)


# PEFT warns of exactly the trouble that this test shows to be taken care of
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_an_adapter_on_a_tied_head_unties_it_in_the_merged_model(tiny_model, alpaca_file, tmp_path):
    tuner = Tuner(tiny_model).lora(r=2, targets=("lm_head", "q_proj"))
    result, _ = recorded(
        tuner.sft(alpaca_file, max_steps=4, learning_rate=1e-2, **QUICK).merge(), tmp_path / "run"
    )
    from peft import PeftModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model), result.adapters["sft"]
    )
    merged = AutoModelForCausalLM.from_pretrained(result.model_path)
    assert merged.config.tie_word_embeddings is False
    assert torch.allclose(logits_of(merged, tokenizer), logits_of(stock, tokenizer), atol=1e-4)


def test_dora_and_biases_merge_exactly(alpaca_file, tmp_path):
    model = tiny_llama(tmp_path / "biased", tied=False, attention_bias=True)
    tuner = Tuner(model).quantize("nf4").lora(r=2, dora=True, bias="all")
    result, _ = recorded(
        tuner.sft(alpaca_file, max_steps=4, learning_rate=1e-2, **QUICK).merge(), tmp_path / "run"
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = logits_of(adapter_on_dequantized_base(model, result.adapters["sft"]), tokenizer)
    merged = logits_of(AutoModelForCausalLM.from_pretrained(result.model_path), tokenizer)
    assert torch.allclose(merged, expected, atol=1e-4)


def test_a_large_model_is_saved_in_shards(tiny_model, alpaca_file, tmp_path):
    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file, max_steps=1, **QUICK)
    result, _ = recorded(tuner.merge(shard_gb=0.00005), tmp_path / "run")
    assert (result.model_path / "model.safetensors.index.json").exists()
    model = AutoModelForCausalLM.from_pretrained(result.model_path)
    assert sum(parameter.numel() for parameter in model.parameters()) > 0


def test_a_failing_stage_is_named_in_the_error(tiny_model, tmp_path):
    rows = [{"instruction": "word " * 100, "output": "x"}]
    tuner = Tuner(tiny_model).lora(r=2).sft(rows, max_length=16)
    with pytest.raises(ValueError, match="leaves a token to learn within max_length=16") as caught:
        recorded(tuner, tmp_path / "run")
    assert any("in stage 02-sft" in note for note in caught.value.__notes__)


def test_tensorboard_logs_are_kept_when_asked_for_and_only_then(tiny_model, alpaca_file, tmp_path):
    pytest.importorskip("tensorboard")
    prefix = Tuner(tiny_model).lora(r=2)
    recorded(prefix.sft(alpaca_file, max_steps=2, **QUICK), tmp_path / "without")
    assert not list((tmp_path / "without").rglob("events.out.tfevents*"))
    logged = prefix.sft(alpaca_file, max_steps=2, loggers=("tensorboard",), **QUICK)
    result, _ = recorded(logged, tmp_path / "with")
    assert list((result.path / "stages" / "02-sft" / "tensorboard").rglob("events.out.tfevents*"))


def test_a_plugin_that_fails_on_an_event_is_named_and_stops_nothing(
    tiny_model, alpaca_file, tmp_path
):
    import tunesmith_plugins
    from tunesmith.plugin import hookimpl
    from tunesmith.plugin.registry import Registry

    class Noisy:
        @hookimpl
        def tunesmith_on_event(self, run, event):
            raise OSError("no paper left")

    strangers = Registry(
        [
            ("tunesmith", "tunesmith", "0", lambda: tunesmith_plugins),
            ("noisy", "noisy-plugin", "1.0", Noisy),
        ]
    )
    events: list = []
    tuner = Tuner(tiny_model).lora(r=2).sft(alpaca_file, max_steps=1, **QUICK)
    result = run(
        tuner.recipe, tmp_path / "run", strangers, [lambda run, event: events.append(event)]
    )
    assert "sft" in result.adapters
    told = [event.text for event in events if isinstance(event, Warned)]
    assert any("noisy-plugin failed on StageStarted: no paper left" in text for text in told)


def test_a_row_that_the_template_cannot_hold_is_named_before_any_weight_is_read(
    tiny_model, tmp_path, monkeypatch
):
    call = {"name": "f", "arguments": {}}
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
            ]
        },
    ]
    monkeypatch.setattr("tunesmith.nn.pretrained.load_model", None)  # whoever calls it fails
    with pytest.raises(ValueError, match=r"row 2: .*tool"):
        recorded(Tuner(tiny_model).lora(r=2).sft(rows, max_steps=1, **QUICK), tmp_path / "run")


@pytest.mark.parametrize("setting", [{"seed": 1}, {"precision": "bf16"}])
def test_another_seed_or_precision_is_another_run(tiny_model, alpaca_file, tmp_path, setting):
    def chain(**settings):
        tuner = Tuner(tiny_model, **{"precision": "fp32", **settings}).lora(r=2)
        return tuner.sft(alpaca_file, max_steps=1, **QUICK)

    recorded(chain(), tmp_path / "run")
    _, events = recorded(chain(**setting), tmp_path / "run")
    assert names(events, StageFinished) == ["02-sft"]
