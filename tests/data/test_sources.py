"""Rows come out of every kind of source, and every fault is told with its place."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.data.sources import describe, fingerprint, iter_rows, read_rows
from tunesmith.errors import DataError

ROWS = [{"a": "one", "b": "ü"}, {"a": "two", "b": ""}]
JSON = json.dumps(ROWS, ensure_ascii=False)
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = 'a,b\none,ü\n"two",\n'


def write(path, content):
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def values(data):
    return [dict(row.values) for row in read_rows(data)]


def wheres(data):
    return [row.where for row in read_rows(data)]


@pytest.mark.parametrize(
    ("name", "content", "unit"),
    [
        ("t.json", JSON, "row"),
        ("t.json", json.dumps({"version": 1, "data": ROWS}), "row"),
        ("t.json", LINES, "line"),
        ("t.jsonl", LINES, "line"),
        ("t.ndjson", LINES.rstrip("\n"), "line"),
        ("t.jsonl", LINES.replace("\n", "\r\n"), "line"),
        ("t.csv", CSV, "row"),
        ("t.csv", CSV.replace("\n", "\r\n"), "row"),
        ("t.tsv", CSV.replace(",", "\t"), "row"),
        ("T.JSON", JSON, "row"),
    ],
)
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_text_files_are_read_plain_or_zipped_with_or_without_bom(
    tmp_path, name, content, unit, bom, ending
):
    path = write(tmp_path / (name + ending), bom + content.encode())
    assert values(path) == ROWS
    assert values(str(path)) == ROWS
    assert wheres(path) == [f"{path.name}, {unit} 1", f"{path.name}, {unit} 2"]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_parquet_is_read(tmp_path, ending):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    path = write(tmp_path / f"u.parquet{ending}", path.read_bytes())
    assert values(path) == ROWS
    assert wheres(path)[1] == f"u.parquet{ending}, row 2"


def test_blank_lines_of_json_lines_are_skipped_and_counted(tmp_path):
    path = write(tmp_path / "t.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    assert wheres(path) == ["t.jsonl, line 1", "t.jsonl, line 3"]


def test_a_line_separator_within_a_json_text_ends_no_line(tmp_path):
    path = write(tmp_path / "t.jsonl", '{"a": "x\u2028y"}\n')
    assert values(path) == [{"a": "x\u2028y"}]


def test_a_single_conversation_on_a_line_of_its_own_is_one_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert values(write(tmp_path / "t.json", json.dumps(row))) == [row]


def test_cells_of_csv_stay_text_and_may_hold_lines_and_be_large(tmp_path):
    large = "x" * 200_000
    path = write(tmp_path / "t.csv", f'a,b\n007,"two\nlines, and ""quotes"""\n1.0,{large}\n')
    assert values(path) == [{"a": "007", "b": 'two\nlines, and "quotes"'}, {"a": "1.0", "b": large}]


def test_a_directory_is_its_data_files_in_order(tmp_path):
    write(tmp_path / "b.json", '[{"a": 2}]')
    write(tmp_path / "a.jsonl", '{"a": 1}')
    write(tmp_path / "README.md", "not data")
    assert values(tmp_path) == [{"a": 1}, {"a": 2}]


def test_several_paths_are_read_in_turn_and_equal_names_are_told_apart(tmp_path):
    (tmp_path / "x").mkdir()
    first = write(tmp_path / "t.json", '[{"a": 1}]')
    second = write(tmp_path / "x" / "t.json", '[{"a": 2}]')
    assert values([str(first), second]) == [{"a": 1}, {"a": 2}]
    assert wheres([first, second]) == [f"{first}, row 1", f"{second}, row 1"]


def test_rows_in_this_process_are_read_from_any_iterable():
    assert values(ROWS) == values(tuple(ROWS)) == values(iter(ROWS)) == ROWS
    assert wheres(ROWS) == ["row 1", "row 2"]
    assert [row.where for row in read_rows(ROWS, limit=1)] == ["row 1"]


def test_reading_stops_where_the_reader_stops():
    def endless():
        while True:
            yield {"a": 1}

    assert len(read_rows(endless(), limit=3)) == 3
    assert next(iter_rows(endless())).where == "row 1"


