"""A run directory that is broken, foreign or incomplete: it says what was found, what to do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith import Tuner, TunesmithError
from tunesmith.cli import main
from tunesmith.engine.result import RunResult
from tunesmith.engine.runner import run
from tunesmith.engine.seals import sealed
from tunesmith.errors import RunError
from tunesmith.plugin.events import StageReused, Warned
from tunesmith.plugin.registry import registry
from tunesmith.report.html import write_report

Damage = Callable[[Path], None]
QUICK = {"batch_size": 4, "gradient_accumulation": 1, "max_steps": 1}

CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[]",
    "cut short": b'{"name": "02-s',
    "null": b"null",
    "a number": b"3",
    "a text": b'"text"',
    "binary": bytes(range(256)) * 4,
    "zeros": bytes(4096),
    "nested too deep": b"[" * 100_000,
    "no UTF-8": b'{"name": "\xff\xfe"}',
    "a number without end": b'{"seconds": ' + b"9" * 5000 + b"}",
    "an empty object": b"{}",
    "another file": b"#!/bin/sh\nexit 1\n",
}


def content(name: str, data: bytes) -> Damage:
    return lambda directory: (directory / name).write_bytes(data) and None


def gone(name: str) -> Damage:
    def damage(directory: Path) -> None:
        place = directory / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()

    return damage


def directory_for_file(name: str) -> Damage:
    def damage(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name / "in it").mkdir(parents=True)

    return damage


def file_for_directory(name: str) -> Damage:
    def damage(directory: Path) -> None:
        shutil.rmtree(directory / name)
        (directory / name).write_text("a file")

    return damage


def link(name: str) -> Damage:
    def damage(directory: Path) -> None:
        outside = directory.parent / "outside"
        (directory / name).rename(outside)
        (directory / name).symlink_to(outside)

    return damage


def fields(change: Callable[[dict], object]) -> Damage:
    """Change the record of a stage and seal it, as whoever knows the format can."""

    def damage(directory: Path) -> None:
        file = directory / "stages" / "02-sft" / "stage.json"
        row = json.loads(file.read_text())
        del row["sha256"]
        change(row)
        file.write_text(sealed(row))

    return damage


def emptied(directory: Path) -> None:
    shutil.rmtree(directory / "stages/02-sft")
    (directory / "stages/02-sft").mkdir()


def edited(directory: Path) -> None:
    file = directory / "stages" / "02-sft" / "stage.json"
    file.write_text(file.read_text().replace('"seconds": ', '"seconds": 1'))


def flipped(directory: Path) -> None:
    """Flip a bit of the adapter; leave size and time as they were."""
    file = directory / "stages" / "02-sft" / "adapter" / "adapter_model.safetensors"
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def replaced(directory: Path) -> None:
    """Put an adapter of another training in the place of this one's."""
    file = directory / "stages" / "02-sft" / "adapter" / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({name: weight + 1 for name, weight in load_file(file).items()}, file)


ADAPTER = "stages/02-sft/adapter"
STAGE_CASES: dict[str, Damage] = {
    **{f"stage.json {k}": content("stages/02-sft/stage.json", v) for k, v in CONTENTS.items()},
    "stage.json gone": gone("stages/02-sft/stage.json"),
    "stage.json a directory": directory_for_file("stages/02-sft/stage.json"),
    "stage.json a link": link("stages/02-sft/stage.json"),
    "stage.json edited": edited,
    **{
        f"without {name}": fields(lambda row, name=name: row.pop(name))
        for name in (
            "name",
            "verb",
            "plugin",
            "fingerprint",
            "options",
            "metrics",
            "seconds",
            "files",
        )
    },
    "a field too many": fields(lambda row: row.update(more=1)),
    "name of another": fields(lambda row: row.update(name="03-dpo")),
    "name a path": fields(lambda row: row.update(name="../../x")),
    "name a number": fields(lambda row: row.update(name=2)),
    "fingerprint a path": fields(lambda row: row.update(fingerprint="../../../x")),
    "fingerprint null": fields(lambda row: row.update(fingerprint=None)),
    "verb unknown": fields(lambda row: row.update(verb="destroy")),
    "metrics a list": fields(lambda row: row.update(metrics=[])),
    "a metric a text": fields(lambda row: row.update(metrics={"loss": "low"})),
    "seconds a text": fields(lambda row: row.update(seconds="1")),
    "seconds true": fields(lambda row: row.update(seconds=True)),
    "options a list": fields(lambda row: row.update(options=[])),
    "files a list": fields(lambda row: row.update(files=[])),
    "files outside": fields(lambda row: row.update(files={"../../x": {"bytes": 1, "sha256": "0"}})),
    "files without hash": fields(lambda row: row.update(files={"adapter/x": {"bytes": 1}})),
    "adapter gone": gone(ADAPTER),
    "adapter a file": file_for_directory(ADAPTER),
    "adapter a link": link(ADAPTER),
    "weights gone": gone(f"{ADAPTER}/adapter_model.safetensors"),
    "weights empty": content(f"{ADAPTER}/adapter_model.safetensors", b""),
    "weights garbage": content(f"{ADAPTER}/adapter_model.safetensors", b"\0" * 999),
    "weights a directory": directory_for_file(f"{ADAPTER}/adapter_model.safetensors"),
    "weights a link": link(f"{ADAPTER}/adapter_model.safetensors"),
    "weights flipped": flipped,
    "weights replaced": replaced,
    "adapter_config.json garbage": content(f"{ADAPTER}/adapter_config.json", b"{"),
    "adapter_config.json gone": gone(f"{ADAPTER}/adapter_config.json"),
    "the stage a file": file_for_directory("stages/02-sft"),
    "the stage a link": link("stages/02-sft"),
    "the stage empty": emptied,
}
HEAD_CASES: dict[str, Damage] = {
    **{f"lock.json {k}": content("lock.json", v) for k, v in CONTENTS.items()},
    **{f"recipe.yaml {k}": content("recipe.yaml", v) for k, v in CONTENTS.items()},
    **{f"{name} gone": gone(name) for name in ("lock.json", "recipe.yaml")},
    **{f"{name} a directory": directory_for_file(name) for name in ("lock.json", "recipe.yaml")},
    **{f"{name} a link": link(name) for name in ("lock.json", "recipe.yaml")},
    "lock.json of wrong types": content("lock.json", b'{"device": 1, "precision": []}'),
    "lock.json of no device": content("lock.json", b'{"device": "moon", "precision": "fp32"}'),
    "lock.json of no precision": content("lock.json", b'{"device": "cpu", "precision": "fp99"}'),
    "recipe.yaml of no recipe": content("recipe.yaml", b"steps: {a: b}\n"),
    "recipe.yaml of a gone model": content("recipe.yaml", b"model: ./gone\nsteps: []\n"),
    "stages a file": file_for_directory("stages"),
    "stages a link": link("stages"),
    "stages gone": gone("stages"),
    "report.html a directory": lambda directory: (directory / "report.html").mkdir(),
    "superseded a file": lambda directory: (directory / "superseded").write_text("") and None,
    "run.lock a directory": directory_for_file("run.lock"),
    "run.lock garbage": content("run.lock", bytes(range(256))),
    "checked.json garbage": content("stages/02-sft/checked.json", b"[1"),
    "checked.json a directory": directory_for_file("stages/02-sft/checked.json"),
    "log.jsonl garbage": content("stages/02-sft/log.jsonl", b"\xff{[\n3\n"),
    "log.jsonl gone": gone("stages/02-sft/log.jsonl"),
}
CASES = {**STAGE_CASES, **HEAD_CASES}
SAMPLE = {
    "stage.json cut short",
    "name a path",
    "weights flipped",
    "the stage a link",
    "recipe.yaml a directory",
}


