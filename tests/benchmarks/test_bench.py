"""The harness of `make bench`: who runs when, what the numbers mean, what becomes of a bar."""

import functools
import itertools
import json
from pathlib import Path

import attrs
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import contestants, report
from benchmarks.bars import BARS, CUDA_BARS, NOT_ASKED, Bar, judge
from benchmarks.cases import SUITES, Case, cases_of
from benchmarks.contestants import Contestant, Entry, Unavailable
from benchmarks.contestants.isa import Worker
from benchmarks.limits import Rates, bytes_moved, flops, limit_of, measure_rates
from benchmarks.measure import Budget, Spread, WallClock, measure, order, ratio
from benchmarks.results import SCHEMA, CaseResult, Report, Timing
from benchmarks.run import copies_of, run_case, take_turns
from tunesmith.ops import native_status

ONCE = Budget(rounds=1, seconds=0.0, sample=0.0)
RATES = Rates(copy=10e9, read=20e9, matmul={"bf16": 1e12, "fp32": 2e12})
SMALL = Case("linear", (8, 64), "fp32", tokens=3)


def result(case: Case = SMALL, not_run: dict[str, str] | None = None, **samples) -> CaseResult:
    names = {name.replace("_", " "): seconds for name, seconds in samples.items()}
    timings = tuple(Timing(name, seconds, repeats=1) for name, seconds in names.items())
    return CaseResult(case, timings, not_run or {}, limit_of(case, RATES))


def run(*entrants: Contestant, case: Case = SMALL) -> CaseResult:
    clock = WallClock()
    return run_case(case, entrants, device="cpu", clock=clock, budget=ONCE, rates=RATES)


# taking the time


def test_each_round_has_another_order_so_that_all_precede_all():
    rounds = ["".join(order("abc", turn)) for turn in range(6)]
    assert rounds == ["abc", "acb", "cab", "cba", "bca", "bac"]
    followed = {pair for one in rounds for pair in itertools.pairwise(one)}
    assert len(followed) == 6
    assert order([], 5) == []


def test_all_alternate_within_every_round_after_a_warm_up():
    log = []

    def timer(name: str, repeats: int) -> float:
        log.append(name)
        return 1e-3 * repeats

    timers = {name: functools.partial(timer, name) for name in "abc"}
    found = measure(timers, Budget(rounds=4, seconds=0.0, sample=0.0))
    assert log == [*"aabbcc", *"abc", *"acb", *"cab", *"cba"]
    assert {name: len(seconds) for name, seconds in found.seconds.items()} == dict.fromkeys(
        "abc", 4
    )


def test_what_is_fast_is_called_several_times_a_round_and_reported_per_call():
    asked = []

    def timer(repeats: int) -> float:
        asked.append(repeats)
        return 1e-4 * repeats

    found = measure({"a": timer}, Budget(rounds=2, seconds=0.0, sample=1e-3))
    assert asked == [1, 1, 10, 10]
    assert found.repeats == {"a": 10}
    assert found.seconds["a"] == pytest.approx([1e-4, 1e-4])


def test_who_is_too_slow_is_called_once_and_compared_with_the_others_median():
    slow, quick = (lambda _: 40.0), (lambda _: 1.0)
    found = measure({"slow": slow, "quick": quick}, Budget(rounds=2, seconds=0.0))
    assert found.seconds == {"slow": [40.0], "quick": [1.0, 1.0]}
    assert ratio([40.0], [1.0, 2.0, 5.0]) == Spread(20.0, 20.0, 20.0)


def test_when_time_is_up_three_rounds_will_do():
    budget = Budget(rounds=100, seconds=0.0, limit=1e-9, sample=0.0)
    assert len(measure({"a": lambda _: 0.0}, budget).seconds["a"]) == 3


def test_it_goes_on_until_rounds_and_seconds_are_both_full():
    budget = Budget(rounds=2, seconds=0.02)
    timer = WallClock(pause=0.0).timer(lambda: None)
    assert len(measure({"a": timer}, budget).seconds["a"]) > 2


def test_a_spread_is_the_median_and_the_quartiles():
    assert Spread.of([5, 1, 2, 4, 3]) == Spread(3, 2, 4)
    assert Spread.of([7]) == Spread(7, 7, 7)


def test_a_ratio_is_the_median_of_the_rounds_ratios_not_the_ratio_of_medians():
    theirs, ours = [10.0, 2.0, 30.0], [1.0, 2.0, 10.0]
    assert ratio(theirs, ours).median == 3.0  # the medians' would be 5
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0, 3.0], [1.0, 2.0])


# running a case


def product(case, inputs):
    return Entry(functools.partial(torch.mm, inputs.x, inputs.weight.T))