def test_frames_and_tables_are_read_and_pandas_missing_values_are_null():
    import pandas
    import pyarrow

    frame = pandas.DataFrame([{"a": "x", "b": 1.5}, {"a": None, "b": None}])
    assert values(frame) == [{"a": "x", "b": 1.5}, {"a": None, "b": None}]
    assert values(pyarrow.Table.from_pylist(ROWS)) == ROWS

    class Polars:
        def to_dicts(self):
            return ROWS

    assert values(Polars()) == ROWS


def test_data_sets_are_read_and_a_dict_of_them_by_its_train_split():
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    assert values(rows) == ROWS
    assert values(datasets.DatasetDict({"test": rows, "train": rows})) == ROWS
    with pytest.raises(DataError, match=r"splits dev, test; expected one with a 'train' split"):
        read_rows(datasets.DatasetDict({"test": rows, "dev": rows}))


def test_a_hub_id_is_loaded_with_its_split(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: asked.append((name, split)) or ROWS
    )
    assert wheres("owner/some-name_2.1") == [f"owner/some-name_2.1[train], row {n}" for n in (1, 2)]
    assert wheres("owner/name:test[:5]")[0] == "owner/name[test[:5]], row 1"
    assert asked == [("owner/some-name_2.1", "train"), ("owner/name", "test[:5]")]


def test_a_hub_id_that_cannot_be_loaded_says_that_it_is_no_file_either(monkeypatch):
    import datasets

    def fail(name, split):
        raise ConnectionError("no network\nlong tail")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"'owner/name' is no file .* be loaded: no network;"):
        read_rows("owner/name")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", "", r"t\.json: the file is empty"),
        ("t.json", " \n", r"t\.json: the file is empty"),
        ("t.json", "[]", r"t\.json holds no rows"),
        ("t.jsonl", "\n\n", r"t\.jsonl holds no rows"),
        ("t.csv", "a,b\n", r"t\.csv holds no rows"),
        (
            "t.json",
            '[\n{"a": 1},\n{"a" 2}]',
            r"t\.json, line 3, column 6: not valid JSON: expecting "
            r"':' delimiter; the line is: \{\"a\" 2\}\]",
        ),
        (
            "t.jsonl",
            '{"a": 1}\n{"a": \n',
            r"t\.jsonl, line 2, column \d: not valid JSON: expecting "
            r"value.*the line is: \{\"a\":",
        ),
        ("t.json", '{"a": 1}\n{"a": \n', r"t\.json, line 2, column"),
        ("t.jsonl", '[{"a": 1}]', r"t\.jsonl, line 1: got a list of 1; .* is named \.json"),
        ("t.jsonl", '[\n{"a": 1}]', r"t\.jsonl, line 1, column .* is named \.json"),
        ("t.json", '[{"a": 1}, 3]', r"t\.json, row 2: got a number \(3\); expected an object"),
        ("t.json", "[null]", r"t\.json, row 1: got null; expected an object"),
        ("t.jsonl", '"x"', r"t\.jsonl, line 1: got text \('x'\); expected an object"),
        ("t.json", "true", r"t\.json: got true; expected a list of objects"),
        (
            "t.json",
            '{\n"a": "x",\n"b": "y"}',
            r"one object with the keys a, b; .* single row in \[ \]",
        ),
        ("t.json", '{"a": "\u00e4'.encode("latin-1") + b'"}', r"byte 7 \(0xe4\): not UTF-8"),
        ("t.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"t\.jsonl, byte 16 \(0xff\): not UTF-8"),
        (
            "t.csv",
            b"a,b\n" + b"x,y\n" * 9000 + b"\xe4,y\n",
            r"t\.csv, byte 36004 \(0xe4\): not UTF-8",
        ),
        ("t.csv", "a,b\n1,2\n1,2,3\n", r"t\.csv, line 3: got 3 cells; expected 2.* columns a, b"),
        ("t.csv", 'a,b\n"1\n1",2\n1\n', r"t\.csv, line 4: got 1 cells; expected 2"),
        ("t.csv", 'a,b\n"1,2\n', r"t\.csv, line 2: not a valid row: unexpected end of data"),
        ("t.csv", "a,a\n1,2\n", r"t\.csv, line 1: the column a is named twice"),
        ("t.parquet", "no parquet at all", r"t\.parquet: not a whole parquet file"),
    ],
)
def test_a_broken_file_is_told_with_its_place(tmp_path, name, content, message):
    for path in (write(tmp_path / name, content), write(tmp_path / f"{name}.gz", content)):
        with pytest.raises(DataError, match=message.replace(name.replace(".", r"\."), path.name)):
            read_rows(path)


