"""No option is ignored: each is read by the step that takes it, or refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from tunesmith import Tuner
from tunesmith.errors import OptionError
from tunesmith.plugin.registry import Registered, registry
from tunesmith.plugin.trainers import SCHEDULERS, TrainerConfig

QUICK: dict[str, Any] = {"batch_size": 2, "gradient_accumulation": 1, "max_steps": 2}

# what takes an option out of others' shade: early stopping decides when is saved, max_steps how
# long is trained, and compiling takes g++ a minute
CHAINS: tuple[dict[str, Any], ...] = (
    {"eval_split": 3, "eval_steps": 1, "save_steps": 1, "loggers": ("none",)},
    {"eval_split": 3, "early_stopping": 2, "max_steps": None, "epochs": 0.5},
)

TRAINERS = [item.spec.name for item in registry().of_kind("trainers") if item.builtin]


@contextmanager
def watched(config: type, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Gather the names of the fields that a step's own code reads of its options."""
    names = {field.name for field in attrs.fields(config)}
    read: set[str] = set()

    def reading(self: Any, name: str) -> Any:
        caller = sys._getframe(1)
        module = caller.f_globals.get("__name__", "")
        # checking an option is no use of it, and no more is keeping it in a record
        checking = caller.f_code.co_name.startswith("__")
        if name in names and module.startswith("tunesmith") and not checking:
            read.add(name)
        return object.__getattribute__(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(config, "__getattribute__", reading, raising=False)
        yield read


def data_of(item: Registered, alpaca: Path, preferences: Path) -> Path:
    return {"conversation": alpaca, "preference": preferences}[item.spec.example or ""]


@pytest.mark.parametrize("name", TRAINERS)
def test_each_option_of_a_trainer_is_read(
    name, monkeypatch, tiny_model, alpaca_file, preference_file, tmp_path
):
    item = registry().find("trainers", name)
    data = data_of(item, alpaca_file, preference_file)
    with watched(item.spec.config, monkeypatch) as read:
        for number, options in enumerate(CHAINS):
            tuner = Tuner(tiny_model, precision="fp32").lora(r=2)
            tuner.train(name, data, **{**QUICK, **options}).run(
                tmp_path / str(number), progress=False
            )
    unread = {field.name for field in attrs.fields(item.spec.config)} - read
    # read by the plan, which reads the data
    assert unread <= {"eval_data"}


def test_an_option_that_nobody_reads_is_found(monkeypatch, tiny_model, alpaca_file, tmp_path):
    config = registry().find("trainers", "sft").spec.config
    with watched(config, monkeypatch) as read:
        made = config()
        assert made.packing is False
        assert attrs.asdict(made)["packing"] is False
    assert read == set()


SHARED = {field.name for field in attrs.fields(TrainerConfig)}


@pytest.mark.parametrize(
    ("verb", "options", "said"),
    [
        ("dpo", {"packing": True}, "unknown option 'packing' for dpo"),
        ("dpo", {"completion_only_loss": False}, "unknown option 'completion_only_loss' for dpo"),
        ("sft", {"beta": 0.2}, "unknown option 'beta' for sft"),
        ("sft", {"eval_steps": 2}, "eval_steps needs something to evaluate on"),
        ("dpo", {"eval_steps": 2}, "eval_steps needs something to evaluate on"),
        ("sft", {"early_stopping": 2}, "early_stopping needs something to evaluate on"),
        ("sft", {"scheduler": "constant", "warmup": 0.1}, "warmup: got 0.1 with the scheduler"),
        ("sft", {"scheduler": "constant", "warmup": 0.03}, "warmup: got 0.03 with the scheduler"),
        ("sft", {"warmup": 1.5}, "warmup: got 1.5; expected a share below 1 or a whole number"),
        ("sft", {"loggers": ("none", "wandb")}, "loggers: got none, wandb; none stands alone"),
        ("sft", {"eval_split": 2, "eval_data": "x"}, "eval_data and eval_split exclude"),
        ("sft", {"scheduler": "warmup_stable_decay"}, "expected one of cosine, linear"),
    ],
)
def test_what_a_step_does_not_read_is_refused(verb, options, said):
    with pytest.raises(OptionError) as caught:
        getattr(Tuner("m").lora(), verb)("data.jsonl", **options)
    assert said in str(caught.value)


def test_what_8_bits_do_not_have_is_refused():
    with pytest.raises(OptionError, match="quant_type is of 4 bits"):
        Tuner("m").quantize("bitsandbytes", bits=8, quant_type="nf4")
    with pytest.raises(OptionError, match="nested is of 4 bits"):
        Tuner("m").quantize("bitsandbytes", bits=8, nested=True)


def test_several_such_are_told_at_once():
    with pytest.raises(OptionError) as caught:
        Tuner("m").sft("d", early_stopping=1, eval_steps=2, scheduler="constant", warmup=3)
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    "scheduler",
    [
        pytest.param(each, marks=[] if each == "cosine_with_min_lr" else pytest.mark.slow)
        for each in SCHEDULERS
    ],
)
def test_every_scheduler_that_is_offered_trains(scheduler, tiny_model, alpaca_file, tmp_path):
    tuner = Tuner(tiny_model, precision="fp32").lora(r=2)
    result = tuner.sft(alpaca_file, scheduler=scheduler, **QUICK).run(
        tmp_path / "run", progress=False
    )
    assert result.metrics["02-sft"]["loss"] > 0


@attrs.frozen(kw_only=True)
class PlainConfig(TrainerConfig):
    """Options of a stranger's trainer, which has none of the fast pieces."""


@pytest.mark.parametrize(
    "piece", ["packing", "chunked_loss", "varlen_attention", "fused_layers", "compile"]
)
def test_a_strangers_trainer_refuses_the_pieces_it_does_not_have(piece):
    from tunesmith.plugin.options import structure

    assert piece not in SHARED
    with pytest.raises(OptionError, match=f"unknown option '{piece}' for plain"):
        structure(PlainConfig, {piece: True}, name="plain")