def test_whoever_cannot_run_breaks_or_is_wrong_is_named_and_the_others_run():
    def absent(case, inputs):
        raise Unavailable("not installed: pip install it")

    def broken(case, inputs):
        return Entry(lambda: 1 / 0)

    def wrong(case, inputs):
        return Entry(lambda: 2 * inputs.x @ inputs.weight.T)

    everyone = {"ours": product, "absent": absent, "broken": broken, "wrong": wrong}
    entrants = [Contestant(name, ("linear",), prepare) for name, prepare in everyone.items()]
    found = run(*entrants, Contestant("elsewhere", ("linear",), lambda *_: None))
    assert [timing.name for timing in found.timings] == ["ours"]
    assert found.not_run == {
        "absent": "not installed: pip install it",
        "broken": "failed: ZeroDivisionError: division by zero",
        "wrong": "wrong result: off by 1 of the norm",
    }


def test_scaled_times_own_clocks_and_notes_reach_the_result():
    closed = []
    entry = Entry(
        lambda: None,
        note=lambda: "two for one",
        scale=0.5,
        timer=lambda repeats: 4.0 * repeats,
        close=lambda: closed.append(True),
    )
    (timing,) = run(Contestant("copy", ("linear",), lambda *_: entry)).timings
    assert (timing.samples, timing.note, closed) == ([2.0], "two for one", [True])


def test_decoding_takes_copies_in_turn_and_computes_without_gradients():
    case = Case("decode", (8, 64), "fp32", tokens=1)
    weights = set()

    def note_weight(x, weight):
        assert torch.is_inference_mode_enabled()
        weights.add(weight.data_ptr())
        return x @ weight.T

    def prepare(case, inputs):
        return Entry(functools.partial(note_weight, inputs.x, inputs.weight))

    found = run(Contestant("ours", ("decode",), prepare), case=case)
    assert found.not_run == {}
    assert found.copies == copies_of(case, "cpu") == len(weights) == 256
    assert copies_of(SMALL, "cpu") == copies_of(SMALL, "cuda") == 1
    calls = take_turns([lambda: "a", lambda: "b"])
    assert [calls() for _ in range(4)] == ["b", "a", "b", "a"]


def test_our_op_gives_the_right_answer_in_each_suite():
    for suite in ("quantize", "dequantize", "linear", "lora", "decode"):
        case = Case(suite, (64, 128), "fp32", tokens=5, adapter=suite == "lora")
        (ours, *_) = contestants.of(suite)
        found = run(ours, case=case)
        assert found.not_run == {}, suite
        assert found.ours == (ours.name,)


@pytest.mark.slow
@pytest.mark.skipif(not native_status().loaded, reason=native_status().reason)
def test_a_worker_runs_ours_under_the_instruction_set_that_was_asked_for():
    case = Case("isa", (64, 128), "fp32", tokens=2, op="linear")
    worker = Worker(case, "scalar")
    try:
        assert worker.isa == "scalar"
        assert worker.time(3) > 0
    finally:
        worker.close()


# limits


def test_the_bytes_and_operations_of_a_case():
    packed = 4096 * 4096 // 2 + 4096 * 4096 // 64 + 4 * 1024 + 4
    assert bytes_moved(Case("quantize", (4096, 4096), "bf16")) == packed + 2 * 4096 * 4096
    linear = Case("linear", (4096, 4096), "bf16", tokens=512)
    assert bytes_moved(linear) == packed + 2 * 512 * 8192
    assert flops(linear) == 2 * 512 * 4096 * 4096
    both_ways = attrs.evolve(linear, op="lora", adapter=True)
    assert flops(both_ways) == 4 * 512 * 4096 * 4096 + 3 * 2 * 512 * 16 * 8192


def test_the_limit_is_what_takes_longer_at_the_better_of_the_two_matmul_rates():
    linear = Case("linear", (4096, 4096), "bf16", tokens=512)
    assert limit_of(linear, RATES) == (flops(linear) / 2e12, "matmul rate")
    alone = attrs.evolve(linear, tokens=1)
    assert limit_of(alone, RATES) == (bytes_moved(alone) / 20e9, "read bandwidth")
    quantize = Case("quantize", (4096, 4096), "bf16")
    assert limit_of(quantize, RATES) == (bytes_moved(quantize) / 10e9, "copy bandwidth")


def test_rates_are_measured_for_fp32_and_what_is_asked():
    rates = measure_rates(("bf16",), "cpu", WallClock(), nbytes=1 << 16, shape=(4, 8, 8), rounds=1)
    assert sorted(rates.matmul) == ["bf16", "fp32"]
    assert min(rates.copy, rates.read, *rates.matmul.values()) > 0


# bars


BAR = Bar("fast enough", SMALL, ("ours (layer)", "ours"), ("slow", "fast"), 2.0)


