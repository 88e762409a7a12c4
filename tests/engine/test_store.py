"""The run directory has one owner, and what is finished appears whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tunesmith.engine.seals import sealed
from tunesmith.engine.store import RunStore, Stage, problem_with, read_stages
from tunesmith.errors import RunError


def made(store: RunStore, name: str, fingerprint: str) -> Stage:
    directory = store.begin(name, fingerprint)
    (directory / "result.txt").write_text(fingerprint)
    return store.finish(
        Stage(name, directory, "train", "tunesmith:sft", fingerprint, metrics={"loss": 1.0})
    )


def test_a_finished_stage_is_found_again_by_its_fingerprint(tmp_path):
    with RunStore(tmp_path / "run") as store:
        stage = made(store, "01-sft", "aa")
        assert store.find("01-sft", "aa") == stage
        assert store.find("01-sft", "bb") is None
    assert read_stages(tmp_path / "run") == [stage]


def test_a_stage_at_work_is_not_a_finished_one(tmp_path):
    with RunStore(tmp_path / "run") as store:
        store.begin("01-sft", "aa")
        assert store.find("01-sft", "aa") is None
        assert read_stages(tmp_path / "run") == []


def test_an_interrupted_stage_keeps_its_checkpoints_and_nothing_else(tmp_path):
    with RunStore(tmp_path / "run") as store:
        partial = store.begin("01-sft", "aa")
        (partial / "checkpoints" / "checkpoint-2").mkdir(parents=True)
        (partial / "adapter").mkdir()
        assert (store.begin("01-sft", "aa") / "checkpoints" / "checkpoint-2").exists()
        assert not (partial / "adapter").exists()


def test_checkpoints_of_another_recipe_are_put_aside_and_not_deleted(tmp_path):
    said: list[str] = []
    with RunStore(tmp_path / "run") as store:
        store.warn = said.append
        (store.begin("01-sft", "aa") / "checkpoints" / "checkpoint-2").mkdir(parents=True)
        assert not (store.begin("01-sft", "bb") / "checkpoints").exists()
    kept = tmp_path / "run" / "superseded" / "01-sft-aa-unfinished"
    assert (kept / "checkpoints" / "checkpoint-2").is_dir()
    assert str(kept) in said[0]


def test_stages_of_another_recipe_are_put_aside_and_not_deleted(tmp_path):
    with RunStore(tmp_path / "run") as store:
        made(store, "01-sft", "aa")
        moved = store.supersede({"01-sft": "bb"})
        assert [name for name, _ in moved] == ["01-sft"]
        assert (moved[0][1] / "result.txt").read_text() == "aa"
        assert read_stages(tmp_path / "run") == []


def test_a_second_run_in_the_same_directory_is_refused_with_the_holder_named(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tunesmith.engine.store import RunStore\n"
        "with RunStore(Path(sys.argv[1])): pass"
    )
    with RunStore(tmp_path / "run"):
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "run"],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode != 0
    assert "in use by process" in done.stderr


def test_a_directory_with_other_things_in_it_is_not_taken(tmp_path):
    (tmp_path / "thesis.txt").write_text("do not touch")
    assert "is not empty and holds no run" in problem_with(tmp_path)
    with pytest.raises(RunError, match="holds no run"), RunStore(tmp_path):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_path_that_cannot_be_a_directory_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in problem_with(file)
    assert "cannot be written" in problem_with(file / "run")


def test_looking_for_problems_leaves_nothing_behind(tmp_path):
    assert problem_with(tmp_path / "a" / "b") is None
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_stage_says_which_file_and_what_to_do(tmp_path):
    with RunStore(tmp_path / "run") as store:
        stage = made(store, "01-sft", "aa")
    (stage.path / "stage.json").write_text("{")
    with pytest.raises(RunError, match=r"stage\.json: it is not JSON.*run the recipe .* again"):
        read_stages(tmp_path / "run")


def test_stage_json_is_plain_to_read(tmp_path):
    with RunStore(tmp_path / "run") as store:
        stage = made(store, "01-sft", "aa")
    row = json.loads((stage.path / "stage.json").read_text())
    assert row["name"] == "01-sft"
    assert row["metrics"] == {"loss": 1.0}
    assert row["finished"].startswith("20")


@pytest.mark.parametrize(
    ("name", "fingerprint"),
    [
        ("../../../kept", "project"),
        ("../../../kept", "ab" * 32),
        ("01-sft", "../../../../kept"),
        ("01-sft", "/kept"),
        ("/kept", "ab"),
        ("", "ab"),
        ("01-sft/../../../../kept", "ab"),
    ],
)
def test_a_run_directory_from_elsewhere_removes_nothing_of_yours(tmp_path, name, fingerprint):
    for precious in ("kept-project", "kept", "kept-abababab"):
        (tmp_path / precious).mkdir()
        (tmp_path / precious / "thesis.txt").write_text("years of work")
    received = tmp_path / "deep" / "run"
    with RunStore(received) as store:
        stage = made(store, "01-sft", "aa")
        store.write_recipe("tunesmith: 1")
    row = json.loads((stage.path / "stage.json").read_text())
    row |= {"name": name, "fingerprint": fingerprint}
    (stage.path / "stage.json").write_text(json.dumps(row))
    for record in (json.dumps(row), sealed({k: v for k, v in row.items() if k != "sha256"})):
        with RunStore(received) as store:
            if (received / "damaged" / "01-sft").exists():
                (received / "damaged" / "01-sft").rename(received / "stages" / "01-sft")
            (stage.path / "stage.json").write_text(record)
            store.supersede({})
        assert (received / "damaged" / "01-sft" / "result.txt").exists()
    for precious in ("kept-project", "kept", "kept-abababab"):
        assert (tmp_path / precious / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("part", ["stages", "superseded", "damaged", "recipe.yaml", "run.lock"])
def test_a_link_out_of_the_run_directory_is_refused(tmp_path, part):
    with RunStore(tmp_path / "run") as store:
        made(store, "01-sft", "aa")
        store.write_recipe("tunesmith: 1")
    outside = tmp_path / "outside"
    place = tmp_path / "run" / part
    if place.exists():
        place.rename(outside)
    else:
        outside.mkdir()
    place.symlink_to(outside)
    before = contents(outside)
    with pytest.raises(RunError, match="link"), RunStore(tmp_path / "run") as store:
        store.supersede({})
    assert contents(outside) == before


def contents(path):
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return [(file, file.read_bytes() if file.is_file() else b"") for file in files]


def test_a_stage_that_is_a_link_is_put_aside_and_where_it_leads_stays(tmp_path):
    with RunStore(tmp_path / "run") as store:
        stage = made(store, "01-sft", "aa")
        store.write_recipe("tunesmith: 1")
    stage.path.rename(tmp_path / "outside")
    stage.path.symlink_to(tmp_path / "outside")
    before = contents(tmp_path / "outside")
    said: list[str] = []
    with RunStore(tmp_path / "run") as store:
        store.warn = said.append
        store.supersede({})
    assert "is a link" in said[0]
    assert (tmp_path / "run" / "damaged" / "01-sft").is_symlink()
    assert contents(tmp_path / "outside") == before


def test_a_stage_that_was_put_aside_twice_is_kept_twice(tmp_path):
    with RunStore(tmp_path / "run") as store:
        for _ in range(3):
            made(store, "01-sft", "aa")
            store.supersede({})
    aside = sorted(entry.name for entry in (tmp_path / "run" / "superseded").iterdir())
    assert aside == ["01-sft-aa", "01-sft-aa-2", "01-sft-aa-3"]


@pytest.mark.parametrize("name", ["../x", "a/b", "01-", "sft", "01-../x", "", "01-a/b"])
def test_a_stage_name_that_is_no_number_and_label_is_refused(tmp_path, name):
    with RunStore(tmp_path / "run") as store, pytest.raises(RunError, match="stage name"):
        store.begin(name, "aa")
