"""Checkpoints are whole or not there; nothing in one is pickled; few are kept, never none."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tests.engine.runs import at_every_step
from tunesmith import Tuner
from tunesmith.engine import checkpoints as module
from tunesmith.engine.checkpoints import Checkpoints, Contents
from tunesmith.engine.resuming import Pace
from tunesmith.engine.runner import run
from tunesmith.engine.states import StateError, decode, encode, read_tensors, write_tensors
from tunesmith.plugin.registry import registry


def contents(number: float) -> Contents:
    return Contents({"a": torch.full((4,), number)}, {"n": number}, "{}")


@pytest.fixture
def kept(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "aside").mkdir()
    said: list[str] = []

    def put_aside(path: Path) -> Path:
        return path.rename(tmp_path / "aside" / path.name)

    made = Checkpoints(tmp_path / "checkpoints", put_aside, said.append)
    made.begin()
    return made, said


def names(made: Checkpoints) -> list[str]:
    return sorted(entry.name for entry in made.directory.iterdir())


BREAKS = {
    "a bit flipped": lambda path: flip(path / "weights.safetensors"),
    "weights cut short": lambda path: (path / "weights.safetensors").write_bytes(b"123"),
    "weights gone": lambda path: (path / "weights.safetensors").unlink(),
    "states flipped": lambda path: flip(path / "states.json"),
    "manifest gone": lambda path: (path / "checkpoint.json").unlink(),
    "manifest empty": lambda path: (path / "checkpoint.json").write_text(""),
    "manifest a list": lambda path: (path / "checkpoint.json").write_text("[]"),
    "step of another": lambda path: edit(path / "checkpoint.json", '"step": 2', '"step": 1'),
    "said to be over": lambda path: edit(path / "checkpoint.json", "false", "true"),
    "nothing in it": lambda path: (shutil.rmtree(path), path.mkdir()),
    "a file": lambda path: (shutil.rmtree(path), path.write_text("")),
}


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-2] ^= 4
    file.write_bytes(data)


def edit(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize("damage", BREAKS)
def test_the_newest_complete_one_is_taken_and_a_broken_one_named_and_kept_aside(
    kept, tmp_path, damage
):
    made, said = kept
    made.write(1, contents(1))
    newest = made.write(2, contents(2)).path
    BREAKS[damage](newest)
    found = made.begin()
    assert found is not None
    assert found.step == 1
    assert float(made.weights(found)["a"][0]) == 1.0
    assert made.states(found) == {"n": 1}
    assert said[0].startswith("checkpoint-2 is not used: ")
    assert (tmp_path / "aside" / "checkpoint-2").exists()


def test_one_whose_best_weights_are_broken_is_not_gone_on_from(kept):
    made, said = kept
    made.write(1, contents(1), best_step=1)
    made.write(2, contents(2), best_step=2)
    made.write(3, contents(3), best_step=2)
    flip(made.directory / "checkpoint-2" / "weights.safetensors")
    assert made.begin() is None
    assert len(said) == 3 - 1  # checkpoint-1 had been removed: two stay beside the best


def test_two_stay_and_the_best_one_of_each(kept):
    made, _ = kept
    for step in range(1, 7):
        made.write(step, contents(step), best_step=2 if step >= 2 else 1)
    assert names(made) == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]
    made.write(7, contents(7), best_step=7)
    assert names(made) == ["checkpoint-2", "checkpoint-6", "checkpoint-7"]


def test_the_only_complete_one_is_there_whenever_another_is_written(kept, monkeypatch):
    made, _ = kept
    write = module.write_tensors

    def looked_at(*args):
        whole = Checkpoints(made.directory, made.put_aside, lambda text: None)
        steps = [int(name.rpartition("-")[2]) for name in names(made) if name[0] != "."]
        assert all(whole._checked(step) for step in steps)
        seen.append(len(steps))
        return write(*args)

    monkeypatch.setattr(module, "write_tensors", looked_at)
    seen: list[int] = []
    for step in range(1, 6):
        made.write(step, contents(step))
    assert seen[2:] == [1] * 8


def test_one_that_could_not_be_written_leaves_the_one_before_and_no_draft(kept, monkeypatch):
    made, _ = kept
    made.write(1, contents(1))

    def fail(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(module, "publish", fail)
    with pytest.raises(MemoryError):
        made.write(2, contents(2))
    assert names(made) == ["checkpoint-1"]


def test_what_was_being_written_is_cleared(kept):
    made, said = kept
    made.write(1, contents(1))
    (made.directory / ".checkpoint-2.77.draft").mkdir()
    assert made.begin().step == 1
    assert names(made) == ["checkpoint-1"]
    assert said == []


def stepped(optimizer: torch.optim.Optimizer, weights: list[torch.Tensor]) -> None:
    for weight in weights:
        weight.grad = torch.sin(weight.detach() * 7)
    optimizer.step()


def adam8bit(weights):
    pytest.importorskip("bitsandbytes")
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(weights, lr=0.1, min_8bit_size=16)


def adafactor(weights):
    from transformers.optimization import Adafactor

    return Adafactor(weights, lr=0.1, relative_step=False, scale_parameter=False)


OPTIMIZERS = {
    "AdamW": lambda weights: torch.optim.AdamW(weights, lr=0.1),
    "AdamW, fused": lambda weights: torch.optim.AdamW(weights, lr=0.1, fused=True),
    "AdamW, amsgrad": lambda weights: torch.optim.AdamW(weights, lr=0.1, amsgrad=True),
    "SGD": lambda weights: torch.optim.SGD(weights, lr=0.1),
    "SGD, momentum": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9),
    "Adafactor": adafactor,
    "LBFGS": lambda weights: torch.optim.LBFGS(weights),
    "RMSprop": lambda weights: torch.optim.RMSprop(weights, lr=0.1, centered=True),
    "Adagrad": lambda weights: torch.optim.Adagrad(weights, lr=0.1),
    "Rprop": lambda weights: torch.optim.Rprop(weights, lr=0.1),
    "AdamW in 8 bits": adam8bit,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_an_optimizer_comes_back_as_it_was(name, tmp_path):
    def fresh():
        torch.manual_seed(3)
        return [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 8), (5,), (4, 2, 3))]

    def closure_step(optimizer, weights):
        if name != "LBFGS":
            return stepped(optimizer, weights)

        def closure():
            optimizer.zero_grad()
            loss = sum(weight.square().sum() for weight in weights)
            loss.backward()
            return loss

        return optimizer.step(closure)

    ours, theirs = fresh(), fresh()
    one, other = OPTIMIZERS[name](ours), OPTIMIZERS[name](theirs)
    for _ in range(3):
        closure_step(one, ours)
    tensors: dict[str, torch.Tensor] = {}
    tree = json.loads(json.dumps(encode(one.state_dict(), tensors)))
    write_tensors(tmp_path / "states", tensors)
    other.load_state_dict(decode(tree, read_tensors(tmp_path / "states")))
    with torch.no_grad():
        for mine, its in zip(ours, theirs, strict=True):
            its.copy_(mine)
    for _ in range(3):
        closure_step(one, ours)
        closure_step(other, theirs)
    assert all(torch.equal(mine, its) for mine, its in zip(ours, theirs, strict=True))


def test_what_has_no_form_without_pickle_is_named():
    with pytest.raises(StateError, match=r"a/0 is a builtins\.object"):
        encode({"a": [object()]}, {})


@pytest.mark.parametrize(
    "tree", [{"a": 1, "b": 2}, {"unknown": 1}, {"dict": [[[1], 2]]}], ids=["two", "kind", "key"]
)
def test_a_record_that_is_no_state_is_refused(tree):
    with pytest.raises(StateError):
        decode(tree, {})


def test_no_checkpoint_is_pickled_and_none_unpickled(
    tiny_model, alpaca_file, tmp_path, monkeypatch
):
    at_every_step(monkeypatch)
    tuner = Tuner(tiny_model).lora(r=2)
    tuner = tuner.sft(alpaca_file, max_steps=3, batch_size=2, gradient_accumulation=1)

    def refuse(*args, **kwargs):
        raise AssertionError("pickled")

    class StopError(Exception):
        """After the second step."""

    def stop(run, event):
        if getattr(event, "step", 0) == 3:
            raise StopError

    for name in ("save", "load"):
        monkeypatch.setattr(torch, name, refuse)
    for name in ("dump", "load", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    with pytest.raises(StopError):
        run(tuner.recipe, tmp_path / "run", registry(), [stop])
    held = sorted(f.name for f in (tmp_path / "run").rglob("checkpoint-2/*"))
    assert held == [
        "checkpoint.json",
        "states.json",
        "states.safetensors",
        "trainer_state.json",
        "weights.safetensors",
    ]
    run(tuner.recipe, tmp_path / "run", registry())


def test_a_checkpoint_is_due_by_time_by_share_and_never_dearly(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tunesmith.engine.resuming.time.monotonic", lambda: now[0])
    pace = Pace()
    pace.start(0)
    now[0] = 59.0
    assert not pace.due(50, 100)
    now[0] = 61.0
    assert pace.due(10, 100)
    assert not pace.due(9, 100)
    now[0] = 601.0
    assert pace.due(1, 100)
    now[0] = 661.0
    pace.taken(1, 601.0)  # it took a minute
    now[0] = 661.0 + 1199.0
    assert not pace.due(90, 100)
    now[0] = 661.0 + 1201.0
    assert pace.due(90, 100)
