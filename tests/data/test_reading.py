"""What is read is plain and whole, costs bounded memory, and is what the fingerprint is of."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from tunesmith.data import sources
from tunesmith.data.reading import bounds, files, json_rows
from tunesmith.data.sources import Reading, describe, fingerprint, read_rows
from tunesmith.errors import DataError
from tunesmith.strict_json import JsonError, parse, parse_at

CALL = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
ROWS = [
    {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ],
        "n": 1,
    },
    {
        "messages": [
            {"role": "user", "content": "Time?"},
            {
                "role": "assistant",
                "content": "Noon.",
                "tool_calls": [{"function": {"name": "time", "arguments": {"zone": "CET"}}}],
            },
        ],
        "n": 2,
    },
]


def values(data):
    return [row.values for row in read_rows(data)]


def plain(value) -> bool:
    if isinstance(value, dict):
        return type(value) is dict and all(map(plain, value.values()))
    if isinstance(value, list):
        return type(value) is list and all(map(plain, value))
    return value is None or type(value) in (str, int, float, bool)


# values are plain, and the same whatever they come from


def sources_of(tmp_path) -> dict:
    import datasets
    import pandas
    import pyarrow.parquet

    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as writer:
        writer.write_table(table)
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as writer:
        writer.write_table(table)
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "dict")

    class Polars:  # as polars and duckdb hand out their tables
        def __arrow_c_stream__(self, requested_schema=None):
            return table.__arrow_c_stream__(requested_schema)

    return {
        "lines": tmp_path / "t.jsonl",
        "parquet": tmp_path / "t.parquet",
        "arrow file": tmp_path / "file.arrow",
        "arrow stream": tmp_path / "stream.arrow",
        "table": table,
        "reader": pyarrow.RecordBatchReader.from_batches(table.schema, table.to_batches()),
        "another library's table": Polars(),
        "read_parquet": pandas.read_parquet(tmp_path / "t.parquet"),
        "to_pandas": rows.to_pandas(),
        "data set": rows,
        "numpy": rows.with_format("numpy"),
        "pandas": rows.with_format("pandas"),
        "shuffled twice": rows.select([1, 0]).select([1, 0]).with_format("numpy"),
        "stream": rows.to_iterable_dataset(),
        "saved": tmp_path / "saved",
        "saved dict": tmp_path / "dict",
        "split of it": str(tmp_path / "dict") + ":test",
    }


@pytest.fixture(scope="module")
def each_source(tmp_path_factory):
    return sources_of(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize(
    "name",
    [
        *["lines", "parquet", "arrow file", "arrow stream", "table", "saved", "saved dict"],
        *["another library's table", "read_parquet", "to_pandas", "data set", "numpy", "pandas"],
        *["shuffled twice", "stream", "split of it", "reader"],
    ],
)
def test_the_same_rows_come_out_of_every_source(each_source, name):
    rows = values(each_source[name])
    assert rows == ROWS
    assert all(map(plain, rows))


def test_a_null_that_was_meant_is_kept_where_the_source_can_say_so(tmp_path):
    row = {"messages": [{"role": "user", "content": "a", "name": None}], "note": None}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    assert values(tmp_path / "t.jsonl") == [row] == values([row])


def test_a_column_of_json_is_read_as_what_it_holds():
    import pyarrow

    column = pyarrow.array(['{"a": null}', None, "[1]"], pyarrow.json_())
    assert values(pyarrow.table({"x": column})) == [{"x": {"a": None}}, {"x": None}, {"x": [1]}]


def test_a_format_with_a_transform_is_a_part_of_the_rows():
    import datasets

    rows = datasets.Dataset.from_list([{"a": 1, "b": 2}])
    assert values(rows.with_transform(lambda batch: {"a": [9]})) == [{"a": 9}]
    assert values(rows.with_format("numpy", columns=["b"])) == [{"b": 2}]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (numpy.float32(1.5), 1.5),
        (numpy.array([[1, 2]]), [[1, 2]]),
        (numpy.array([{"a": 1, "b": None}], dtype=object), [{"a": 1}]),
        (numpy.str_("x"), "x"),
        (numpy.bool_(True), True),
        (numpy.datetime64("2024-01-02"), "2024-01-02"),
        (datetime.date(2024, 1, 2), "2024-01-02"),
        (decimal.Decimal("2"), 2),
        (decimal.Decimal("1.25"), 1.25),
        (decimal.Decimal("0.1234567890123456789"), "0.1234567890123456789"),
        ((1, (2,)), [1, [2]]),
        ({"b", "a"}, ["a", "b"]),
        (Path("a"), "a"),
        (b"text", "text"),
    ],
)
def test_values_of_other_libraries_become_plain(value, expected):
    assert values([{"x": value}]) == [{"x": expected}]
    assert type(values([{"x": value}])[0]["x"]) is type(expected)


def test_missing_values_of_pandas_are_null():
    import pandas

    frame = pandas.DataFrame({"a": ["x", None], "b": [1.5, float("nan")], "c": [pandas.NaT] * 2})
    frame["d"] = pandas.array([1, pandas.NA], dtype="Int64")
    assert values(frame) == [
        {"a": "x", "b": 1.5, "c": None, "d": 1},
        {"a": None, "b": None, "c": None, "d": None},
    ]
    assert values([{"a": pandas.NA, "b": pandas.NaT}]) == [{"a": None, "b": None}]


# paths


def test_paths_may_begin_at_home_and_be_any_path_object(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n')

    class Elsewhere:
        def __fspath__(self):
            return str(tmp_path / "t.jsonl")

    assert values("~/t.jsonl") == values(Elsewhere()) == values([Elsewhere()]) == [{"a": 1}]


def test_of_a_dict_of_data_sets_the_plan_says_which_split_is_taken():
    import datasets

    rows = datasets.Dataset.from_list([{"a": 1}])
    both = datasets.DatasetDict({"train": rows, "test": rows})
    assert describe(both) == "1 row in the split 'train' of a DatasetDict"
    assert [row.where for row in read_rows(both)] == ["train, row 1"]
    assert [row.where for row in read_rows(datasets.DatasetDict({"x": rows}))] == ["x, row 1"]


def test_a_saved_dict_without_train_asks_for_a_split(tmp_path):
    import datasets

    rows = datasets.Dataset.from_list([{"a": 1}])
    datasets.DatasetDict({"x": rows, "y": rows}).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"no split 'train', but x, y; give one as '.*d:x'"):
        read_rows(tmp_path / "d")
    with pytest.raises(DataError, match=r"no split 'z', but x, y"):
        read_rows(f"{tmp_path / 'd'}:z")


# what is read once


def test_the_fingerprint_is_of_what_was_read_and_not_of_what_lies_there_later(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1}\n' * 3)
    before = fingerprint(path)
    reading = Reading(path)
    rows = iter(reading)
    next(rows)
    path.write_text('{"a": 2}\n' * 3)
    list(rows)
    assert reading.fingerprint() == before != fingerprint(path)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, suffix):
    import pyarrow.parquet

    path = tmp_path / f"t.{suffix}"
    table = pyarrow.table({"a": list(range(5000))})
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    rows = iter(Reading(path))
    next(rows)
    os.utime(path, (1, 1))
    with pytest.raises(DataError, match=rf"t\.{suffix}: changed while it was read"):
        list(rows)


@pytest.mark.parametrize(
    "name", ["t.jsonl", "t.json", "t.csv", "t.jsonl.gz", "t.parquet", "t.arrow"]
)
def test_one_reading_gives_the_fingerprint_that_a_second_one_would(tmp_path, name):
    import pyarrow.parquet

    path = tmp_path / name
    table = pyarrow.table({"a": ["x"] * 2000})
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(table, path)
    elif name.endswith("arrow"):
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        content = {"t.json": json.dumps([{"a": "x"}] * 2000), "t.csv": "a\n" + "x\n" * 2000}
        text = content.get(name, '{"a": "x"}\n' * 2000).encode()
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    reading = Reading(path, marked=True)
    assert len(list(reading)) == 2000
    assert reading.fingerprint() == fingerprint(path)


# bounds


@pytest.mark.parametrize("position", range(1, 40))
def test_a_document_is_read_the_same_wherever_its_chunks_end(tmp_path, position, monkeypatch):
    monkeypatch.setattr(json_rows, "_CHUNK", position)
    rows = [{"a": "ü\n", "b": [1.5e-7, -12, True, None]}, {"a": "😀", "b": {}}]
    for value in (rows, {"version": 12, "data": rows, "n": -0.5}):
        path = tmp_path / "t.json"
        path.write_text(json.dumps(value, indent=1, ensure_ascii=position % 2 == 0))
        assert values(path) == rows


def test_an_object_too_long_to_be_one_row_is_read_row_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_ROW", 200)
    monkeypatch.setattr(json_rows, "_CHUNK", 64)
    rows = [{"a": "x" * 20}] * 50
    path = tmp_path / "t.json"
    for value in ({"v": 1, "data": rows}, {"data": rows, "v": None, "w": "y"}):
        path.write_text(json.dumps(value))
        assert values(path) == rows
    for value, problem in (
        ({"a": rows, "b": rows}, "keys a, b; expected a list"),
        ({"a": rows, "b": {"c": 1}}, "keys a, b; expected a list"),
        ({"v": 1, "a": [{"role": "user", "content": "x"}] * 50}, "keys a, v; expected a list"),
        ({"data": [*rows, 3]}, "row 51: got a number"),
        ({"data": [*rows, {"a": "x" * 300}]}, "row 51: longer than"),
    ):
        path.write_text(json.dumps(value))
        with pytest.raises(DataError, match=problem):
            read_rows(path)
    path.write_text('{"v": 1, "data": ' + json.dumps(rows) + ', "v": 2}')
    with pytest.raises(DataError, match="the key 'v' stands twice"):
        read_rows(path)


@pytest.mark.parametrize("end", [0, 1])
def test_the_longest_row_is_read_and_one_character_more_is_not(tmp_path, end, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_ROW", 1000)
    for name, around in (("t.jsonl", "{}"), ("t.json", "[{}]")):
        text = '{"a": "' + "é" * (991 + end) + '"}'
        (tmp_path / name).write_text(around.replace("{}", text))
        if end:
            with pytest.raises(DataError, match="longer than 4,194,304 characters"):
                read_rows(tmp_path / name)
        else:
            assert len(read_rows(tmp_path / name)) == 1


def test_data_beyond_the_memory_that_is_free_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl"
    with path.open("wb") as stream:
        stream.truncate(900_000_000)
    monkeypatch.setattr(bounds, "free_memory", lambda: 1_000_000_000)
    with pytest.raises(DataError, match=r"t\.jsonl: is 858 MiB large, and 954 MiB of memory are"):
        read_rows(path)


def test_reading_stops_when_the_memory_is_nearly_used_up(tmp_path, monkeypatch):
    path = tmp_path / "t.jsonl"
    path.write_text(('{"a": "' + "x" * 90 + '"}\n') * 200_000)
    left = iter([10**9, 10**8])
    monkeypatch.setattr(bounds, "free_memory", lambda: next(left))
    with pytest.raises(DataError, match=r"has taken all memory after 1\d MiB read, and 95 MiB of"):
        for _ in sources.iter_rows(path):
            pass


def test_reading_stops_where_the_growth_so_far_says_that_the_rest_will_not_fit(
    tmp_path, monkeypatch
):
    path = tmp_path / "t.jsonl"
    path.write_text(('{"a": "' + "x" * 90 + '"}\n') * 500_000)
    grown = iter([0] + [10**9] * 99)
    monkeypatch.setattr(bounds, "_resident_memory", lambda: next(grown))
    monkeypatch.setattr(bounds, "free_memory", lambda: 500_000_000)
    with pytest.raises(DataError, match=r"will need [1-9]\.\d GiB as rows, judged by 3\d MiB read"):
        for _ in sources.iter_rows(path):
            pass


def test_memory_that_runs_out_is_told_with_the_row(monkeypatch):
    def rows():
        yield {"a": 1}
        raise MemoryError

    with pytest.raises(DataError, match=r"memory ran out after 1 rows; split the data"):
        read_rows(rows())


def test_what_unpacks_out_of_all_proportion_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BOMB_BYTES", 1_000_000)
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n' * 3_000_000, 9))
    with pytest.raises(DataError, match=r"t\.jsonl\.gz: .* more than 200 times as much"):
        read_rows(path)


# VmHWM, as what getrusage says begins with the memory of the process that started this one
PEAK = """
import re, sys
from tunesmith.data.sources import iter_rows
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
for _ in iter_rows(sys.argv[1]): pass
before = peak()
count = sum(1 for _ in iter_rows(sys.argv[2]))
print(count, peak() - before)
"""


def write_rows(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text("a,b\n" + "".join(f"{row['a']},{row['b']}\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of its memory from /proc")
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_reading_takes_no_memory_for_the_rows_that_went_by(tmp_path, suffix):
    rows = [{"a": f"{number:09}" * 25, "b": "y" * 25} for number in range(100_000)]  # 25 MB
    small = write_rows(tmp_path / f"small{suffix}", rows[:100])
    path = write_rows(tmp_path / f"t{suffix}", rows)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(small), str(path)], capture_output=True, text=True
    )
    count, grown = map(int, done.stdout.split())
    assert count == 100_000
    # a batch of Arrow and what pyarrow keeps of a row group, or a chunk of text
    assert grown < (40_000_000 if suffix == ".parquet" else 8_000_000)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of its memory from /proc")
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_row_takes_a_few_bytes_for_each_of_its_characters(tmp_path, suffix):
    small = write_rows(tmp_path / f"small{suffix}", [{"a": "x", "b": "y"}])
    path = write_rows(tmp_path / f"t{suffix}", [{"a": "x" * 4_000_000, "b": "y"}])
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(small), str(path)], capture_output=True, text=True
    )
    count, grown = map(int, done.stdout.split())
    assert count == 1
    assert grown / 4_000_000 < 16


# JSON


@pytest.mark.parametrize(
    ("text", "field", "problem"),
    [
        ('{"a": {"b": [1, NaN]}}', "a.b[1]", "NaN is no JSON"),
        ('[{"a": 1, "a": 2}]', "[0]", "the key 'a' stands twice"),
        ('{"a": "\\ud800"}', "a", "half of a character"),
        ('{"a": -1e999}', "a", "larger than a float can hold"),
        ('{"a": [' + "1" * 4301 + "]}", "a[0]", "a whole number of 4301 digits"),
    ],
)
def test_json_that_cannot_be_kept_is_told_with_its_field(text, field, problem):
    for read in (parse, lambda text: parse_at("  " + text, 2)):
        with pytest.raises(JsonError, match=problem) as caught:
            read(text)
        assert (caught.value.field, caught.value.position) == (field, None)


@pytest.mark.parametrize("recursion", [1000, 100_000])
def test_nesting_is_bounded_however_deep_python_may_recur(recursion):
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(recursion)
    try:
        for text in ("[" * 50_000, '{"a":' * 20_000, "[" * 101 + "]" * 101):
            for read in (parse, lambda text: parse_at(text, 0)):
                with pytest.raises(JsonError, match="nested more than 100 deep"):
                    read(text)
    finally:
        sys.setrecursionlimit(limit)
    assert parse("[" * 100 + "]" * 100)
    assert parse('["' + "[" * 500 + '\\"[[["]') == ["[" * 500 + '"[[[']
