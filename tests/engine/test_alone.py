"""One run at a time in a process, and it says so."""

from __future__ import annotations

import multiprocessing
import threading
from typing import Any

import pytest

from tunesmith import Tuner
from tunesmith.engine.alone import alone
from tunesmith.errors import RunError

QUICK = {"batch_size": 4, "gradient_accumulation": 1, "max_steps": 2}


@pytest.fixture
def tuner(tiny_model, alpaca_file) -> Tuner:
    return Tuner(tiny_model).lora(r=2).sft(alpaca_file, **QUICK)


def within(tuner: Tuner, directory: Any, work: Any) -> list[Any]:
    """Run, and meanwhile do something once in another thread; return what came of it."""
    found: list[Any] = []

    def beside() -> None:
        try:
            found.append(work())
        except Exception as error:
            found.append(error)

    def listen(run: Any, event: Any) -> None:
        if getattr(event, "step", 0) == 1:
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()

    tuner.run(directory, progress=False, listeners=[listen])
    return found


def test_a_second_run_in_another_thread_is_refused_and_writes_nothing(tuner, tmp_path):
    [error] = within(
        tuner, tmp_path / "a", lambda: tuner.run(tmp_path / "b", progress=False, listeners=[])
    )
    assert isinstance(error, RunError)
    assert str(error).startswith(f"the run in {tmp_path / 'b'}: the run in {tmp_path / 'a'} is at")
    assert "in a process of its own" in str(error)
    assert not (tmp_path / "b").exists()
    tuner.run(tmp_path / "b", progress=False)  # one after the other


def test_a_run_from_a_listener_of_a_run_is_refused(tuner, tmp_path):
    def nested(run: Any, event: Any) -> None:
        if getattr(event, "step", 0) == 1:
            tuner.run(tmp_path / "b", progress=False)

    with pytest.raises(RunError, match="is at work in this process"):
        tuner.run(tmp_path / "a", progress=False, listeners=[nested])


def test_a_model_is_not_loaded_to_generate_with_beside_a_run(tuner, tmp_path):
    first = tuner.run(tmp_path / "a", progress=False)
    [error] = within(tuner, tmp_path / "b", lambda: first.generate("say 3", max_new_tokens=2))
    assert isinstance(error, RunError)
    assert "to generate with" in str(error)
    assert isinstance(first.generate("say 3", max_new_tokens=2), str)


def test_explain_beside_a_run_leaves_the_prediction_out_and_says_why(tuner, tmp_path):
    [plan] = within(tuner, tmp_path / "a", tuner.explain)
    assert plan.shapes is None
    assert any("is at work in this process" in note for note in plan.notes)
    assert not plan.problems


def test_what_is_brief_is_waited_for():
    order: list[str] = []
    inside, done = threading.Event(), threading.Event()

    def first() -> None:
        with alone("loading one", brief=True):
            inside.set()
            done.wait(10)
            order.append("one")

    def second() -> None:
        inside.wait(10)
        threading.Timer(0.2, done.set).start()
        with alone("loading another", brief=True):
            order.append("another")

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == ["one", "another"]


def _try_alone(pipe: Any) -> None:
    try:
        with alone("the run in b"):
            pipe.send("ran")
    except RunError as error:
        pipe.send(str(error))


def _forked() -> str:
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_try_alone, args=(theirs,))
    child.start()
    said: str = ours.recv()
    child.join()
    return said


def test_a_process_forked_within_a_run_is_told_so_and_one_forked_before_is_free():
    assert _forked() == "ran"
    with alone("the run in a"):
        said = _forked()
    assert said.startswith("the run in b: this process was forked while the run in a was at work")
    assert "spawn" in said
    assert _forked() == "ran"
