"""In a notebook a run is one block with one live bar, and what is returned can be looked at."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbclient
import nbformat

from tunesmith import Tuner
from tunesmith.engine.cells import in_notebook
from tunesmith.engine.plan import make_plan
from tunesmith.plugin.events import (
    Progress,
    RunFinished,
    RunStarted,
    StageFinished,
    StageStarted,
    Warned,
)
from tunesmith.plugin.registry import registry
from tunesmith.report.notebook import NotebookReporter

EVIL = "<script>alert('x')</script>"


class Run:
    path = Path("runs/a")


class Cell:
    """What a front end shows: the latest data of one output."""

    def __init__(self) -> None:
        self.outputs = 0
        self.shown: list[dict[str, str]] = []

    def __call__(self, data: dict[str, str]) -> Any:
        self.outputs += 1
        self.shown.append(data)
        return self.shown.append

    @property
    def text(self) -> str:
        return self.shown[-1]["text/plain"]

    @property
    def html(self) -> str:
        return self.shown[-1]["text/html"]


def progress(step: int, total: int = 100) -> Progress:
    return Progress("03-sft", step, total, 1.25, step * 10, 500.0, 9.0, 2**30)


def balanced(html: str) -> bool:
    """Whether every element that is opened is closed, in order."""
    open_: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            open_.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert open_.pop() == tag

    Reader().feed(html)
    return not open_


def test_a_run_is_one_output_whose_bar_moves_in_place():
    cell = Cell()
    with NotebookReporter(cell) as reporter:
        reporter(Run(), RunStarted(("03-sft",)))
        reporter(Run(), StageStarted("03-sft"))
        reporter._drawn = 0.0
        reporter(Run(), progress(40))
        assert 'style="width:40.0%"' in cell.html
        assert "03-sft   40/100  loss 1.2500  500 tok/s" in cell.text
        reporter(Run(), StageFinished("03-sft", 12.0, {"loss": 0.5, "loss_first": 2.0}))
        assert "class=bar" not in cell.html
        reporter(Run(), RunFinished(Path("runs/a"), 12.0))
    assert cell.outputs == 1
    assert cell.text.splitlines() == [
        "runs/a: 1 stage: 03-sft",
        "03-sft  done in 0:12  loss 0.5 (from 2)",
        "finished in 0:12: runs/a",
    ]
    assert all(balanced(each["text/html"]) for each in cell.shown)


def test_it_is_not_drawn_more_often_than_one_can_look():
    cell = Cell()
    with NotebookReporter(cell) as reporter:
        for step in range(1, 101):
            reporter(Run(), progress(step))
        assert len(cell.shown) <= 3  # the first, the last, and what a slow machine adds
        assert "100/100" in cell.text


def test_a_run_that_is_broken_off_says_where():
    cell = Cell()
    with NotebookReporter(cell) as reporter:
        reporter(Run(), progress(7))
    assert "03-sft  stopped at step 7/100 after" in cell.text
    assert "class=bar" not in cell.html


def test_text_from_anywhere_is_escaped(tiny_model, alpaca_file):
    cell = Cell()
    with NotebookReporter(cell) as reporter:
        reporter(Run(), Warned(EVIL + "\x1b[31m"))
    assert "<script" not in cell.html
    assert "\x1b" not in cell.html
    tuner = Tuner(EVIL).lora(targets=EVIL).sft([{"instruction": EVIL, "output": EVIL}])
    for shown in (tuner._repr_html_(), make_plan(tuner.recipe, registry())._repr_html_()):
        assert "<script" not in shown
        assert "&lt;script&gt;" in shown
        assert balanced(shown)


def test_many_messages_are_cut_and_counted():
    cell = Cell()
    with NotebookReporter(cell) as reporter:
        for number in range(1000):
            reporter(Run(), Warned(f"message {number}"))
    assert "801 earlier messages" in cell.text
    assert "message 999" in cell.text
    assert len(cell.text.splitlines()) == 200


def test_what_is_shown_needs_nothing_and_takes_the_notebooks_colours(
    tiny_model, alpaca_file, tmp_path
):
    tuner = Tuner(tiny_model).quantize("nf4").lora(r=2).sft(alpaca_file, max_steps=1)
    result = tuner.run(tmp_path / "run", progress=False)
    plan = make_plan(tuner.recipe, registry())
    shown = {"tuner": tuner, "plan": plan, "result": result}
    for name, value in shown.items():
        html = value._repr_html_()
        assert balanced(html), name
        assert not re.search(r"https?:|src=|url\(|@import|<script", html), name
        assert "color:inherit" in html, name
        assert not re.search(r"[^-]color:#|background:#(?!3b82c4)", html), name
    assert "max_steps=1" in tuner._repr_html_()
    assert "learning_rate=0.0002" in plan._repr_html_()
    assert "no problems found" in plan._repr_html_()
    assert "adapter sft" in result._repr_html_()
    text = repr(result)
    assert text.startswith(f"RunResult {tmp_path / 'run'}\n  03-sft  ")
    assert "loss " in text
    assert len(text) < 1000


def test_a_console_is_no_notebook():
    assert not in_notebook()


NOTEBOOK = """
from tunesmith import Tuner
tuner = Tuner({model!r}, seed=3).lora(r=2).sft({rows!r}, max_steps=4, batch_size=2)
tuner
%%
plan = tuner.explain()
plan
%%
plan
%%
result = tuner.run({out!r})
%%
result
"""


def test_a_real_notebook_shows_one_bar_and_readable_results(tiny_model, alpaca_file, tmp_path):
    source = NOTEBOOK.format(
        model=str(tiny_model), rows=str(alpaca_file), out=str(tmp_path / "run")
    )
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(each.strip()) for each in source.split("%%")]
    )
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    chain, explained, again, run, result = (cell["outputs"] for cell in notebook["cells"])
    assert [each["output_type"] for each in chain] == ["execute_result"]
    assert "sft" in chain[0]["data"]["text/html"]
    # the plan is shown once in the cell that asks for it, and again in the next
    assert {each["output_type"] for each in explained} == {"display_data", "execute_result"}
    shown = [each["data"].get("text/html", "") for each in explained]
    assert sum("no problems found" in html for html in shown) == 1
    assert "no problems found" in again[0]["data"]["text/html"]
    # one output, which was updated in place; nothing was printed beside it
    assert [each["output_type"] for each in run] == ["display_data"], run
    html, text = run[0]["data"]["text/html"], run[0]["data"]["text/plain"]
    assert "class=bar" not in html
    assert re.search(r"02-sft  done in .*loss [\d.]+ \(from [\d.]+\)", text)
    assert "finished in" in text.splitlines()[-1]
    assert "02-sft" in result[0]["data"]["text/html"]
    assert result[0]["data"]["text/plain"].startswith("RunResult")
