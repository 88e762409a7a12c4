"""The report shows what lies in a run directory, whole or not, and needs nothing else."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from tunesmith.errors import RunError
from tunesmith.report.html import write_report

RECIPE = """tunesmith: 1
model: org/model
steps:
- quantize: nf4
- train: sft
  data: rows.json
- train: dpo
  data: pairs.json
- export: merge
"""
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


class Page(HTMLParser):
    """A page as its parts; the parser fails on a tag that is not closed where it should be."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.texts = [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.words.append(data)
            self.texts.setdefault(self.open[-1], []).append(data)

    @property
    def text(self):
        return " ".join(self.words)

    def all(self, tag, **wanted):
        return [
            found
            for name, found in self.tags
            if name == tag and all(found.get(key) == value for key, value in wanted.items())
        ]

    def lines(self, kind):
        return [path["d"] for path in self.all("path") if path.get("class") == f"line {kind}"]


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    elif isinstance(value, str):
        path.write_text(value, encoding="utf-8")
    elif isinstance(value, list):
        path.write_text("".join(json.dumps(row) + "\n" for row in value), encoding="utf-8")
    else:
        path.write_text(json.dumps(value), encoding="utf-8")


def stage(name, verb, plugin, seconds, metrics=(), **options):
    return {
        "name": name,
        "verb": verb,
        "plugin": plugin,
        "fingerprint": "9c1e" * 16,
        "seconds": seconds,
        "metrics": dict(metrics),
        "options": options,
        "finished": "2026-03-01T12:34:56+00:00",
    }


@pytest.fixture
def run(tmp_path):
    """A finished run: quantize, sft, dpo, merge."""
    root = tmp_path / "my-run"
    stages = root / "stages"
    write(root / "recipe.yaml", RECIPE)
    write(root / "lock.json", {"versions": {"torch": "2.9.1"}, "plugins": {"nf4": "tunesmith"}})
    write(stages / "01-quantize-nf4/stage.json", stage("01-quantize-nf4", "quantize", "nf4", 1.5))
    losses = {"train_loss": 1.25, "eval_loss": 1.5, "train_runtime": 118.0}
    write(stages / "02-sft/stage.json", stage("02-sft", "train", "sft", 120, losses, epochs=3.0))
    log = [{"step": at, "loss": 3 - at / 10, "learning_rate": 1e-4} for at in range(1, 21)]
    log += [{"step": at, "eval_loss": 3.2 - at / 10} for at in (10, 20)]
    write(stages / "02-sft/log.jsonl", log)
    write(stages / "02-sft/dropped.jsonl", [{"where": "rows.json: row 7", "reason": "empty"}])
    rewards = {"rewards/margins": 2.5, "rewards/accuracies": 0.9}
    write(stages / "03-dpo/stage.json", stage("03-dpo", "train", "dpo", 60, rewards))
    log = [
        {"step": at, "loss": 0.7 / at, "rewards/margins": at / 4, "rewards/accuracies": at / 10}
        for at in range(1, 11)
    ]
    write(stages / "03-dpo/log.jsonl", log)
    write(stages / "04-merge/stage.json", stage("04-merge", "export", "merge", 3.0))
    return root


def report(root):
    return Page(write_report(root).read_text(encoding="utf-8"))


def test_the_report_lies_in_the_run_directory_and_nothing_else_is_left(run):
    before = set(run.iterdir())
    path = write_report(run)
    assert path == run / "report.html"
    assert set(run.iterdir()) - before == {path}
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_same_run_gives_the_same_report(run):
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_the_header_names_the_model_the_steps_and_the_state(run):
    page = report(run)
    assert page.texts["title"][0] == "tunesmith: org/model"
    assert page.texts["h1"] == ["org/model"]
    assert page.texts["li"][:4] == ["quantize-nf4", "sft", "dpo", "merge"]
    assert "4 of 4 stages finished in 3:04" in page.text


