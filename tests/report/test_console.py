"""The console says what a run does: live in a terminal, in plain lines everywhere else."""

import io
import itertools
import re
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest
from rich.console import Console

from tunesmith.engine.figures import duration, main_metrics, number
from tunesmith.plugin.events import (
    Event,
    Progress,
    RowsCut,
    RowsDropped,
    RunFinished,
    RunStarted,
    StageFinished,
    StageReused,
    StageStarted,
    Warned,
)
from tunesmith.report.console import ConsoleReporter

ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")


class Run:
    path = Path("runs/a")


@pytest.fixture(autouse=True)
def _no_wishes_from_outside(monkeypatch):
    for name in ("CI", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is told to go on."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def plain(*events, **options):
    file = io.StringIO()
    with ConsoleReporter(Console(file=file, force_terminal=False, **options)) as reporter:
        for event in events:
            reporter(Run(), event)
    return file.getvalue()


def live(*events, width=100):
    """What a terminal receives, without styles; each event is drawn before the next comes."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, legacy_windows=False)
    with ConsoleReporter(console) as reporter:
        for event in events:
            reporter(Run(), event)
            if reporter._live is not None:
                reporter._live.refresh()
    return file.getvalue()


def progress(step, total=300, *, loss=1.25, **options):
    given = {
        "tokens": step * 512,
        "tokens_per_second": 5230.4,
        "eta_seconds": float(total - step),
        "memory_bytes": 3 * 2**30,
        **options,
    }
    return Progress("03-sft", step, total, loss, **given)


def progress_lines(text):
    return [line for line in text.splitlines() if re.match(r"03-sft +\d+/", line)]


def test_a_plain_progress_line_says_step_loss_speed_time_and_memory(clock):
    [line] = progress_lines(plain(StageStarted("03-sft"), progress(1)))
    assert line == "03-sft    1/300  loss 1.2500  5,230 tok/s  0.0s, ETA 4:59  3.0 GiB"


@pytest.mark.parametrize("total", [1, 7, 19, 20, 21, 300, 100_000])
def test_a_plain_stage_leaves_at_most_twenty_progress_lines_with_the_first_and_the_last(
    clock, total
):
    text = plain(*(progress(step, total) for step in range(1, total + 1)))
    steps = [int(re.search(r"(\d+)/", line)[1]) for line in progress_lines(text)]
    assert steps[0] == 1
    assert steps[-1] == total
    assert min(total, 15) <= len(steps) <= 20
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert max(gaps, default=0) <= total // 19 + 1


def test_a_slow_plain_stage_speaks_after_half_a_minute_and_then_ever_less(clock):
    file = io.StringIO()
    reporter = ConsoleReporter(Console(file=file, force_terminal=False))
    spoken = []
    for step in range(1, 400):  # far below the first twentieth of the steps
        reporter(Run(), progress(step, 1_000_000))
        if len(progress_lines(file.getvalue())) > len(spoken):
            spoken.append(step)
        clock(1)
    assert spoken == [1, 31, 91, 211]


def test_plain_text_goes_out_line_by_line_and_is_flushed():
    class Pipe(io.StringIO):
        flushed = 0

        def flush(self):
            self.flushed = self.tell()

    file = Pipe()
    reporter = ConsoleReporter(Console(file=file, force_terminal=False))
    reporter(Run(), StageStarted("03-sft"))
    assert file.getvalue() == "03-sft  started\n"
    assert file.flushed == len(file.getvalue())


def test_plain_lines_are_never_wrapped():
    assert len(plain(progress(1), width=20).splitlines()) == 2 + 1  # started, progress, stopped


@pytest.mark.parametrize(
    ("variable", "value"), [("NO_COLOR", "1"), ("CI", "true"), ("TERM", "dumb"), ("TERM", "DUMB")]
)
def test_a_terminal_that_asks_for_calm_gets_plain_lines(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    text = live(StageStarted("03-sft"), progress(1), Warned("hot"), StageFinished("03-sft", 1, {}))
    assert not CONTROL.search(text)
    assert "loss 1.2500" in text
    assert "warning: hot" in text


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_ci_switched_off_is_no_ci(monkeypatch, value):
    monkeypatch.setenv("CI", value)
    assert ESCAPE.search(live(StageStarted("03-sft")))


@pytest.mark.parametrize("show", [plain, live])
def test_escape_sequences_in_a_message_do_not_reach_the_terminal(show):
    text = show(
        Warned("bad \x1b[31mred\x1b[0m \x07bell \x9b2J"),
        RowsDropped("03-sft", 1, 2, {"\x1b]0;title\x07": 1}, Path("x")),
    )
    assert "bad red" in text
    assert "\x1b[31m" not in text
    assert not re.search(r"\x07|\x9b|\x1b\]", text)


@pytest.mark.parametrize("show", [plain, live])
def test_brackets_in_a_message_are_no_markup(show):
    assert "[bold]/tmp/[x][/nope]" in ESCAPE.sub("", show(Warned("[bold]/tmp/[x][/nope]")))


def test_a_message_of_several_lines_stays_one_message():
    assert plain(Warned("first\nsecond\n")) == "warning: first\n    second\n"


@pytest.mark.parametrize("show", [plain, live])
def test_a_run_tells_its_beginning_its_stages_and_its_end(show):
    text = show(
        RunStarted(("01-quantize-nf4", "02-lora", "03-sft")),
        StageReused("01-quantize-nf4"),
        StageStarted("03-sft"),
        RowsDropped("03-sft", 12, 1200, {"empty": 4, "duplicate": 8}, Path("runs/a/dropped.jsonl")),
        RowsCut("03-sft", 3, 1200, {"the answer is cut at max_length=64": 3}, Path("a/cut.jsonl")),
        Warned("the chat template has no system role"),
        StageFinished("03-sft", 125.0, {"train_runtime": 9.0, "eval_loss": 1.5, "train_loss": 0.8}),
        RunFinished(Path("runs/a"), 3725.0),
    )
    lines = [line.strip() for line in ESCAPE.sub("\n", text).splitlines() if line.strip()]
    for expected in (
        "runs/a: 3 stages: 01-quantize-nf4, 02-lora, 03-sft",
        "01-quantize-nf4  reused: recipe, data and versions unchanged",
        "03-sft  dropped 12 of 1,200 rows: 8 duplicate, 4 empty; listed in runs/a/dropped.jsonl",
        "03-sft  cut the answers of 3 of 1,200 rows: 3 the answer is cut at max_length=64; "
        "listed in a/cut.jsonl",
        "warning: the chat template has no system role",
        "03-sft  done in 2:05  train_loss 0.8  eval_loss 1.5",
        "finished in 1:02:05: runs/a",
    ):
        assert expected in lines


def test_the_live_line_shows_bar_step_loss_speed_time_and_memory(clock):
    text = ESCAPE.sub("", live(StageStarted("03-sft"), progress(150)))
    assert re.search(
        r"03-sft  [━╸╺ ]+  150/300  loss 1\.2500  5,230 tok/s  0\.0s, ETA 2:30  3\.0 GiB", text
    )


def test_the_live_line_counts_time_on_between_events(clock):
    file = io.StringIO()
    reporter = ConsoleReporter(Console(file=file, force_terminal=True, width=100))
    with reporter:
        reporter(Run(), progress(150))
        clock(20)
        assert reporter._stage.details()["time"] == "0:20, ETA 2:10"


def test_a_live_stage_leaves_one_line_and_takes_its_bar_away():
    text = live(StageStarted("03-sft"), progress(1), StageFinished("03-sft", 3.0, {}))
    assert text.rstrip("\n").rpartition("\x1b[2K")[2] == "\x1b[32m03-sft  done in 3.0s\x1b[0m"
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is shown again


def test_forty_columns_keep_name_bar_step_and_loss_on_one_line():
    text = ESCAPE.sub("\n", live(StageStarted("03-sft"), progress(150), width=40))
    assert "150/300" in text
    assert "loss 1.2500" in text
    assert "tok/s" not in text
    drawn = ESCAPE.sub("", live(progress(150), width=40)).replace("\r", "\n").split("\n")
    assert max(len(line) for line in drawn if "stopped" not in line) <= 40


@pytest.mark.parametrize("width", range(1, 60))
def test_no_width_is_too_narrow(width):
    reporter = ConsoleReporter(Console(file=io.StringIO(), force_terminal=True, width=width))
    with reporter:
        reporter(Run(), progress(299, metrics={"eval_loss": 1.0}))
        out = io.StringIO()
        Console(file=out, width=width, force_terminal=False).print(reporter._stage)
        [line] = out.getvalue().splitlines()
        assert len(line) <= width
        assert line.startswith("03-sft"[:width])


@pytest.mark.parametrize("show", [plain, live])
@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_shown_as_such(show, loss):
    assert f"loss {loss}" in ESCAPE.sub("", show(progress(1, loss=loss)))


def test_a_broken_loss_is_drawn_in_red():
    assert "\x1b[1;31m  loss nan" in live(progress(1, loss=float("nan")))
    assert "\x1b[1;31m" not in live(progress(1))


@pytest.mark.parametrize("show", [plain, live])
def test_unknown_numbers_are_no_reason_to_fail(show):
    text = show(
        progress(
            0,
            0,
            loss=None,
            eta_seconds=float("inf"),
            tokens_per_second=float("nan"),
            memory_bytes=5 * 2**20,
        )
    )
    assert "ETA -  5.0 MiB" in ESCAPE.sub("", text)
    assert "loss" not in text


def test_the_latest_evaluation_stays_on_the_line():
    first = progress(1, 2, metrics={"eval_loss": 1.5, "grad_norm": 3.0})
    text = plain(first, progress(2, 2, loss=None))
    last = progress_lines(text)[-1]
    assert "eval_loss 1.5" in last
    assert "loss 1.2500" in last
    assert "grad_norm" not in text


@pytest.mark.parametrize("show", [plain, live])
def test_an_event_of_an_unknown_class_is_ignored(show):
    @attrs.frozen
    class Sang(Event):
        song: str

    assert show(Sang("sea shanty")) == ""


def test_an_interrupted_stage_leaves_a_line_and_the_cursor(clock):
    file = io.StringIO()
    reporter = ConsoleReporter(Console(file=file, force_terminal=True, width=80))

    def work():
        with reporter:
            reporter(Run(), progress(120))
            clock(65)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert "03-sft  stopped at step 120/300 after 1:05" in file.getvalue()
    assert file.getvalue().count("\x1b[?25h") == 1


def test_a_console_that_knows_only_ascii_gets_escapes_instead_of_an_error():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    reporter = ConsoleReporter(Console(file=file, force_terminal=True, width=80))
    with reporter:
        reporter(Run(), Warned("naïve"))
        reporter(Run(), progress(150))
    file.flush()
    assert rb"warning: na\xefve" in raw.getvalue()


def test_stdout_stays_for_results(capsys):
    with ConsoleReporter() as reporter:
        reporter(Run(), Warned("hot"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "warning: hot\n"


def test_results_printed_under_the_live_line_stay_on_stdout(capsys):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with ConsoleReporter(console) as reporter:
        reporter(Run(), progress(1))
        print("42")
    assert capsys.readouterr().out == "42\n"


def test_importing_the_console_imports_neither_rich_nor_torch():
    code = (
        "import sys, tunesmith.report.console\n"
        "print([name for name in ('rich', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0s"),
        (9.96, "0:10"),
        (59.7, "1:00"),
        (3599.6, "1:00:00"),
        (90061, "25:01:01"),
        (-1, "-"),
        (float("nan"), "-"),
    ],
)
def test_a_duration_reads_like_a_clock(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23456, "1.235"),
        (0.00002, "2e-05"),
        (12345.6, "12,346"),
        (1234567, "1,234,567"),
        (float("-inf"), "-inf"),
        (True, "True"),
        ("good", "good"),
    ],
)
def test_a_measured_number_has_about_four_digits(value, text):
    assert number(value) == text


def test_main_metrics_put_losses_first_and_leave_the_bookkeeping_out():
    metrics = {
        "epoch": 1.0,
        "rouge": 0.5,
        "train_samples_per_second": 8.0,
        "eval_loss": 1.5,
        "total_flos": 1e15,
        "train_loss": 0.8,
    }
    assert list(main_metrics(metrics)) == ["train_loss", "eval_loss", "rouge"]
    assert list(main_metrics(metrics, most=1)) == ["train_loss"]


def test_a_finished_stage_tells_where_it_began_and_what_it_took():
    metrics = {
        "loss": 0.4123,
        "loss_first": 2.3,
        "eval_loss": 0.5,
        "eval_loss_first": 1.9,
        "tokens": 25857.0,
        "tokens_per_second": 1466.0,
        "memory_bytes": 831.0 * 2**20,
        "rows_cut": 0.0,
    }
    line = plain(StageFinished("03-sft", 125.0, metrics)).strip()
    assert line == (
        "03-sft  done in 2:05  loss 0.4123 (from 2.3)  eval_loss 0.5 (from 1.9)  1,466 tokens/s  "
        "831 MiB"
    )


def test_rows_that_were_left_out_of_an_evaluation_are_told():
    line = plain(StageFinished("03-evaluate-loss", 1.0, {"loss": 1.0, "rows_dropped": 3.0}))
    assert "rows_dropped 3" in line
