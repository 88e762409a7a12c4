"""When checkpoints are taken that are kept, and how many of them: as their options say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine.runs import at_every_step, differences, made
from tunesmith import Tuner
from tunesmith.engine.checkpoints import Checkpoints
from tunesmith.engine.plan import make_plan
from tunesmith.engine.runner import run
from tunesmith.errors import OptionError
from tunesmith.plugin.events import StageReused
from tunesmith.plugin.optimizers import optimizer_problem
from tunesmith.plugin.registry import registry

# 12 rows by 4: three steps an epoch
QUICK: dict[str, Any] = {"batch_size": 4, "gradient_accumulation": 1, "learning_rate": 1e-2}


def tuner_of(model: Path, rows: Path, **options: Any) -> Tuner:
    return Tuner(model).lora(r=2).sft(rows, **{**QUICK, **options})


def kept(directory: Path) -> list[int]:
    found = directory.glob("stages/02-sft/checkpoints/checkpoint-*")
    return sorted(int(path.name.rpartition("-")[2]) for path in found)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps after which a checkpoint was written."""
    steps: list[int] = []
    write = Checkpoints.write

    def noting(self: Checkpoints, step: int, *args: Any, **kwargs: Any) -> Any:
        steps.append(step)
        return write(self, step, *args, **kwargs)

    monkeypatch.setattr(Checkpoints, "write", noting)
    return steps


@pytest.mark.parametrize(
    ("options", "taken", "stay"),
    [
        ({"save_strategy": "epoch"}, [3, 6, 9], [6, 9]),
        ({"save_strategy": "epoch", "save_total_limit": 1}, [3, 6, 9], [9]),
        ({"save_strategy": "epoch", "save_total_limit": 5}, [3, 6, 9], [3, 6, 9]),
        ({"save_steps": 2}, [2, 4, 6, 8, 9], [8, 9]),
        ({"save_steps": 4, "save_strategy": "steps", "save_total_limit": 3}, [4, 8, 9], [4, 8, 9]),
        ({"save_strategy": "no"}, [9], []),
        ({}, [9], []),
    ],
    ids=str,
)
def test_checkpoints_are_taken_and_kept_as_asked(
    options, taken, stay, tiny_model, alpaca_file, tmp_path, written
):
    tuner_of(tiny_model, alpaca_file, epochs=3, **options).run(tmp_path / "run", progress=False)
    assert written == taken
    assert kept(tmp_path / "run") == stay
    record = json.loads((tmp_path / "run/stages/02-sft/stage.json").read_text())["options"]
    assert record["save_strategy"] == options.get("save_strategy", "steps" if options else "no")


def test_no_is_not_by_time_either(tiny_model, alpaca_file, tmp_path, written, monkeypatch):
    at_every_step(monkeypatch)
    tuner_of(tiny_model, alpaca_file, max_steps=4).run(tmp_path / "time", progress=False)
    assert written == [1, 2, 3, 4]
    written.clear()
    tuner = tuner_of(tiny_model, alpaca_file, max_steps=4, save_strategy="no")
    tuner.run(tmp_path / "no", progress=False)
    assert written == [4]


def test_a_run_goes_on_from_the_end_of_an_epoch_to_the_same_bytes(
    tiny_model, alpaca_file, tmp_path
):
    tuner = tuner_of(
        tiny_model, alpaca_file, epochs=2, save_strategy="epoch", save_total_limit=1, eval_split=2
    )
    tuner.run(tmp_path / "whole", progress=False)

    class PulledError(Exception):
        """The plug was pulled."""

    def pull(run: Any, event: Any) -> None:
        if getattr(event, "step", 0) == 4:
            raise PulledError

    with pytest.raises(PulledError):
        run(tuner.recipe, tmp_path / "cut", registry(), [pull])
    run(tuner.recipe, tmp_path / "cut", registry())
    assert differences(made(tmp_path / "cut"), made(tmp_path / "whole")) == []


def test_how_a_stage_is_saved_does_not_make_it_another(tiny_model, alpaca_file, tmp_path):
    tuner_of(tiny_model, alpaca_file, max_steps=1).run(tmp_path / "run", progress=False)
    events: list[Any] = []
    again = tuner_of(
        tiny_model, alpaca_file, max_steps=1, save_strategy="epoch", save_total_limit=4
    )
    run(again.recipe, tmp_path / "run", registry(), [lambda run, event: events.append(event)])
    assert any(isinstance(event, StageReused) for event in events)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"save_strategy": "steps"}, "got 'steps' without save_steps"),
        ({"save_strategy": "epoch", "save_steps": 5}, "got 'epoch' with save_steps=5"),
        ({"save_strategy": "no", "save_steps": 5}, "got 'no' with save_steps=5"),
        (
            {"save_strategy": "epoch", "early_stopping": 1, "eval_split": 2},
            "takes a checkpoint at each evaluation",
        ),
        ({"save_total_limit": 3}, "no checkpoint is kept; give save_steps"),
        ({"save_total_limit": 3, "save_strategy": "no"}, "no checkpoint is kept; give save_steps"),
        ({"save_strategy": "epochs"}, "did you mean 'epoch'"),
        ({"save_total_limit": 0}, "at least 1"),
    ],
)
def test_what_would_not_be_done_is_refused(options, said):
    with pytest.raises(OptionError) as caught:
        Tuner("m").sft("rows.json", **options)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_a_paged_optimizer_on_a_cpu_is_a_problem_of_the_plan(name, tiny_model, alpaca_file):
    tuner = Tuner(tiny_model, device="cpu").lora(r=2).sft(alpaca_file, optimizer=name)
    [problem] = make_plan(tuner.recipe, registry()).problems
    assert problem.startswith(f"step 2 (sft): optimizer: got '{name}', which moves its states out")
    assert problem.endswith("the run is on cpu; take 'adamw'")
    assert optimizer_problem(name, "cuda") is None


def test_other_optimizers_are_none(tiny_model, alpaca_file):
    for name in ("auto", "adamw", "adamw_8bit", "adafactor", "sgd"):
        assert optimizer_problem(name, "cpu") is None