def test_the_stage_table_says_time_and_main_metrics(run):
    page = report(run)
    assert "02-sft train sft 2:00 finished 2026-03-01 12:34 UTC train_loss  1.25" in page.text
    assert {"href": "#stage-03-dpo"} in page.all("a")
    assert page.all("section", id="stage-03-dpo")
    first_table = page.text.partition("01-quantize-nf4 ")[2].partition("Options and all")[0]
    assert "train_runtime" not in first_table
    assert re.search(r"All metrics .* train_runtime", page.text)


def test_nothing_is_asked_of_the_network_and_no_script_runs(run):
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    assert not page.all("script")
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "action"} & set(attributes), tag
        assert attributes.get("href", "#")[0] == "#" or attributes["href"] == "data:,"
    assert "default-src 'none'" in page.all("meta")[3]["content"]


def test_the_page_can_be_read_on_a_phone_in_the_dark_and_aloud(run):
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert page.all("html", lang="en")
    assert page.all("meta", name="viewport", content="width=device-width, initial-scale=1")
    assert "prefers-color-scheme: dark" in text
    assert all(found.get("scope") in ("col", "row") for found in page.all("th"))
    identifiers = [found["id"] for _, found in page.tags if "id" in found]
    assert len(identifiers) == len(set(identifiers))
    assert page.all("svg")
    for svg in page.all("svg"):
        assert svg["role"] == "img"
        assert svg["aria-labelledby"] in identifiers
        assert svg["aria-describedby"] in identifiers


def test_the_loss_is_a_curve_for_training_and_one_for_evaluation(run):
    page = report(run)
    train, evaluation = page.lines("train")[0], page.lines("eval")[0]
    assert len(re.findall("[ML]", train)) == 20
    assert len(re.findall("[ML]", evaluation)) == 2
    heights = [float(y) for y in re.findall(r"[\d.]+ ([\d.]+)", train)]
    assert heights == sorted(heights)  # the loss falls: y grows downwards
    assert "train 2.9 at step 1, 1 at step 20, lowest 1, highest 2.9" in page.text
    assert "eval 2.2 at step 10, 1.2 at step 20" in page.text


def test_axes_have_round_ticks_that_enclose_the_curve(run):
    texts = report(run).texts["text"]
    assert texts[:10] == ["1", "1.5", "2", "2.5", "3", "5", "10", "15", "20", "step"]


def test_a_preference_stage_shows_margin_and_accuracy(run):
    page = report(run)
    titles = page.texts["h3"]
    assert titles[-3:] == ["Loss", "Reward margin", "Reward accuracy"]
    assert "Reward margin by step" in page.texts["title"]
    assert titles.count("Reward margin") == 1  # sft has none


def test_dropped_rows_are_counted_by_reason_and_the_first_twenty_listed(run):
    rows = [
        {"where": f"rows.json: row {at}", "reason": "too long" if at % 3 else "empty"}
        for at in range(30)
    ]
    write(run / "stages/02-sft/dropped.jsonl", rows)
    page = report(run)
    assert "Dropped rows: 30" in page.texts["h3"]
    assert "too long 20 empty 10" in page.text
    assert "rows.json: row 19" in page.text
    assert "rows.json: row 20" not in page.text
    assert "10 more in stages/02-sft/dropped.jsonl" in page.text


def test_many_reasons_are_summed_up(run):
    rows = [{"where": str(at), "reason": f"field {at} is odd"} for at in range(25)]
    write(run / "stages/02-sft/dropped.jsonl", rows)
    assert "other reasons 5" in report(run).text


def test_recipe_and_lock_are_shown_the_lock_folded(run):
    page = report(run)
    assert page.texts["pre"] == [RECIPE]
    lock = page.text.partition("Versions, hashes and plugins")[2]
    assert "versions / torch 2.9.1 plugins / nf4 tunesmith" in lock
    text = (run / "report.html").read_text(encoding="utf-8")
    assert re.search(r"<h2>Lock</h2><details><summary>", text)


EVIL = "<script>alert('x')</script>\"onload=\"x&amp;"