@pytest.fixture(scope="module")
def recipe(tiny_model, tmp_path_factory):
    rows = [{"instruction": f"say {n}", "output": f"the number is {n}"} for n in range(8)]
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    file.write_text(json.dumps(rows))
    return Tuner(tiny_model).lora(r=2).sft(file, **QUICK).recipe


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    run(recipe, directory, registry())
    return directory


@pytest.fixture
def damaged(finished, tmp_path, request):
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    CASES[request.param](directory)
    return directory


def test_there_are_many_cases():
    assert len(CASES) >= 60


@pytest.mark.parametrize("damaged", STAGE_CASES, indirect=True)
def test_opening_a_run_with_a_damaged_stage_says_what_was_found(damaged):
    with pytest.raises(RunError, match="02-sft") as caught:
        RunResult.open(damaged)
    text = str(caught.value)
    assert "is damaged: " in text
    assert "run the recipe in this directory again" in text


@pytest.mark.parametrize("damaged", CASES, indirect=True)
def test_generating_from_a_damaged_run_answers_or_says_what_was_found(damaged):
    said = ""
    try:
        RunResult.open(damaged).generate("say 3", max_new_tokens=2)
    except TunesmithError as error:
        said = str(error)
    assert not said or str(damaged) in said or said.startswith("model ./gone: ")


@pytest.mark.parametrize("damaged", CASES, indirect=True)
def test_chatting_with_a_damaged_run_never_shows_a_traceback(damaged, monkeypatch, capsys):
    said = iter(["say 3", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(said))
    assert main(["chat", str(damaged), "--max-new-tokens", "2"]) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("damaged", CASES, indirect=True)
def test_a_report_is_written_of_any_directory_that_lets_it(damaged):
    if (damaged / "report.html").is_dir():
        with pytest.raises(RunError, match=r"report\.html: cannot be written: is a directory"):
            write_report(damaged)
    else:
        assert write_report(damaged).read_text().startswith("<!")


@pytest.mark.parametrize(
    "damaged",
    [pytest.param(k, marks=() if k in SAMPLE else pytest.mark.slow) for k in CASES],
    indirect=True,
)
def test_running_in_a_damaged_directory_mends_it_or_says_what_to_do(damaged, recipe, finished):
    before = weights_in(damaged.parent)
    events: list = []
    refused = ""
    try:
        run(recipe, damaged, registry(), [lambda run, event: events.append(event)])
    except RunError as error:
        refused = str(error)
    if refused:
        assert any(part in refused for part in ("is meant", "is a link", "run.lock"))
    else:
        told = [event.text for event in events if isinstance(event, Warned)]
        reused = any(isinstance(event, StageReused) for event in events)
        aside = list((damaged / "damaged").glob("02-sft*"))
        if not reused and (damaged / "damaged").exists():
            assert aside
            assert any("02-sft" in text and str(aside[0]) in text for text in told)
        one = finished / ADAPTER / "adapter_model.safetensors"
        assert (damaged / ADAPTER / "adapter_model.safetensors").read_bytes() == one.read_bytes()
        RunResult.open(damaged)
    # whatever was there is there still, here or aside
    left = weights_in(damaged.parent)
    assert all(data in left for data in before)


def weights_in(directory: Path) -> list[bytes]:
    files = [path for path in directory.rglob("*.safetensors") if path.is_file()]
    return [path.read_bytes() for path in files]
