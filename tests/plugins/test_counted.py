"""A number that is reported does not depend on how rows were batched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith import Tuner
from tunesmith.engine.progress import ProgressCallback
from tunesmith.testing.tiny import tiny_llama

# fp32, and rates so small that weights stay where they are
STILL: dict[str, Any] = {"learning_rate": 1e-12, "scheduler": "constant"}
ROWS = [
    {"instruction": f"say {n}", "output": "the number is " + "very " * (n * n % 13) + str(n)}
    for n in range(14)
]
PAIRS = [
    {"prompt": f"say {n}", "chosen": f"it is {n} " * (n % 5 + 1), "rejected": f"no, not {n}"}
    for n in range(11)
]
HELD_OUT = 7


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("counted")
    tiny_llama(root / "model")
    (root / "rows.json").write_text(json.dumps(ROWS))
    (root / "held.json").write_text(json.dumps(ROWS[:HELD_OUT]))
    (root / "pairs.json").write_text(json.dumps(PAIRS))
    return root


def logged(directory: Path, stage: str = "02-sft") -> list[dict[str, float]]:
    lines = (directory / "stages" / stage / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def same(one: float, other: float) -> bool:
    return one == pytest.approx(other, rel=1e-5)


def sft(place: Path, directory: Path, **options: Any) -> Any:
    tuner = Tuner(place / "model", precision="fp32").lora(r=2)
    settings = {"gradient_accumulation": 1, "max_steps": 1, "batch_size": 2, **STILL, **options}
    tuner = tuner.sft(place / "rows.json", eval_data=str(place / "held.json"), **settings)
    return tuner.run(directory, progress=False)


@pytest.fixture(scope="module")
def metric(place: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """The loss over the held-out rows by the metric of that name, one row at a time."""
    directory = tmp_path_factory.mktemp("metric") / "run"
    tuner = Tuner(place / "model", precision="fp32")
    tuner = tuner.evaluate("loss", place / "held.json", batch_size=1)
    return tuner.run(directory, progress=False).metrics["01-evaluate-loss"]["loss"]


SIZES = (1, 2, 3, 7)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "size", [pytest.param(n, marks=[] if n == 3 else pytest.mark.slow) for n in SIZES]
)
def test_an_evaluation_is_the_same_however_rows_are_batched(size, packing, place, metric, tmp_path):
    result = sft(place, tmp_path / "run", batch_size=size, packing=packing, max_length=256)
    assert same(result.metrics["02-sft"]["eval_loss"], metric)


@pytest.mark.parametrize("size", SIZES)
def test_the_metric_loss_is_the_same_however_rows_are_batched(size, place, metric, tmp_path):
    tuner = Tuner(place / "model", precision="fp32")
    tuner = tuner.evaluate("loss", place / "held.json", batch_size=size)
    result = tuner.run(tmp_path / "run", progress=False)
    assert same(result.metrics["01-evaluate-loss"]["loss"], metric)


@pytest.mark.slow
def test_without_the_chunked_loss_an_evaluation_is_the_same(place, metric, tmp_path):
    for number, options in enumerate(({"chunked_loss": False}, {"fused_layers": False})):
        result = sft(place, tmp_path / str(number), **options)
        assert same(result.metrics["02-sft"]["eval_loss"], metric)


def test_the_loss_of_an_epoch_is_the_same_by_windows_accumulation_and_batches(place, tmp_path):
    found: list[float] = []
    for number, (size, steps, window) in enumerate([(14, 1, 1), (3, 2, 2), (2, 2, 3)]):
        directory = tmp_path / str(number)
        options = {"batch_size": size, "gradient_accumulation": steps, "logging_steps": window}
        sft(place, directory, **options, max_steps=None, epochs=1.0)
        # every row is in some window, the last one too
        rows = [row for row in logged(directory) if "loss" in row]
        tokens = sum(row["loss_over"] for row in rows)
        found.append(sum(row["loss"] * row["loss_over"] for row in rows) / tokens)
    assert same(found[1], found[0])
    assert same(found[2], found[0])


def test_a_short_batch_at_the_end_of_an_epoch_weighs_what_it_holds(place, tmp_path):
    sft(place, tmp_path / "run", batch_size=4, gradient_accumulation=4, max_steps=None, epochs=1.0)
    [row] = [row for row in logged(tmp_path / "run") if "loss" in row]
    sft(place, tmp_path / "one", batch_size=14, max_steps=None, epochs=1.0)
    [other] = [row for row in logged(tmp_path / "one") if "loss" in row]
    assert row["loss_over"] == other["loss_over"]
    assert same(row["loss"], other["loss"])
    assert same(row["grad_norm"], other["grad_norm"])


@pytest.mark.parametrize(
    "size", [pytest.param(n, marks=[] if n == 3 else pytest.mark.slow) for n in (1, 2, 3)]
)
def test_the_figures_of_dpo_are_means_over_pairs(size, place, tmp_path):
    def run(name: str, size: int, **options: Any) -> dict[str, float]:
        tuner = Tuner(place / "model", precision="fp32").lora(r=2)
        settings = {"gradient_accumulation": 1, "max_steps": None, "epochs": 1.0, **options}
        tuner = tuner.dpo(
            place / "pairs.json",
            eval_data=str(place / "pairs.json"),
            batch_size=size,
            **{**settings, **STILL, "learning_rate": 1e-2 if options else 1e-12},
        )
        tuner.run(tmp_path / name, progress=False)
        merged: dict[str, float] = {}
        for row in logged(tmp_path / name, "02-dpo"):
            merged |= row
        return merged

    # a whole epoch in one optimizer step: the last batch is smaller than the others
    one = run("one", 11, gradient_accumulation=1)
    cut = run("cut", size, gradient_accumulation=11)
    names = [key for key in one if key.startswith(("loss", "rewards/", "logps/", "eval_"))]
    names = [key for key in names if not key.endswith(("per_second", "runtime"))]
    assert len(names) >= 14
    for name in names:
        assert cut[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    assert one["eval_rewards/margins"] != pytest.approx(0.0, abs=1e-4)


# the summary of a stage


class _State:
    max_steps = 100
    num_input_tokens_seen = 0

    def __init__(self, step: int) -> None:
        self.global_step = step


def summary(tmp_path: Path, rows: list[tuple[int, float, float | None]]) -> dict[str, float]:
    callback = ProgressCallback("02-sft", lambda event: None, tmp_path / "log.jsonl")
    for step, loss, over in rows:
        logs = {"loss": loss} if over is None else {"loss": loss, "loss_over": over}
        callback.on_log(None, _State(step), None, logs)
    return callback.metrics()


def test_the_last_losses_weigh_what_they_are_over(tmp_path):
    rows = [(step, 5.0, 10.0) for step in range(1, 19)] + [(19, 1.0, 30.0), (20, 3.0, 10.0)]
    assert summary(tmp_path, rows)["loss"] == pytest.approx(1.5)
    assert summary(tmp_path, rows)["loss_first"] == 5.0


def test_a_window_that_is_rarely_logged_counts_for_its_steps(tmp_path):
    # the last 10 steps of 100 lie in one window of 25, and no more of them are taken
    rows = [(1, 9.0, None), (25, 8.0, None), (50, 7.0, None), (75, 6.0, None), (100, 5.0, None)]
    assert summary(tmp_path, rows)["loss"] == 5.0
    # uncounted losses weigh by their steps
    rows = [(1, 9.0, None), (2, 8.0, None), (96, 7.0, None), (99, 4.0, None), (100, 8.0, None)]
    assert summary(tmp_path, rows)["loss"] == pytest.approx((94 * 7 + 3 * 4 + 8) / 98)


def test_what_routers_cost_is_reported_beside_the_loss_of_dpo(tmp_path, preference_file):
    import math

    import transformers

    from tunesmith.testing.tiny import tiny_tokenizer

    config = transformers.MixtralConfig(
        vocab_size=271,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        eos_token_id=270,
        pad_token_id=268,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    tuner = Tuner(tmp_path / "moe", precision="fp32").lora(r=2, targets=("q_proj",))
    tuner.dpo(preference_file, max_steps=1, batch_size=4, gradient_accumulation=2, **STILL).run(
        tmp_path / "run", progress=False
    )
    [row] = [row for row in logged(tmp_path / "run", "02-dpo") if "loss" in row]
    assert row["aux_loss"] > 0.5
    assert row["loss"] == pytest.approx(math.log(2) + row["aux_loss"], abs=1e-5)


def test_held_out_rows_of_which_none_is_left_are_an_error(place, tmp_path):
    from tunesmith.errors import DataError, PlanError

    (tmp_path / "blank.json").write_text(json.dumps([{"instruction": "say", "output": " "}]))
    long = [{"instruction": "word " * 300, "output": "x"}]
    (tmp_path / "long.json").write_text(json.dumps(long))
    tuner = Tuner(place / "model", precision="fp32").lora(r=2)
    for name, error, said in (
        ("blank", PlanError, "eval_data: every one of 1 rows"),
        ("long", DataError, "1 held-out rows"),  # which the tokenizer alone can tell
    ):
        with pytest.raises(error, match=said):
            tuner.sft(
                place / "rows.json", eval_data=str(tmp_path / f"{name}.json"), max_length=256
            ).run(tmp_path / name, progress=False)


def test_a_base_of_bitsandbytes_learns_after_an_evaluation(tmp_path):
    pytest.importorskip("bitsandbytes")
    from tunesmith.testing.tiny import tiny_session
    from tunesmith_plugins.methods.lora import Lora, LoraConfig
    from tunesmith_plugins.quantizers.bitsandbytes import BitsAndBytes, BitsAndBytesConfig

    session = tiny_session(
        tmp_path,
        quantizer=BitsAndBytes(BitsAndBytesConfig()),
        method=Lora(LoraConfig(r=2)),
        dtype=torch.bfloat16,
        hidden_size=64,
        intermediate_size=128,
    )
    model, ids = session.model, torch.arange(20)[None]
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
    model.train()(input_ids=ids, labels=ids).loss.backward()
    # the first layer's adapter learns through every product above it
    grads = {
        name: float(weight.grad.abs().sum())
        for name, weight in model.named_parameters()
        if weight.grad is not None and "lora_B" in name
    }
    assert len(grads) == 14
    assert all(grads.values())
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, before)


@pytest.mark.parametrize("packing", [False, True])
def test_tokens_are_counted_without_padding_however_rows_are_batched(
    place: Path, tmp_path: Path, packing: bool
) -> None:
    """A packed block has no mask, and its last tokens are padding up to the longest block."""
    seen = set()
    for batch in (1, 4):
        options = {"epochs": 1, "max_steps": None, "packing": packing, "max_length": 96}
        sft(place, tmp_path / str(batch), batch_size=batch, **options)
        seen.add(logged(tmp_path / str(batch))[-1]["num_input_tokens_seen"])
    assert len(seen) == 1


def test_a_row_that_no_name_was_given_for_is_batched_without_one() -> None:
    from tunesmith.data.pack import PaddingCollator
    from tunesmith.plugin.counted import RowNames

    first, copy = ({"input_ids": [1, 2, 3], "labels": [1, 2, 3]} for _ in range(2))
    collator = RowNames(PaddingCollator(0), [(first, "a.json, row 1")])
    batch = collator([copy, first])
    assert collator.named(batch) == ["a.json, row 1"]
    assert int(batch["tokens"]) == 6