def test_text_from_anywhere_is_escaped(run):
    names = f'data: "{EVIL[:8]}"'
    steps = [{"train": "sft", "data": EVIL}]
    write(run / "recipe.yaml", json.dumps({"model": EVIL, "steps": steps}))
    write(run / "lock.json", {EVIL: {EVIL: EVIL}})
    write(run / "stages/02-sft/dropped.jsonl", [{"where": EVIL, "reason": EVIL}])
    record = stage(EVIL, EVIL, EVIL, 1, {EVIL: EVIL}, **{EVIL: [EVIL]})
    write(run / "stages/02-sft/stage.json", {**record, "finished": EVIL, EVIL: names})
    write(run / f"stages/09-{EVIL.replace('/', '')}/log.jsonl", [{"loss": 1.0}])
    page = report(run)
    assert not page.all("script")
    assert not any("onload" in found for _, found in page.tags)
    assert page.texts["h1"] == [EVIL]
    assert page.text.count(EVIL) >= 10


def test_control_characters_and_lone_surrogates_do_not_break_the_page(run):
    (run / "stages/02-sft/dropped.jsonl").write_text(
        '{"where": "a\\u0000b", "reason": "\\ud800 \\u001b[31m"}\n'
    )
    text = write_report(run).read_text(encoding="utf-8")
    assert "a\N{REPLACEMENT CHARACTER}b" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", text)


def test_answers_to_one_prompt_stand_beside_each_other(run):
    early = [
        {"prompt": "Who?", "completion": "<b>", "reference": "I.", "scores": {"recall": 0.5}},
        {"prompt": "Why?", "completion": "x", "reference": None, "scores": {}},
    ]
    late = [{"prompt": "Who?", "completion": "I.", "reference": "I.", "scores": {"recall": 1.0}}]
    write(run / "stages/02-sft/samples.jsonl", early)
    write(run / "stages/03-dpo/samples.jsonl", [*late, "not a row"])
    page = report(run)
    assert "Samples" in page.texts["h2"]
    assert re.search(
        r"Prompt Reference 02-sft 03-dpo Who\? I\. <b> recall 0.5 I\. recall 1", page.text
    )
    assert "samples.jsonl: 1 line is not a JSON object" in page.text


def test_an_overlong_reason_is_cut(run):
    write(run / "stages/02-sft/dropped.jsonl", [{"where": "row 1", "reason": "x" * 10_000}])
    assert max(map(len, report(run).words)) <= 400


def test_a_half_finished_run_has_a_report_that_says_so(run):
    (run / "stages/03-dpo/stage.json").unlink()
    (run / "stages/04-merge/stage.json").unlink()
    (run / "stages/04-merge").rmdir()
    (run / "lock.json").unlink()
    page = report(run)
    assert "2 of 4 stages finished in 2:02" in page.text
    assert "stages/03-dpo/stage.json is not there" in page.text
    assert re.search(r"03-dpo\s+not finished", page.text)
    assert "04-merge nothing kept yet" in page.text
    assert "lock.json is not there" in page.text
    assert "Lock" not in page.texts["h2"]
    assert "Reward margin" in page.texts["h3"]  # what the log has is shown all the same


def test_an_empty_directory_has_a_report(tmp_path):
    page = report(tmp_path)
    assert page.texts["h1"] == [tmp_path.name]
    for note in ("recipe.yaml is not there", "lock.json is not there", "no stage has left"):
        assert note in page.text


def test_a_directory_that_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(RunError, match=r"nowhere: no such run directory"):
        write_report(tmp_path / "nowhere")


def test_broken_lines_are_named_and_the_others_shown(run):
    good = b'{"step": 1, "loss": 2.0}\n'
    write(
        run / "stages/02-sft/log.jsonl", good + b"\n{oops\n[1]\n\xff\xfe\n" + good + b'{"step": 2'
    )
    page = report(run)
    assert (
        "stages/02-sft/log.jsonl: 4 lines are not JSON objects and are left out: line 3, 4, 5, 7"
        in page.text
    )
    assert len(re.findall("[ML]", page.lines("train")[0])) == 2


