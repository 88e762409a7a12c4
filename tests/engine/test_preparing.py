"""A plan reads each source once, mixes and transforms, and accounts for every row."""

from __future__ import annotations

import json
import sys
import types
from collections import Counter

import attrs
import pytest

import tunesmith.engine.preparing as preparing
import tunesmith.engine.readings as readings
from tunesmith import Data, Recipe, Step
from tunesmith.data.clean import DropLog, deduplicate, drop_empty, split
from tunesmith.data.examples import Conversation, Sourced
from tunesmith.engine.dataset import load_data
from tunesmith.engine.plan import make_plan
from tunesmith.engine.preparing import DataReader
from tunesmith.errors import DataError, PluginError
from tunesmith.plugin import Spec, hookimpl
from tunesmith.plugin.options import NoOptions
from tunesmith.plugin.registry import Registry, registry
from tunesmith.plugin.transforms import Transform, Transformed


def rows(count, start=0):
    return [{"instruction": f"q {n}", "output": f"a {n}"} for n in range(start, start + count)]


def talks(count, start=0):
    turns = [
        [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n}"}]
        for n in range(start, start + count)
    ]
    return [{"messages": each} for each in turns]


def said(examples):
    return [row.example.messages[-1].content for row in examples]


def read(data, seed=0, known=None, **more):
    return DataReader(known or registry()).read(Data.of(data), seed=seed, **more)


@pytest.fixture
def files(tmp_path):
    """Return two files of two formats."""
    (tmp_path / "a.json").write_text(json.dumps(rows(10)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in talks(20, start=100)))
    return str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")


def test_a_short_form_and_its_data_are_read_the_same(files):
    plain = load_data(files[0], None, registry())
    found = read(files[0])
    assert list(found.examples) == list(plain.examples)
    assert (found.fingerprint, found.format, found.description, found.rows) == (
        plain.fingerprint,
        plain.format,
        plain.description,
        plain.rows,
    )


def test_two_files_of_two_formats_are_one_data(files):
    found = read(Data(files[0]).mix(files[1], weight=0.3))
    assert found.rows == 30
    assert said(found.examples)[:10] == [f"a {n}" for n in range(10)]
    assert len(found.examples) == 10 + 6
    assert Counter(entry.reason for entry in found.dropped) == {"not sampled": 14}
    assert all("b.jsonl" in entry.where for entry in found.dropped)
    assert found.format == "alpaca + messages"


def test_a_weight_above_one_repeats_what_a_trainer_has_deduplicated():
    data = Data([*rows(3), *rows(1)]).mix(rows(2, start=50), weight=2)
    found = read(data, before=(preparing.CLEAN, preparing.DEDUPLICATE))
    assert Counter(said(found.examples)) == {
        **{f"a {n}": 1 for n in range(3)},
        **{f"a {n}": 2 for n in (50, 51)},
    }
    assert [(e.where, e.reason, e.detail) for e in found.dropped] == [
        ("source 1, row 4", "duplicate", "of source 1, row 1")
    ]


def test_what_sources_repeat_of_each_other_is_left_out_once():
    data = Data(rows(4)).mix(rows(4))
    found = read(data, before=(preparing.DEDUPLICATE,))
    assert said(found.examples) == [f"a {n}" for n in range(4)]
    again = rows(4)
    assert len(read(Data(again).mix(again), before=(preparing.DEDUPLICATE,)).examples) == 4


def test_a_trainers_options_do_what_they_did(files):
    """Cleaned, deduplicated and split as by the functions themselves."""
    given = [*rows(9), *rows(3), {"instruction": "q", "output": " "}]
    log = DropLog()
    expected = drop_empty(load_data(given, None, registry()).examples, log.add)
    expected = deduplicate(expected, log.add)
    train, held_out = split(expected, 0.25, 7)

    @attrs.frozen
    class Config:
        deduplicate = True
        eval_split = 0.25

    found = read(given, 7, before=preparing.before(Config()), after=preparing.after(Config()))
    assert (list(found.examples), list(found.held_out)) == (train, held_out)
    assert list(found.dropped) == log.entries