@pytest.mark.parametrize(
    "harm",
    [
        lambda raw: raw[:-12],
        lambda raw: b"plain text",
        lambda raw: raw[:12] + b"\xff\xff\xff" + raw[15:],
    ],
)
def test_a_broken_gzip_file_is_told(tmp_path, harm):
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(harm(gzip.compress(LINES.encode() * 99)))
    with pytest.raises(DataError, match=r"t\.jsonl\.gz: not a whole gzip file"):
        read_rows(path)


def test_a_missing_file_is_answered_with_what_lies_beside_it(tmp_path):
    write(tmp_path / "train.json", JSON)
    with pytest.raises(DataError, match=r"trian\.json: no such file.*did you mean '.*train\."):
        read_rows(tmp_path / "trian.json")
    with pytest.raises(DataError, match="there is no directory"):
        read_rows(str(tmp_path / "nowhere" / "t.json"))
    with pytest.raises(DataError, match="or give a hub id"):
        read_rows("nothing-like-it")


def test_a_file_of_another_kind_is_answered_with_the_kinds_that_are_read(tmp_path):
    with pytest.raises(DataError, match=r"ends in '\.xlsx'; expected \.json, .*\.arrow, each"):
        read_rows(write(tmp_path / "t.xlsx", "x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="a directory without any data file; expected files that"):
        read_rows(tmp_path / "empty")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "0 rows holds no rows"),
        ([{"a": 1}, 3], r"row 2: got a number \(3\); expected a mapping"),
        ([{"a": 1}, "x"], "row 2: got the text 'x' among other things"),
        ({"a": 1}, "got a dict with the keys a; .* put a single row in a list"),
        (3, r"got a number \(3\) as data; expected a path"),
        (None, "got null as data; expected a path"),
        (b"x", "got a bytes as data; expected a path"),
    ],
)
def test_data_of_no_known_kind_is_an_error(data, message):
    with pytest.raises(DataError, match=message):
        read_rows(data)


def test_a_description_is_short(tmp_path):
    assert describe("train.json") == "train.json"
    assert describe([Path("a.json"), "b.json"]) == "a.json, b.json"
    assert describe(ROWS) == "2 rows"
    assert describe(ROWS[:1]) == "1 row"
    assert describe(iter(ROWS)) == "rows of a list_iterator"


def test_a_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    first = write(tmp_path / "a.json", JSON)
    same = write(tmp_path / "b.json", JSON)
    other = write(tmp_path / "c.json", JSON + " ")
    assert fingerprint(first) == fingerprint(str(same)) != fingerprint(other)
    assert fingerprint([first, other]) == fingerprint([same, other])
    assert fingerprint([first, other]) != fingerprint([other, first])
    assert len(fingerprint(first)) == 64


def test_a_fingerprint_of_rows_is_that_of_a_data_set_that_holds_them():
    import datasets

    mark = fingerprint(ROWS)
    assert mark == fingerprint([dict(reversed(row.items())) for row in ROWS])
    assert mark == fingerprint(datasets.Dataset.from_list(ROWS))
    assert mark != fingerprint(ROWS[::-1])


def test_a_fingerprint_takes_values_that_json_does_not_know():
    import datetime

    import numpy

    rows = [{"a": numpy.float32(1.5), "b": datetime.date(2024, 1, 1), "c": b"x", "d": {"y", "x"}}]
    assert fingerprint(rows) == fingerprint(list(rows))


def test_an_iterator_has_no_fingerprint_as_it_would_be_used_up():
    with pytest.raises(DataError, match="can be read only once"):
        fingerprint(iter(ROWS))


def test_reading_text_files_imports_neither_torch_nor_datasets(tmp_path):
    path = write(tmp_path / "t.json", JSON)
    code = (
        "import sys; from tunesmith.data import clean, render, sources; "
        f"sources.read_rows({str(path)!r}); "
        "print([m for m in ('torch', 'datasets', 'pyarrow', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