def test_many_broken_lines_are_counted(run):
    write(run / "stages/02-sft/dropped.jsonl", "x\n" * 9)
    assert "9 lines are not JSON objects and are left out: line 1, 2, 3, 4, 5 and 4" in (
        report(run).text
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("recipe.yaml", "steps: ["),
        ("recipe.yaml", "model: x\nseed: 2001-99-99"),
        ("recipe.yaml", "tunesmith: 99\nmodel: x"),
        ("recipe.yaml", "- 1"),
        ("recipe.yaml", b"\xff\xfe\x00"),
        ("lock.json", "{"),
        ("lock.json", "[1]"),
        ("lock.json", "[" * 100_000),
        ("stages/02-sft/stage.json", "null"),
    ],
)
def test_a_broken_file_is_named(run, name, content):
    write(run / name, content)
    assert f"{name} " in report(run).text.partition("Recipe")[0]


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"seconds": "long", "metrics": [1], "options": None, "finished": 7},
        {"seconds": 10**400, "metrics": {"a": None, "b": [1], "c": 10**400}},
        {"seconds": float("nan"), "metrics": {"loss": float("nan")}, "finished": ""},
    ],
)
def test_a_record_of_an_unknown_shape_is_no_reason_to_fail(run, record):
    write(run / "stages/02-sft/stage.json", record)
    assert "02-sft - finished" in report(run).text


def test_a_loss_that_is_no_number_leaves_a_gap_and_is_told(run):
    losses = [2.0, 1.5, math.nan, math.inf, 1.0, 0.5]
    log = [{"step": at, "loss": loss} for at, loss in enumerate(losses, 1)]
    write(run / "stages/02-sft/log.jsonl", log)
    page = report(run)
    assert re.sub("[^ML]", "", page.lines("train")[0]) == "MLML"
    assert "not a finite number 2 times, first at step 3" in page.text


def test_a_curve_without_any_finite_value_is_told_in_words(run):
    write(run / "stages/02-sft/log.jsonl", [{"step": 4, "loss": math.nan}])
    page = report(run)
    assert "train not a finite number once, first at step 4" in page.text


@pytest.mark.parametrize(
    "points",
    [
        [(1, 0.0)],
        [(1, 5.0), (2, 5.0)],
        [(7, 1.0), (7, 2.0)],
        [(1.2, 1.0), (1.8, 2.0)],
        [(0, 0.0), (1, 5e-324)],
        [(0, 5e-324), (1, 5e-324)],
        [(0, 1e-200)],
        [(0, -1e308), (10**30, 1e308)],
        [(1, -1e99), (2, 1e99)],
        [(1, 1.00001), (2, 1.00005)],
        [(-5, 1.0), (5, 2.0)],
    ],
)
def test_odd_curves_stay_inside_their_chart(run, points):
    write(run / "stages/02-sft/log.jsonl", [{"step": x, "loss": y} for x, y in points])
    page = report(run)
    assert "nan" not in "".join(page.lines("train"))
    for path in page.lines("train"):
        for x, y in re.findall(r"([\d.]+) ([\d.]+)", path):
            assert 0 <= float(x) <= 400
            assert 0 <= float(y) <= 220


def test_ticks_close_together_can_be_told_apart(run):
    log = [{"step": 1, "loss": 1.000012}, {"step": 2, "loss": 1.000048}]
    write(run / "stages/02-sft/log.jsonl", log)
    ticks = report(run).texts["text"][:5]
    assert ticks == ["1.00001", "1.00002", "1.00003", "1.00004", "1.00005"]


def test_a_long_log_makes_a_small_page_that_keeps_the_peaks(run):
    log = [{"step": at, "loss": 1.0} for at in range(20_000)]
    log[12_345]["loss"] = 9.0
    write(run / "stages/02-sft/log.jsonl", log)
    page = report(run)
    assert (run / "report.html").stat().st_size < 100_000
    assert "highest 9" in page.text
    tops = [float(y) for y in re.findall(r" ([\d.]+)", page.lines("train")[0])]
    assert min(tops) < max(tops) - 100


def test_a_log_without_steps_is_drawn_by_its_lines(run):
    write(run / "stages/02-sft/log.jsonl", [{"loss": 2.0}, {"loss": 1.0}, {"other": "x"}])
    assert "train 2 at step 1, 1 at step 2" in report(run).text


def test_a_log_without_losses_says_so(run):
    write(run / "stages/02-sft/log.jsonl", [{"epoch": 1.0, "loss": "high"}])
    assert "The log holds no loss." in report(run).text