def test_a_bar_compares_our_first_with_the_fastest_of_theirs():
    (verdict,) = judge([BAR], [result(ours=[1.0, 1.0], fast=[3.0, 3.0], slow=[9.0, 9.0])])
    assert (verdict.passed, verdict.measured, verdict.note) == (True, 3.0, "fast / ours")
    (verdict,) = judge([BAR], [result(ours=[2.0], fast=[3.0], slow=[9.0])])
    assert (verdict.passed, verdict.measured) == (False, 1.5)


def test_a_bar_that_cannot_be_measured_says_why():
    (verdict,) = judge([BAR], [result(ours=[1.0], not_run={"slow": "no such CPU"})])
    assert (verdict.passed, verdict.measured) == (None, None)
    assert verdict.note == "not run: slow: no such CPU"
    assert judge([BAR], [])[0].note == NOT_ASKED


def test_every_bar_is_about_a_case_that_is_measured_and_contestants_that_exist():
    for bar in (*BARS, *CUDA_BARS):
        device = "cuda" if bar in CUDA_BARS else "cpu"
        assert bar.case in cases_of(bar.case.suite, ("bf16", "fp32"), device=device), bar.name
        names = {each.name for each in contestants.of(bar.case.suite)}
        assert {*bar.ours, *bar.theirs} <= names, bar.name


def test_every_suite_has_cases_and_quick_ones_are_fewer_and_keys_are_unique():
    for suite in SUITES:
        everything = cases_of(suite, ("bf16", "fp32"))
        assert 0 < len(cases_of(suite, ("bf16", "fp32"), quick=True)) <= len(everything)
        assert len({case.key for case in everything}) == len(everything)


# what is written and printed


def test_the_json_has_the_documented_keys():
    found = Report(
        date="2026-01-01T00:00:00+00:00",
        machine={"cpu": "x"},
        versions={"torch": "2"},
        settings={},
        rates=RATES,
        cases=[result(ours=[1.0, 2.0], theirs=[2.0, 6.0], not_run={"other": "absent"})],
        verdicts=judge([BAR], []),
    )
    data = json.loads(json.dumps(found.to_json()))
    assert list(data) == [
        "schema", "date", "machine", "versions", "settings", "rates", "cases", "bars"
    ]  # fmt: skip
    assert data["schema"] == SCHEMA
    (case,) = data["cases"]
    assert list(case) == [
        "key", "suite", "shape", "dtype", "tokens", "adapter", "op", "rounds", "copies", "limit",
        "timings", "not_run",
    ]  # fmt: skip
    assert case["rounds"] == 2
    ours, theirs = case["timings"]
    assert list(theirs) == ["name", "seconds", "ratios", "repeats", "note"]
    assert theirs["ratios"] == {"ours": {"median": 2.5, "q1": 2.25, "q3": 2.75}}
    assert ours["seconds"] == {"median": 1.5, "q1": 1.25, "q3": 1.75}
    assert list(data["bars"][0]) == ["name", "at_least", "measured", "passed", "note"]


def test_a_table_row_has_milliseconds_quartiles_and_the_times_of_ours():
    lines = report.case_lines(result(ours=[0.001], theirs=[0.0025], not_run={"x": "not installed"}))
    assert lines[0] == "linear 8x64 M=3 fp32  (1 rounds)"
    assert lines[2].split() == ["theirs", "2.500", "2.500", "-", "2.500", "2.50x"]
    assert lines[3].startswith("  limit: ")
    assert lines[4] == "  x: not installed"


@pytest.mark.parametrize(("flag", "status"), [((), 0), (("--check",), 1)])
def test_the_command_writes_its_json_and_fails_only_when_it_is_to_check(
    flag: tuple[str, ...],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    entrants = (Contestant("ours", ("linear",), product), Contestant("same", ("linear",), product))
    monkeypatch.setattr(command, "measure_rates", lambda *_: RATES)
    monkeypatch.setattr(command, "cases_of", lambda *_: [SMALL])
    monkeypatch.setattr(command.contestants, "of", lambda _: entrants)
    bars = (Bar("no chance", SMALL, ("ours",), ("same",), 1e6),)
    monkeypatch.setattr(command, "bars_of", lambda device: bars)
    path = tmp_path / "new" / "found.json"
    options = ["--suite", "linear", "--quick", "--json", str(path), *flag]
    assert command.main(options) == status
    assert json.loads(path.read_text())["bars"][0]["passed"] is False
    printed = capsys.readouterr().out
    assert "FAIL  (same / ours)" in printed
    assert "linear 8x64 M=3 fp32" in printed


def test_an_unknown_suite_is_refused_with_those_that_are_allowed(capsys):
    with pytest.raises(SystemExit):
        command.main(["--suite", "qantize"])
    assert "got 'qantize'; allowed: quantize, dequantize" in capsys.readouterr().err