def test_transforms_go_in_order_and_what_is_held_out_is_left_alone():
    found = read(Data(rows(10)).split(4).limit(3))
    assert len(found.held_out) == 4
    assert len(found.examples) == 3
    assert {e.reason for e in found.dropped} == {"beyond the limit"}
    assert len(found.examples) + len(found.held_out) + len(found.dropped) == found.rows
    limited = read(Data(rows(10)).limit(3).split(1))
    assert (len(limited.examples), len(limited.held_out)) == (2, 1)


def test_a_source_has_transforms_of_its_own():
    found = read(Data(rows(10)).limit(2).mix(Data(rows(10, start=50)).split(5)).limit(4))
    assert said(found.examples)[:2] == ["a 0", "a 1"]
    assert (len(found.examples), len(found.held_out)) == (4, 5)


FINGERPRINTS = {
    "plain": lambda a, b: Data(a),
    "format": lambda a, b: Data(a, format="alpaca").dedupe(),
    "transform": lambda a, b: Data(a).limit(2),
    "option": lambda a, b: Data(a).limit(3),
    "two": lambda a, b: Data(a).mix(b),
    "order": lambda a, b: Data(b).mix(a),
    "weight": lambda a, b: Data(a).mix(b, weight=0.5),
    "nested": lambda a, b: Data(a).limit(2).mix(b),
}


def test_a_fingerprint_is_of_content_formats_weights_and_transforms(files):
    found = {name: read(build(*files)).fingerprint for name, build in FINGERPRINTS.items()}
    assert len(set(found.values())) == len(found)
    assert found == {name: read(build(*files)).fingerprint for name, build in FINGERPRINTS.items()}


def known(monkeypatch, apply, version="1", **flags):
    kind = type("Kind", (Transform,), {"apply": apply, **flags})
    module = types.ModuleType("a_stranger")
    module.Kind = kind
    monkeypatch.setitem(sys.modules, "a_stranger", module)
    plugin = types.ModuleType("a_plugin")
    plugin.tunesmith_transforms = hookimpl(lambda: [Spec("own", NoOptions, "a_stranger:Kind")])
    import tunesmith_plugins

    return Registry(
        [
            ("tunesmith", "tunesmith", "1", lambda: tunesmith_plugins),
            ("stranger", "stranger", version, lambda: plugin),
        ]
    )


def loses(self, rows, *, seed, drop):
    return Transformed(rows[1:])


def tells_twice(self, rows, *, seed, drop):
    drop(rows[0].where, "why")
    return Transformed(rows)


def invents(self, rows, *, seed, drop):
    return Transformed([*rows, Sourced(rows[0].example, "nowhere")])


def repeats(self, rows, *, seed, drop):
    return Transformed([*rows, rows[0]])


def renames(self, rows, *, seed, drop):
    return Transformed([Sourced(row.example, "new") for row in rows])


def bare(self, rows, *, seed, drop):
    return list(rows)


def raises(self, rows, *, seed, drop):
    raise KeyError("text")


@pytest.mark.parametrize(
    ("apply", "said"),
    [
        (loses, r"'stranger:own' lost 1 of 3 rows, such as row 1"),
        (tells_twice, r"was given 3 rows, and returned 3 and dropped 1, such as row 1"),
        (invents, r"returned 4 and dropped 0, such as nowhere"),
        (repeats, r"returned 4 and dropped 0, such as row 1.*adds_rows"),
        (renames, r"lost 3 of 3 rows"),
        (bare, r"returned a list; it has to return"),
        (raises, r"'stranger:own' failed with KeyError"),
    ],
)
def test_a_transform_that_does_not_account_for_its_rows_is_named(monkeypatch, apply, said):
    with pytest.raises(PluginError, match=said):
        read(Data(rows(3)).transform("own"), known=known(monkeypatch, apply))


def test_a_transform_may_add_rows_if_it_says_so(monkeypatch):
    found = read(Data(rows(3)).transform("own"), known=known(monkeypatch, repeats, adds_rows=True))
    assert len(found.examples) == 4
    with pytest.raises(PluginError, match="such as nowhere"):
        read(Data(rows(3)).transform("own"), known=known(monkeypatch, invents, adds_rows=True))


