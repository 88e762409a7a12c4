"""Of several runs that begin at once in a directory one goes on; the others say who holds it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.engine.locking import DirectoryLock
from tunesmith.engine.store import RunStore, problem_with
from tunesmith.errors import RunError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="locks are POSIX")

# all wait for one moment, and the winner makes the directory and holds it for a while
RACE = """
import os, sys, time
from pathlib import Path
from tunesmith.engine.store import RunStore, problem_with
from tunesmith.errors import RunError
for round in range(int(sys.argv[3])):
    directory = Path(sys.argv[1]) / str(round)
    until = float(sys.argv[2]) + 0.3 * round
    time.sleep(max(0.0, until - time.time()))
    try:
        problem = problem_with(directory)
        if problem:
            raise RunError(problem)
        with RunStore(directory) as store:
            store.write_recipe("tunesmith: 1")
            (directory / "stages" / ".01-sft.partial").mkdir(parents=True)
            time.sleep(0.2)
            print("held", os.getpid(), flush=True)
    except RunError as error:
        print("lost", error, flush=True)
"""


def test_every_loser_of_a_race_reads_who_holds_the_directory(tmp_path):
    import time

    rounds, racers = 6, 6
    start = time.time() + 4.0
    command = [sys.executable, "-c", RACE, str(tmp_path), str(start), str(rounds)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(racers)]
    lines = [line for each in running for line in each.communicate()[0].splitlines()]
    lost = [line for line in lines if line.startswith("lost")]
    assert len(lines) == rounds * racers
    assert len(lines) - len(lost) >= rounds
    wrong = [
        line
        for line in lost
        if not re.search(r"in use by (process \d+|another process that has just begun);", line)
    ]
    assert wrong == []
    assert sum("process that has just begun" in line for line in lost) <= len(lost) // 10


def test_what_an_ended_process_has_written_is_not_taken_for_the_holder(tmp_path, monkeypatch):
    record = {"pid": 2**22 + 1, "began": "1", "host": os.uname().nodename}
    (tmp_path / "run.lock").write_text(json.dumps(record))
    monkeypatch.setattr("tunesmith.engine.locking.PATIENCE", 0.05)
    import fcntl

    with (tmp_path / "run.lock").open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="in use by another process that has just begun"):
            DirectoryLock(tmp_path).__enter__()


@pytest.mark.parametrize("record", [b"", b"garbage", b"[]", b"\xff" * 300, b'{"pid": "x"}'])
def test_a_lock_file_of_any_content_can_be_taken(tmp_path, record):
    (tmp_path / "run.lock").write_bytes(record)
    with DirectoryLock(tmp_path):
        pass


def test_a_lock_file_that_leads_elsewhere_is_refused_and_what_is_there_stays(tmp_path):
    (tmp_path / "precious").write_text("years of work")
    for make in (os.symlink, os.link):
        (tmp_path / "run").mkdir(exist_ok=True)
        make(tmp_path / "precious", tmp_path / "run" / "run.lock")
        with pytest.raises(RunError, match=r"run\.lock"):
            DirectoryLock(tmp_path / "run").__enter__()
        (tmp_path / "run" / "run.lock").unlink()
        assert (tmp_path / "precious").read_text() == "years of work"


def test_a_run_killed_as_it_began_leaves_a_directory_that_can_be_used(tmp_path):
    (tmp_path / "run.lock").write_text("")
    (tmp_path / ".recipe.yaml.123.draft").write_text("half")
    assert problem_with(tmp_path) is None
    with RunStore(tmp_path):
        assert not (tmp_path / ".recipe.yaml.123.draft").exists()


def test_a_directory_that_is_made_while_it_is_looked_at_is_no_file(tmp_path, monkeypatch):
    place = tmp_path / "run"

    def asked(before):
        def answer(path, *args, **kwargs):
            known = before(path, *args, **kwargs)
            if Path(path) == place:
                os.makedirs(place, exist_ok=True)  # another process, just now
            return known

        return answer

    monkeypatch.setattr(Path, "is_dir", asked(Path.is_dir))
    monkeypatch.setattr(os.path, "lexists", asked(os.path.lexists))
    assert problem_with(place) is None
