"""Several processes, as torchrun starts them: one owner, one message, the result of one process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.runs import differences, made
from tunesmith import Tuner
from tunesmith.cli import main
from tunesmith.engine import world
from tunesmith.engine.world import World
from tunesmith.errors import RunError, TunesmithError

# runs the command line in each process, after something was done to one of them
CHILD = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
from tunesmith.cli import main
{fault}
sys.exit(main(sys.argv[1:]))
"""

LIMIT = 240


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twenty-one instruction rows of several lengths: no number of processes divides them."""
    path = tmp_path / "train.json"
    path.write_text(
        json.dumps(
            [
                {"instruction": f"say {n}", "input": "", "output": f"it is {n}" + " so" * (n % 5)}
                for n in range(21)
            ]
        )
    )
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Thirteen pairs of several lengths."""
    path = tmp_path / "pairs.jsonl"
    lines = [
        {"prompt": f"say {n}", "chosen": f"it is {n}" + " yes" * (n % 4), "rejected": f"no {n}"}
        for n in range(13)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def begin(
    tuner: Tuner, out: Path, *, processes: int = 2, fault: str = "", quiet: bool = False
) -> subprocess.Popen[str]:
    """Start a run in so many processes."""
    recipe = out.parent / f"{out.name}.yaml"
    tuner.to_yaml(recipe)
    child = out.parent / f"{out.name}-child.py"
    child.write_text(CHILD.format(fault=fault))
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--rdzv-endpoint"]
    arguments = [str(child), "run", str(recipe), "--out", str(out), *["--quiet"] * quiet]
    unset = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
    # PEFT writes a set into adapter_config.json
    own = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    return subprocess.Popen(
        [sys.executable, *launcher, "localhost:0", "--rdzv-backend=c10d", *arguments],
        env={k: v for k, v in os.environ.items() if k not in unset} | own,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(tuner: Tuner, out: Path, **options: Any) -> tuple[int, str, str]:
    """Run in several processes; return status, stdout, and stderr without the launcher's lines."""
    process = begin(tuner, out, **options)
    try:
        said, told = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.terminate()
        said, told = process.communicate()
        pytest.fail(f"hangs: {told}")
    return process.returncode, said, told


def messages(told: str) -> list[str]:
    """Return what tunesmith has ended with, as often as it was said."""
    return re.findall(r"^tunesmith: (.*)$", told, re.MULTILINE)


def logged(out: Path, stage: str) -> list[dict[str, float]]:
    """Return what was logged in a stage, without clocks."""
    lines = (out / "stages" / stage / "log.jsonl").read_text().splitlines()
    clocks = ("runtime", "per_second")
    return [{k: v for k, v in json.loads(x).items() if not k.endswith(clocks)} for x in lines]


def assert_same(one: Path, several: Path, stage: str, atol: float = 2e-5) -> None:
    """Hold that both have trained the same, as closely as sums in another order are."""
    expected, found = logged(one, stage), logged(several, stage)
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=2e-4, abs=2e-6)
    weights = load_file(one / "stages" / stage / "adapter" / "adapter_model.safetensors")
    others = load_file(several / "stages" / stage / "adapter" / "adapter_model.safetensors")
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.allclose(weight, others[name], atol=atol), name


def base(model: Path, *, quantized: bool = True) -> Tuner:
    tuner = Tuner(str(model), seed=3, device="cpu", precision="fp32")
    return (tuner.quantize("nf4") if quantized else tuner).lora(r=4, dropout=0.0)


def test_two_processes_train_what_one_does_with_one_owner_and_one_report(
    tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"epochs": 1, "gradient_accumulation": 2, "eval_split": 3}
    status, said, told = torchrun(
        base(tiny_model).sft(str(rows), batch_size=2, **options), tmp_path / "two"
    )
    assert status == 0, told
    assert said.count("report   ") == 1
    assert told.count("finished in") == 1
    assert (
        "2 processes with batch_size=2 and gradient_accumulation=2: an update is over 8 rows"
        in (told)
    )
    base(tiny_model).sft(str(rows), batch_size=4, **options).run(tmp_path / "one", progress=False)
    assert_same(tmp_path / "one", tmp_path / "two", "03-sft")
    lock = json.loads((tmp_path / "two" / "lock.json").read_text())
    assert lock["processes"] == 2
    assert "processes" not in json.loads((tmp_path / "one" / "lock.json").read_text())
    of_one = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*")}
    of_two = {path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*")}
    assert of_two == of_one


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_sft_and_dpo_equal_one_process_at_the_same_global_batch(
    tiny_model: Path, rows: Path, pairs: Path, tmp_path: Path, quantized: bool, accumulation: int
) -> None:
    def tuner(batch: int) -> Tuner:
        options: dict[str, Any] = {"batch_size": batch, "gradient_accumulation": accumulation}
        return (
            base(tiny_model, quantized=quantized)
            .sft(str(rows), epochs=2, eval_split=4, learning_rate=1e-3, **options)
            .dpo(str(pairs), epochs=2, eval_split=2, learning_rate=1e-3, **options)
            .evaluate("loss", str(rows))
            .merge()
        )

    status, _, told = torchrun(tuner(2), tmp_path / "two")
    assert status == 0, told
    result = tuner(4).run(tmp_path / "one", progress=False)
    stages = [stage.name for stage in (tmp_path / "one" / "stages").iterdir()]
    for stage in stages:
        if stage.endswith(("sft", "dpo")):
            assert_same(tmp_path / "one", tmp_path / "two", stage)
    measured = next(stage for stage in stages if "evaluate" in stage)
    record = json.loads((tmp_path / "two" / "stages" / measured / "stage.json").read_text())
    record = record.get("record", record)
    text = json.dumps(record)
    loss = float(re.findall(r'"loss": ([0-9.]+)', text)[0])
    assert loss == pytest.approx(result.metrics[measured]["loss"], rel=1e-4)


@pytest.mark.slow
def test_pairs_that_max_steps_comes_to_are_those_of_all_processes(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"max_steps": 2, "gradient_accumulation": 1, "learning_rate": 1e-3}
    status, _, told = torchrun(
        base(tiny_model).dpo(str(pairs), batch_size=2, **options), tmp_path / "two"
    )
    assert status == 0, told
    base(tiny_model).dpo(str(pairs), batch_size=4, **options).run(tmp_path / "one", progress=False)
    assert_same(tmp_path / "one", tmp_path / "two", "03-dpo")


@pytest.mark.slow
@pytest.mark.parametrize(
    "special",
    [
        {"packing": True, "max_length": 64, "epochs": 3},
        {"eval_steps": 1, "early_stopping": 1, "learning_rate": 0.05, "epochs": 6},
        {"gradient_checkpointing": True, "epochs": 1, "scheduler": "constant"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_an_option_does_it_does_in_all_processes(
    tiny_model: Path, rows: Path, tmp_path: Path, special: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"gradient_accumulation": 1, "eval_split": 4, "learning_rate": 1e-3}
    options |= special
    status, _, told = torchrun(
        base(tiny_model).sft(str(rows), batch_size=2, **options), tmp_path / "two"
    )
    assert status == 0, told
    base(tiny_model).sft(str(rows), batch_size=4, **options).run(tmp_path / "one", progress=False)
    # an update of Adam's is as large as the learning rate, however small the gradient
    assert_same(tmp_path / "one", tmp_path / "two", "03-sft", 0.02 * options["learning_rate"])
    if "early_stopping" in special:
        steps = [row["step"] for row in logged(tmp_path / "two", "03-sft")]
        assert max(steps) < 6 * -(-17 // 4), "it has not stopped early"


@pytest.mark.slow
def test_finished_stages_are_reused_by_all(tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    tuner = base(tiny_model).sft(str(rows), max_steps=2, batch_size=2)
    assert torchrun(tuner, tmp_path / "a")[0] == 0
    before = made(tmp_path / "a")
    status, _, told = torchrun(tuner, tmp_path / "a")
    assert status == 0, told
    assert told.count("reused") == 1
    assert differences(before, made(tmp_path / "a")) == []
    # one process makes other updates of the same recipe: its result is another
    tuner.run(tmp_path / "a", progress=False)
    assert [path.name[:6] for path in (tmp_path / "a" / "superseded").iterdir()] == ["03-sft"]


STOPS = """
if rank == {rank}:
    import transformers
    stock, calls = transformers.Trainer.training_step, []
    def step(*a, **k):
        calls.append(1)
        if len(calls) == 5:
            os.kill({target}, signal.{signal})
            time.sleep(1)
        return stock(*a, **k)
    transformers.Trainer.training_step = step
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "signal", "rank"),
    [
        ("os.getppid()", "SIGTERM", 0),
        ("os.getppid()", "SIGTERM", 1),
        ("os.getpid()", "SIGTERM", 0),
        ("os.getpid()", "SIGTERM", 1),
        ("os.getpid()", "SIGINT", 0),
        ("os.getpid()", "SIGINT", 1),
        ("os.getppid()", "SIGINT", 0),
    ],
)
def test_a_signal_stops_all_after_the_same_step_and_the_run_goes_on_as_if_undisturbed(
    tiny_model: Path, rows: Path, tmp_path: Path, rank: int, target: str, signal: str
) -> None:
    recipe = (
        Tuner(str(tiny_model), seed=3, device="cpu", precision="fp32")
        .quantize("nf4")
        .lora(r=4, dropout=0.3)
        .sft(str(rows), epochs=2, batch_size=2, gradient_accumulation=2)
    )
    assert torchrun(recipe, tmp_path / "calm")[0] == 0
    status, _, told = torchrun(
        recipe, tmp_path / "stopped", fault=STOPS.format(rank=rank, target=target, signal=signal)
    )
    assert status != 0
    said = [text for text in messages(told) if not text.startswith("stopping after")]
    assert len(said) == 1, told
    expected = "run the same again, which goes on from step 3 of 03-sft"
    assert re.search(rf"stopped by (SIGTERM|Ctrl-C \(SIGINT\)); {expected}", said[0])
    assert (tmp_path / "stopped" / "report.html").is_file()
    status, _, told = torchrun(recipe, tmp_path / "stopped")
    assert status == 0, told
    assert told.count("goes on from checkpoint-3") == 1
    assert differences(made(tmp_path / "calm"), made(tmp_path / "stopped")) == []


FAILURES = {
    "a loss that is no number": (
        """
if rank == {rank}:
    import transformers
    stock, calls = transformers.Trainer.training_step, []
    def step(*a, **k):
        calls.append(1)
        loss = stock(*a, **k)
        return loss * float("nan") if len(calls) == 3 else loss
    transformers.Trainer.training_step = step
""",
        r"03-sft, step 2 of \d: the loss is nan on .*train\.json, row \d+",
    ),
    "an error that nobody foresaw": (
        """
if rank == {rank}:
    import transformers
    stock, calls = transformers.Trainer.training_step, []
    def step(*a, **k):
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("planted")
        return stock(*a, **k)
    transformers.Trainer.training_step = step
""",
        r"KeyError: 'planted'.*nobody foresaw this",
    ),
    "an error before the training": (
        """
if rank == {rank}:
    from tunesmith.errors import DataError
    from tunesmith.plugin.quantizers import Quantizer
    from tunesmith_plugins.quantizers.nf4 import NF4
    def load(*a, **k):
        raise DataError("planted")
    NF4.load = load
""",
        r"planted",
    ),
    "data that one does not have": (
        """
if rank == {rank}:
    from tunesmith.engine import readings
    from tunesmith.errors import DataError
    def load_data(*a, **k):
        raise DataError("planted")
    assert readings.load_data
    readings.load_data = load_data
""",
        r"1 problem found before any weight was read:",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", FAILURES)
def test_what_ends_one_process_ends_all_with_its_message_said_once(
    tiny_model: Path, rows: Path, tmp_path: Path, what: str, rank: int
) -> None:
    fault, expected = FAILURES[what]
    began = time.monotonic()
    status, said, told = torchrun(
        base(tiny_model).sft(str(rows), epochs=1, batch_size=2, gradient_accumulation=2),
        tmp_path / "a",
        fault=fault.format(rank=rank),
    )
    assert status != 0
    assert said == ""
    found = messages(told)
    assert len(found) == 1, told
    assert re.search(expected, found[0])
    assert found[0].startswith("process 1 of 2: ") == (rank == 1)
    assert time.monotonic() - began < 90


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_others(
    tiny_model: Path, rows: Path, tmp_path: Path, rank: int
) -> None:
    fault = FAILURES["an error that nobody foresaw"][0].replace(
        'raise KeyError("planted")', "os.kill(os.getpid(), signal.SIGKILL)"
    )
    status, _, told = torchrun(
        base(tiny_model).sft(str(rows), epochs=1, batch_size=2, gradient_accumulation=2),
        tmp_path / "a",
        fault=fault.format(rank=rank),
    )
    assert status != 0
    assert len(messages(told)) == 1, told
    assert re.search("ended without saying why|stopped by SIGTERM", messages(told)[0])


@pytest.mark.slow
def test_a_trainer_that_would_train_in_each_process_for_itself_is_refused(
    tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    fault = """
import transformers
transformers.TrainingArguments.world_size = property(lambda self: 1)
"""
    status, _, told = torchrun(
        base(tiny_model).sft(str(rows), max_steps=1), tmp_path / "a", fault=fault
    )
    assert status != 0
    assert len(messages(told)) == 1
    assert "2 processes were asked for, and the trainer 'sft' would train in 1" in told


@pytest.mark.slow
def test_one_process_under_torchrun_is_one_process(
    tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    tuner = base(tiny_model).sft(str(rows), max_steps=2)
    status, _, told = torchrun(tuner, tmp_path / "a", processes=1)
    assert status == 0, told
    tuner.run(tmp_path / "b", progress=False)
    assert_same(tmp_path / "b", tmp_path / "a", "03-sft")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: got 'two'; expected a number"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4 and WORLD_SIZE is not set"),
        (
            {
                "WORLD_SIZE": "2",
                "RANK": "2",
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": "1",
            },
            "RANK is 2; with WORLD_SIZE 2 it has to be less",
        ),
    ],
)
def test_an_environment_that_asks_for_several_and_says_too_little_is_refused(
    environment: dict[str, str],
    expected: str,
    tiny_model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(world, "_world", None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=re.escape(expected)):
        base(tiny_model).sft(str(rows), max_steps=1).run(tmp_path / "a", progress=False)
    assert not (tmp_path / "a").exists()
    base(tiny_model).sft(str(rows), max_steps=1).to_yaml(tmp_path / "r.yaml")
    assert main(["run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "a")]) == 1
    assert expected in capsys.readouterr().err


def test_one_process_asks_nobody() -> None:
    alone = World()
    assert alone.main
    assert not alone.several
    assert alone.share(lambda: {"a": [1]}) == {"a": [1]}
    assert alone.most(3) == 3
    assert alone.gather("x") == ["x"]
    alone.barrier()
    with pytest.raises(TunesmithError, match="planted"), alone.together():
        raise RunError("planted")


@pytest.mark.parametrize("count", [1, 4, 5, 7, 8, 9, 21])
@pytest.mark.parametrize("processes", [2, 3])
def test_each_row_is_in_one_process_in_the_order_of_one(count: int, processes: int) -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    from tunesmith.plugin.shares import _Shares

    batches = BatchSampler(SequentialSampler(range(count)), 2, drop_last=False)
    shares = [list(_Shares(batches, processes, rank)) for rank in range(processes)]
    stock = BatchSamplerShard(batches, processes, 0)
    assert {len(share) for share in shares} == {len(stock)}  # the loop counts by it
    turns = [sorted(row for batch in turn for row in batch) for turn in zip(*shares, strict=True)]
    assert [row for turn in turns for row in turn] == list(range(count))


GIVEN = """
import torch
from tunesmith import Tuner, TunesmithError
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({model!r})
if rank == {other}:
    with torch.no_grad():
        model.model.norm.weight += 1
tuner = Tuner(model, tokenizer=AutoTokenizer.from_pretrained({model!r}), device="cpu")
tuner = tuner.lora(r=2).sft({rows!r}, max_steps=1, batch_size=2)
try:
    tuner.run({out!r}, progress=False)
except TunesmithError as error:
    print(f"tunesmith: {{error}}", file=sys.stderr)
    sys.exit(1)
sys.exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("other", [None, 1])
def test_each_process_gives_the_same_model_in_memory_which_is_kept_once(
    other: int | None, tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    script = GIVEN.format(model=str(tiny_model), rows=str(rows), out=str(out), other=other)
    status, _, told = torchrun(base(tiny_model), tmp_path / "unused", fault=script)
    kept = list((tmp_path / "cache" / "objects").iterdir())
    if other is None:
        assert status == 0, told
        assert len(kept) == 1
        assert f"model: {kept[0]}" in (out / "recipe.yaml").read_text()
        assert (out / "stages" / "02-sft" / "adapter").is_dir()
    else:
        assert status != 0
        assert "is another than that of the main one" in told
        assert not list((out / "stages").glob("[0-9]*"))
