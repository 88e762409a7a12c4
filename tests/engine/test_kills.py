"""A run is killed, or its writes fail, at any file operation; it then goes on to the same bytes."""

from __future__ import annotations

import errno
import json
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.engine.faults.harness import Ended, Faults, built
from tests.engine.runs import differences, made
from tunesmith import Tuner
from tunesmith.engine.checkpoints import Checkpoints

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
    pytest.mark.skipif(sys.platform != "linux", reason="preloads a library"),
]

QUICK = {"batch_size": 2, "gradient_accumulation": 1, "learning_rate": 1e-2}
KINDS = {
    "constant": {"max_steps": 4, "scheduler": "constant"},
    "linear": {"max_steps": 4, "scheduler": "linear", "warmup": 2},
    "dropout": {"max_steps": 4, "method": {"dropout": 0.3}},
    "accumulation": {"epochs": 2, "gradient_accumulation": 3},
    "packing": {"epochs": 2, "packing": True, "max_length": 64},
    "early stopping": {"epochs": 4, "learning_rate": 0.3, "eval_split": 3, "early_stopping": 1},
    "full": {"max_steps": 3, "method": None},
    "save_steps": {"max_steps": 5, "save_steps": 2},
    "adafactor": {"max_steps": 3, "optimizer": "adafactor"},
    "dpo": {"max_steps": 3, "dpo": True},
    "dpo, all weights": {"max_steps": 3, "dpo": True, "method": None},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Rows and pairs."""
    root = tmp_path_factory.mktemp("rows")
    rows = [{"instruction": f"say {n}", "output": f"the number is {n}"} for n in range(8)]
    pairs = [
        {"prompt": f"say {n}", "chosen": f"the number is {n}", "rejected": f"no, not {n}"}
        for n in range(8)
    ]
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "pairs.json").write_text(json.dumps(pairs))
    return root / "rows.json", root / "pairs.json"


@pytest.fixture(scope="module")
def faults(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, files: tuple[Path, Path]
) -> Iterator[Faults]:
    """SFT, DPO and a merge, with a checkpoint after each step."""
    root = tmp_path_factory.mktemp("faults")
    rows, pairs = files
    tuner = Tuner(tiny_model, precision="fp32")
    tuner = tuner.lora(r=2, dropout=0.1).sft(rows, max_steps=3, **QUICK)
    tuner = tuner.dpo(pairs, max_steps=2, **QUICK).merge()
    with Faults(built(root), tuner.recipe.to_yaml(), root) as server:
        yield server


def recipe_of(kind: str, model: Path, files: tuple[Path, Path]) -> str:
    options = {**QUICK, **KINDS[kind]}
    method, pairwise = options.pop("method", {}), options.pop("dpo", False)
    tuner = Tuner(model, precision="fp32")
    if method is not None:
        tuner = tuner.lora(r=2, **method)
    tuner = tuner.dpo(files[1], **options) if pairwise else tuner.sft(files[0], **options)
    return tuner.recipe.to_yaml()


def goes_on(faults: Faults, out: Path, whole: Path | None = None, recipe: str | None = None) -> str:
    """Run again without a fault; return what is wrong with what came of it, or nothing."""
    again = faults.run(out, recipe=recipe)
    if again.status != 0:
        return f"does not go on: {again.said[-600:]}"
    if wrong := differences(made(out), made(whole or faults.whole)):
        return f"is not the same: {wrong}"
    drafts = [entry.name for entry in out.rglob("*.draft")]
    aside = [entry.name for entry in out.iterdir() if entry.name in ("damaged", "superseded")]
    return f"leaves {drafts + aside}" if drafts or aside else ""


def spread(count: int, wanted: int) -> Sequence[int]:
    """Return so many of the numbers 1 to count, the last one among them."""
    return sorted({max(1, round(count * part / wanted)) for part in range(1, wanted + 1)})


def killed_at(faults: Faults, points: Sequence[int], tmp_path: Path, how: str) -> list[str]:
    operations = faults.operations()
    found = []
    for at in points:
        out = tmp_path / f"run-{at}"
        ended = faults.run(out, at=at, how=how)
        assert ended.status == -9, ended.said
        if wrong := goes_on(faults, out):
            found.append(f"{how} at {at}, {operations[at - 1]}: {wrong}")
        shutil.rmtree(out)
    print(f"{how}: {len(points)} of {len(operations)} operations, {len(found)} failed")
    return found


def test_a_run_that_is_killed_before_a_file_operation_goes_on_to_the_same_bytes(faults, tmp_path):
    count = len(faults.operations())
    assert count > 200
    assert killed_at(faults, spread(count, 8), tmp_path, "kill") == []


@pytest.mark.slow
def test_a_run_that_is_killed_before_any_file_operation_goes_on_to_the_same_bytes(faults, tmp_path):
    points = range(1, len(faults.operations()) + 1)
    assert killed_at(faults, points, tmp_path, "kill") == []


@pytest.mark.slow
def test_a_run_that_is_killed_within_any_write_goes_on_to_the_same_bytes(faults, tmp_path):
    operations = faults.operations()
    points = [at for at, each in enumerate(operations, 1) if each.startswith("write ")]
    assert killed_at(faults, points, tmp_path, "torn") == []


@pytest.mark.slow
def test_a_run_that_is_killed_twice_goes_on_to_the_same_bytes(faults, tmp_path):
    draw = random.Random(2)
    count = len(faults.operations())
    found = []
    for trial in range(25):
        out = tmp_path / f"run-{trial}"
        first, second = draw.randint(1, count), draw.randint(1, count)
        faults.run(out, at=first)
        faults.run(out, at=second)  # or to its end, where less is left to do
        if wrong := goes_on(faults, out):
            found.append(f"{first}, then {second}: {wrong}")
        shutil.rmtree(out)
    assert found == []


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(faults, tmp_path):
    draw = random.Random(1)
    found = []
    began = time.perf_counter()
    faults.operations()
    whole = time.perf_counter() - began
    for trial in range(50):
        out = tmp_path / f"run-{trial}"
        moment = draw.uniform(0.0, whole)
        ended = faults.run(out, kill_after=moment)
        if wrong := goes_on(faults, out):
            found.append(f"after {moment} s ({ended.status}): {wrong}")
        shutil.rmtree(out)
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_any_kind_killed_after_a_checkpoint_goes_on_to_the_same_bytes(
    kind, faults, tiny_model, files, tmp_path
):
    recipe = recipe_of(kind, tiny_model, files)
    operations = faults.operations(recipe)
    assert faults.run(tmp_path / "whole", recipe=recipe).status == 0
    found = []
    published = [
        at
        for at, each in enumerate(operations, 1)
        if each.startswith("rename ") and each.rpartition("/")[2].startswith("checkpoint-")
    ]
    assert published
    for at in published:
        out = tmp_path / f"run-{at}"
        assert faults.run(out, at=at + 1, recipe=recipe).status == -9
        if wrong := goes_on(faults, out, tmp_path / "whole", recipe):
            found.append(f"after {operations[at - 1]}: {wrong}")
    assert found == []


WRITES = ("write", "pwrite", "writev", "open", "mkdir", "fsync", "rename", "truncate")


def failed_at(faults: Faults, number: int, points: Sequence[int], tmp_path: Path) -> list[str]:
    """Let the writes from each of some points on fail; say what is wrong with what comes of it."""
    operations = faults.operations()
    found = []
    for at in points:
        out = tmp_path / f"run-{at}"
        ended = faults.run(out, at=at, how=str(number))
        where = f"{errno.errorcode[number]} at {at}, {operations[at - 1]}"
        later = {each.split()[0] for each in operations[at - 1 :]}
        if ended.status == 0 and later.isdisjoint(WRITES):
            continue  # what is left removes, which a full disk allows
        if ended.status != 1 or not in_our_words(ended):
            found.append(f"{where}: ended with {ended.status}: {ended.said[-600:]}")
        elif lost := checkpoint_lost(out, operations[: at - 1]):
            found.append(f"{where}: {lost}")
        elif wrong := goes_on(faults, out):
            found.append(f"{where}: {wrong}")
        shutil.rmtree(out, ignore_errors=True)
    print(f"{errno.errorcode[number]}: {len(points)} points, {len(found)} failed")
    return found


def in_our_words(ended: Ended) -> bool:
    error = ended.said.partition("error:")[2]
    said = ("run the same again", "choose another directory", "the weights are whole, in")
    return any(part in error for part in said)


def checkpoint_lost(out: Path, before: Sequence[str]) -> str:
    """Say which checkpoint was complete before the fault and has neither stayed nor a successor."""
    names = [each.rpartition("/")[2] for each in before if each.startswith("rename stages/.")]
    steps = [name for name in names if name.startswith("checkpoint-")]
    finished = [each for each in before if each.startswith("rename stages/0")]
    stage = "02-sft" if not finished else "03-dpo"
    own = [each for each in before if f"/.{stage}.partial/checkpoints/checkpoint-" in f"/{each}"]
    if not steps or len(finished) > 1 or not any(each.startswith("rename") for each in own):
        return ""
    directory = out / "stages" / f".{stage}.partial" / "checkpoints"
    if (out / "stages" / stage).exists():
        return ""
    said: list[str] = []
    found = Checkpoints(directory, lambda path: path, said.append).begin()
    return "" if found is not None and not said else f"no checkpoint is left: {said}"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
def test_a_failed_write_is_told_in_our_words_and_loses_no_checkpoint(faults, tmp_path, number):
    points = [at for at, each in enumerate(faults.operations(), 1) if each.split()[0] in WRITES]
    some = [points[at - 1] for at in spread(len(points), 4)]
    assert failed_at(faults, number, some, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES], ids=errno.errorcode.get
)
def test_any_failed_write_is_told_in_our_words_and_loses_no_checkpoint(faults, tmp_path, number):
    points = [at for at, each in enumerate(faults.operations(), 1) if each.split()[0] in WRITES]
    assert failed_at(faults, number, points, tmp_path) == []


@pytest.mark.slow
def test_a_write_beyond_the_limit_of_a_file_is_told_in_our_words(faults, tmp_path):
    points = [at for at, each in enumerate(faults.operations(), 1) if each.startswith("write ")]
    assert failed_at(faults, errno.EFBIG, points, tmp_path) == []