def test_a_transform_is_given_the_shapes_it_takes(monkeypatch):
    mine = known(monkeypatch, repeats, examples=("preference",), adds_rows=True)
    with pytest.raises(DataError, match=r"'stranger:own' takes preference examples, and these are"):
        read(Data(rows(3)).transform("own"), known=mine)


def test_the_version_of_a_strangers_transform_is_in_the_fingerprint(monkeypatch):
    data = Data(rows(3)).transform("own")
    found = [
        read(data, known=known(monkeypatch, repeats, version, adds_rows=True)).fingerprint
        for version in ("1", "2")
    ]
    assert found[0] != found[1]


def test_sources_of_several_shapes_are_refused():
    prefs = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.raises(DataError, match=r"source 1, row 1 is a conversation, and source 2, row 1"):
        read(Data(rows(2)).mix(prefs))


def test_data_that_comes_to_nothing_says_why():
    with pytest.raises(DataError, match=r"every one of 2 rows .* was dropped: .*no assistant turn"):
        read([{"instruction": "q", "output": " "}] * 2, before=(preparing.CLEAN,))


def recipe(model, *steps):
    return Recipe(str(model), steps, precision="fp32", device="cpu")


def test_a_plan_reads_what_its_steps_share_once(tiny_model, files, monkeypatch):
    read_sources = []

    def counted(data, *rest, **options):
        read_sources.append(data)
        return load_data(data, *rest, **options)

    monkeypatch.setattr(readings, "load_data", counted)
    plan = make_plan(
        recipe(
            tiny_model,
            Step("peft", "lora", {"r": 2}),
            Step("train", "sft", {"eval_data": files[0]}, files[0]),
            Step("evaluate", "loss", {}, files[1]),
            Step("train", "sft", {"epochs": 1}, Data(files[0]).mix(files[1])),
        ),
        registry(),
        estimates=False,
    )
    assert not plan.problems
    assert sorted(map(str, read_sources)) == sorted(files)


def problems(model, *steps):
    return "\n".join(make_plan(recipe(model, *steps), registry(), estimates=False).problems)


@pytest.mark.parametrize(
    ("verb", "plugin", "options", "data", "said"),
    [
        ("evaluate", "loss", {}, Data(rows(9)).split(2), "holds rows out, which nothing would"),
        ("train", "sft", {"early_stopping": 2}, Data(rows(9)).limit(5), "needs something to eval"),
        ("train", "sft", {"eval_split": 30}, Data(rows(9)).limit(5), "split: got 30 of 5 rows"),
        ("train", "sft", {}, Data(rows(9)).transform("none"), "unknown transform 'none'"),
        ("train", "sft", {}, Data(rows(9)).transform("limit", row=1), "unknown option 'row'"),
        ("train", "sft", {}, [{"instruction": "q", "output": " "}] * 2, "every one of 2 rows"),
    ],
)
def test_a_plan_finds_what_is_wrong_with_data(tiny_model, verb, plugin, options, data, said):
    steps = (Step("peft", "lora"), Step(verb, plugin, options, data))
    assert said in problems(tiny_model, *steps)


def test_eval_data_beside_held_out_rows_is_refused(tiny_model, files):
    step = Step("train", "sft", {"eval_data": files[0]}, Data(rows(9)).split(2))
    assert "eval_data, and its data holds rows out as well" in problems(
        tiny_model, Step("peft", "lora"), step
    )


def test_a_prompt_is_found_by_its_field_and_keeps_the_others():
    found = read([{"prompt": "1 + 1?", "answer": "2", "level": 3}])
    (row,) = found.examples
    assert found.shape == "prompt"
    assert row.example.extra == {"answer": "2", "level": 3}
    for answered in ("completion", "response", "output", "label"):
        with pytest.raises(DataError, match="no format knows rows"):
            read([{"prompt": "a", answered: "b"}])
    assert isinstance(read(rows(1)).examples[0].example, Conversation)
