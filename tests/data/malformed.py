"""Malformed inputs by the hundred, each with what has to come of it.

`python malformed.py KIND [STEP]` tries every STEP-th case of a kind in a process of its own, whose
memory is bounded, and prints a line of JSON for each: what came of it, how long it took, how much
memory. Cases are made from their kind and number alone, so a run can be repeated.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

LIMIT = 4_000_000_000
"""Bytes of address space that a process of cases may take; Arrow and its threads reserve one."""

ROWS = [{"instruction": f"ask {n}", "input": "", "output": f"answer {n}"} for n in range(5)]
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@attrs.frozen
class Case:
    """An input and what must come of it."""

    name: str
    make: Callable[[Path], Any]
    """Writes what it needs into a directory and returns the data to load."""
    refused: str = ""
    """Pattern of the error's message; "" if the input is to be taken."""
    rows: int = -1
    """Rows that come of it; -1 for any number."""
    either: bool = False
    """Whether it may be taken or refused, as long as nothing else happens."""


def _file(name: str, content: bytes) -> Callable[[Path], Any]:
    def make(directory: Path) -> str:
        path = directory / name
        if name.endswith(".gz"):
            content_packed = gzip.compress(content, 1)
            path.write_bytes(content_packed)
        else:
            path.write_bytes(content)
        return str(path)

    return make


def _raw(name: str, content: bytes) -> Callable[[Path], Any]:
    def make(directory: Path) -> str:
        (directory / name).write_bytes(content)
        return str(directory / name)

    return make


# --- JSON -----------------------------------------------------------------------------------------

_GOOD = '{"instruction": "ask", "output": "answer"}'
_HALF = '{"instruction": "ask", "output": '

_BROKEN_ROWS: dict[str, bytes] = {
    name: text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    for name, text in {
        "equal keys": '{"instruction": "a", "output": "b", "output": "c"}',
        "equal keys within": _HALF + '"a", "x": {"k": 1, "k": 2}}',
        "equal keys in a list": _HALF + '"a", "x": [1, {"k": 1, "k": 1}]}',
        "NaN": _HALF + "NaN}",
        "Infinity": _HALF + '"a", "x": Infinity}',
        "-Infinity": _HALF + '"a", "x": [-Infinity]}',
        "a float that overflows": _HALF + '"a", "x": 1e999}',
        "5,000 digits": _HALF + '"a", "x": ' + "9" * 5000 + "}",
        "5,000 digits below zero": _HALF + '"a", "x": [-' + "1" * 5000 + "]}",
        "100,000 digits": _HALF + '"a", "x": ' + "7" * 100_000 + "}",
        "nested 101": _HALF + '"a", "x": ' + "[" * 100 + "]" * 100 + "}",
        "nested 900": _HALF + '"a", "x": ' + "[" * 900 + "]" * 900 + "}",
        "objects nested 900": _HALF + '"a", "x": ' + '{"a":' * 900 + "1" + "}" * 900 + "}",
        "nested 100,000": _HALF + "[" * 100_000 + "]" * 100_000 + "}",
        "nested 100,000 and open": _HALF + "[" * 100_000,
        "NaN nested 400": _HALF + '"a", "x": ' + "[" * 400 + "NaN" + "]" * 400 + "}",
        "equal keys nested 900": _HALF + '"a", "x": ' + '{"a":1,"a":' * 900 + "1" + "}" * 900 + "}",
        "high surrogate": _HALF + '"\\ud83d"}',
        "low surrogate": _HALF + '"x\\ude00"}',
        "pair the wrong way round": _HALF + '"\\ude00\\ud83d"}',
        "surrogate in a key": _HALF + '"a", "\\uD800": 1}',
        "surrogate deep": _HALF + '"a", "x": [{"y": "\\udFFF"}]}',
        "surrogate in bytes": _HALF.encode() + b'"\xed\xa0\x80"}',
        "open text": _HALF + '"ans',
        "open object": '{"instruction": "ask"',
        "comma at the end": _HALF + '"a",}',
        "single quotes": "{'instruction': 'ask', 'output': 'a'}",
        "no quotes": "{instruction: 1}",
        "tab in a text": _HALF + '"a\tb"}',
        "bad escape": _HALF + '"a\\xb"}',
        "short escape": _HALF + '"\\u12"}',
        "comment": _HALF + '"a"} // why',
        "no colon": '{"instruction" "ask"}',
        "no comma": '{"instruction": "a" "output": "b"}',
        "two on a line": _GOOD + " " + _GOOD,
        "a number": "3",
        "null": "null",
        "a text": '"ask"',
        "a list": '["ask", "answer"]',
        "Python's words": '{"instruction": None, "output": True}',
        "latin-1": _HALF.encode() + b'"\xe4"}',
        "overlong": _HALF.encode() + b'"\xc0\xaf"}',
        "cut character": _HALF.encode() + b'"\xe2\x82"}',
        "NUL": _HALF + '"a\0b"}',
        "leading zero": _HALF + '"a", "x": 007}',
        "plus": _HALF + '"a", "x": +1}',
        "hexadecimal": _HALF + '"a", "x": 0x10}',
        "point at the end": _HALF + '"a", "x": 1.}',
        "output a number": _HALF + "3}",
        "output null": _HALF + "null}",
        "output a list": _HALF + '["a"]}',
        "no output": '{"instruction": "ask"}',
        "empty object": "{}",
    }.items()
}
_SAME_AT_ANY_PLACE = {
    "output a number",
    "output null",
    "output a list",
    "no output",
    "empty object",
}


def _containers(broken: bytes, at: int) -> Iterator[tuple[str, bytes, str]]:
    rows = [_GOOD.encode()] * 5
    rows[at] = broken
    lines = b"\n".join(rows) + b"\n"
    listing = b"[\n" + b",\n".join(rows) + b"\n]\n"
    place = rf"(line {at + 1}|byte \d+)\b"
    yield "t.jsonl", lines, place
    yield "t.ndjson.gz", lines, place
    place = rf"(row {at + 1}|line {at + 2}|line {at + 3}|byte \d+)\b"
    yield "t.json", listing, place
    yield "t.json.gz", b'{"version": 1, "data": ' + listing + b"}", place
    if at:  # what the first line holds says that it is a file of lines
        yield "l.json", lines, rf"(line {at + 1}|byte \d+)\b"


def json_cases() -> Iterator[Case]:
    """Rows that are no JSON, or JSON that cannot be kept, in every kind of file."""
    for (what, broken), at in itertools.product(_BROKEN_ROWS.items(), (0, 3)):
        for name, content, place in _containers(broken, at):
            at_first = at == 0 and what in _SAME_AT_ANY_PLACE
            pattern = rf"{re.escape(name)}\b.*{place}|{'no format knows' if at_first else place}"
            yield Case(f"{what}, row {at + 1} of {name}", _file(name, content), pattern)


def json_cut_cases() -> Iterator[Case]:
    """Files of JSON cut off anywhere."""
    listing = json.dumps(ROWS, indent=1).encode()
    for end in range(1, len(listing), 9):
        yield Case(f"list cut at {end}", _raw("t.json", listing[:end]), r"t\.json")
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    for end in range(1, len(lines), 11):
        cut = lines[:end]
        whole = cut.count(b"}")
        is_whole = cut.endswith((b"}", b"}\n"))
        yield Case(
            f"lines cut at {end}",
            _raw("t.jsonl", cut),
            "" if is_whole else rf"t\.jsonl, line {whole + 1}",
            rows=whole if is_whole else -1,
        )
    wrapped = json.dumps({"version": 2, "data": ROWS, "end": True}).encode()
    for end in range(1, len(wrapped), 23):
        yield Case(f"object cut at {end}", _raw("t.json", wrapped[:end]), r"t\.json")


def json_taken_cases() -> Iterator[Case]:
    """JSON that looks odd and is right."""
    text = json.dumps(ROWS)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    deep = _HALF + '"a", "x": ' + "[" * 99 + "]" * 99 + "}"
    for name, content in {
        "t.json": text,
        "mark.json": "\ufeff" + text,
        "wrapped.json": json.dumps({"v": 1, "rows": ROWS, "n": None}),
        "blank.json": "\n\n \t" + text + "\n\n",
        "lines.json": lines,
        "blank.jsonl": "\n" + lines.replace("\n", "\n\n"),
        "cr.jsonl": lines.replace("\n", "\r\n"),
        "end.jsonl": lines.rstrip("\n"),
        "mark.jsonl": "\ufeff" + lines,
    }.items():
        yield Case(name, _file(name, content.encode()), rows=5)
        yield Case(name + ".gz", _file(name + ".gz", content.encode()), rows=5)
    for what, row in {
        "nested 100": deep,
        "a pair": _HALF + '"\\ud83d\\ude00"}',
        "brackets in a text": _HALF + '"' + "[{" * 2000 + '"}',
        "a key within a text": _HALF + '"\\"output\\": 1, \\"output\\": 2"}',
        "4,300 digits": _HALF + '"a", "x": ' + "9" * 4300 + "}",
        "a small float": _HALF + '"a", "x": 1e-999}',
        "escaped backslash": _HALF + '"\\\\ud83d"}',
        "the same key in two objects": _HALF + '"a", "x": [{"k": 1}, {"k": 1}]}',
    }.items():
        yield Case(what, _file("t.jsonl", row.encode() + b"\n"), rows=1)
        yield Case(f"{what}, in a list", _file("t.json", f"[{row}]".encode()), rows=1)


# --- CSV ------------------------------------------------------------------------------------------


def csv_cases() -> Iterator[Case]:
    """Separated files that are broken, cut, of another kind, or right and odd."""
    head = "instruction,output\n"
    table: dict[str, tuple[str | bytes, str]] = {
        "short row": (head + "a,b\nc\n", r"line 3: got 1 cells"),
        "long row": (head + "a,b\nc,d,e\n", r"line 3: got 3 cells"),
        "open quote": (head + 'a,b\n"c,d\n', r"line 3: not a valid row"),
        "open quote early": (head + '"c,d\n' + "a,b\n" * 1000, r"line 2: not a valid row"),
        "quote after a quote": (head + '"a"x,b\n', r"line 2: not a valid row"),
        "equal columns": ("instruction,output,output\na,b,c\n", r"line 1: the column output is na"),
        "equal empty columns": ("output,,\na,b,c\n", r"line 1: the column '' is named twice"),
        "semicolons": ("instruction;output\na;b\n", r"line 1: .*semicolons seem to separate"),
        "tabs": ("instruction\toutput\na\tb\n", r"line 1: .*tabs seem .*name a file with tabs"),
        "bars": ("instruction|output\na|b\n", r"line 1: .*bars seem to separate"),
        "header only": (head, r"t\.csv holds no rows"),
        "header only, no line end": (head.strip(), r"t\.csv holds no rows"),
        "no header": ("a,b\nc,d\n", r"t\.csv: no format knows rows with the fields a, b"),
        "NUL": (head + "a,b\0c\n", r"line 2: holds the character NUL"),
        "UTF-16": ((head + "a,b\n").encode("utf-16"), r"byte 0 .*it looks like UTF-16"),
        "UTF-16 without mark": ((head + "a,b\n").encode("utf-16-le"), r"line 1: holds the cha"),
        "latin-1": ((head + "\xe4,b\n").encode("latin-1"), r"byte 19 \(0xe4\): not UTF-8"),
        "gzip by content": (gzip.compress(b"a"), r"it looks like gzip"),
        "Excel": (b"PK\x03\x04\xff\xff\xff", r"it looks like a zip or Excel"),
        "parquet by content": (b"PAR1\xff\xff", r"it looks like parquet"),
        "no line end": (head + "a,b", r"line 2: the file ends within its last row"),
        "no line end, empty cell": (head + "a,", r"line 2: the file ends within its last row"),
        "blank": ("\n\n\n", r"t\.csv holds no rows"),
        "empty": ("", r"t\.csv(: the file is empty| holds no rows)"),
        "JSON": ('[{"instruction": "a", "output": "b"}]\n', r"t\.csv"),
        "empty cell": (head + ",b\n", r"row 1: field 'instruction': got blank text"),
        "a thousand columns": (",".join(map(str, range(1000))) + "\n1,2\n", r"line 2: got 2 cells"),
    }
    for what, (content, pattern) in table.items():
        data = content if isinstance(content, bytes) else content.encode()
        yield Case(what, _file("t.csv", data), pattern)
        packed = pattern.replace(r"t\.csv", r"t\.csv\.gz")
        yield Case(f"{what}, packed", _file("t.csv.gz", data), packed)
    for what, content in {
        "mark": "\ufeff" + head + "a,b\n",
        "CR only": "instruction,output\ra,b\r",
        "CR and LF": "instruction,output\r\na,b\r\n",
        "quoted lines": head + '"a\nb","c ""d"" e"\n',
        "quoted end": head + 'a,"b"',
        "blank lines": head + "\n\na,b\n\n",
        "large cell": head + "a," + "x" * 1_000_000 + "\n",
        "a column without a name": ",instruction,output\n0,a,b\n",
        "other columns": "id,instruction,output,note\n1,a,b,c\n",
    }.items():
        yield Case(what, _file("t.csv", content.encode()), rows=1)
        if "," in content and '"' not in content:
            yield Case(f"{what}, tabs", _file("t.tsv", content.replace(",", "\t").encode()), rows=1)
    yield Case("commas in .tsv", _file("t.tsv", b"instruction,output\na,b\n"), r"line 1: .*commas")
    whole = "instruction,output\n" + "".join(f"ask {n},answer {n}\n" for n in range(8))
    for end in range(1, len(whole)):
        cut = whole[:end]
        rows = cut.count("\n") - 1
        if cut.endswith("\n") and rows > 0:
            yield Case(f"cut at the end of row {rows}", _raw("t.csv", cut.encode()), rows=rows)
        else:
            yield Case(f"cut at {end}", _raw("t.csv", cut.encode()), r"t\.csv")


# --- gzip, parquet, arrow -------------------------------------------------------------------------


def gzip_cases() -> Iterator[Case]:
    """Packed files: cut, changed, with something behind them, and of several members."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS * 20).encode()
    packed = gzip.compress(lines, mtime=0)
    for end in range(0, len(packed), 9):
        yield Case(f"cut at {end}", _raw("t.jsonl.gz", packed[:end]), r"t\.jsonl\.gz")
    for at in range(10, len(packed), 7):
        harmed = packed[:at] + bytes([packed[at] ^ 0x55]) + packed[at + 1 :]
        yield Case(f"changed at {at}", _raw("t.jsonl.gz", harmed), r"t\.jsonl\.gz")
    yield Case("several members", _raw("t.jsonl.gz", packed * 3), rows=300)
    yield Case("zeros behind", _raw("t.jsonl.gz", packed + bytes(512)), rows=100)
    yield Case("garbage behind", _raw("t.jsonl.gz", packed + b"garbage"), r"not a whole gzip file")
    yield Case("no gzip", _raw("t.jsonl.gz", lines), r"not a whole gzip file")
    yield Case("packed twice", _raw("t.jsonl.gz", gzip.compress(packed)), r"not UTF-8.*gzip")
    for name in ("t.json.gz", "t.csv.gz", "t.parquet.gz", "t.arrow.gz"):
        yield Case(f"half of {name}", _raw(name, packed[: len(packed) // 2]), re.escape(name))
        yield Case(f"nothing in {name}", _file(name, b""), re.escape(name))


def _table(rows: list[dict[str, Any]]) -> Any:
    import pyarrow

    return pyarrow.Table.from_pylist(rows)


def _parquet(table: Any) -> bytes:
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    return bytes(sink.getvalue().to_pybytes())


def _arrow(table: Any, kind: str = "stream") -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    writer = getattr(pyarrow.ipc, f"new_{kind}")(sink, table.schema)
    writer.write_table(table)
    writer.close()
    return bytes(sink.getvalue().to_pybytes())


def arrow_cases() -> Iterator[Case]:
    """Parquet and Arrow files: cut, changed, foreign, and with every type of column."""
    import datetime
    import decimal

    import pyarrow

    table = _table([{"messages": TURNS, "n": n, "s": f"text {n}"} for n in range(50)])
    for suffix, content in (
        ("parquet", _parquet(table)),
        ("arrow", _arrow(table)),
        ("arrow", _arrow(table, "file")),
    ):
        name = f"t.{suffix}"
        yield Case(f"whole {name}", _raw(name, content), rows=50)
        step = max(1, len(content) // 25)
        for end in range(1, len(content), step):
            # a stream's end mark may be missing: what was written so far is there
            yield Case(f"{name} cut at {end}", _raw(name, content[:end]), name, either=end > 900)
        chance = random.Random(0)
        for number in range(60):
            harmed = bytearray(content)
            for _ in range(1 + number % 4):
                harmed[chance.randrange(len(harmed))] = chance.randrange(256)
            yield Case(f"{name} changed {number}", _raw(name, bytes(harmed)), either=True)
        for number in range(10):
            begin = chance.randrange(len(content) - 40)
            zeroed = content[:begin] + bytes(40) + content[begin + 40 :]
            yield Case(f"{name} zeroed {number}", _raw(name, zeroed), either=True)
    for foreign in (
        b"",
        b"PAR1",
        b"PAR1PAR1",
        b"PAR1" + bytes(100) + b"PAR1",
        b"ARROW1",
        b"\xff" * 99,
    ):
        for name in ("t.parquet", "t.arrow"):
            yield Case(f"{foreign[:9]!r} as {name}", _raw(name, foreign), re.escape(name))
    utf8 = pyarrow.array([b"a", b"\xff\xfe"]).view(pyarrow.string())
    fields = {"instruction": utf8, "output": pyarrow.array(["a", "b"])}
    yield Case("bytes as text", _raw("t.parquet", _parquet(pyarrow.table(fields))), r"row 2: field")
    yield Case("bytes as text", _raw("t.arrow", _arrow(pyarrow.table(fields))), r"t\.arrow")
    names = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["output", "output"])
    yield Case("equal columns", _raw("t.arrow", _arrow(names)), r"the column output is there twice")
    yield Case("equal columns", lambda _: names, r"the column output is there twice")
    yield Case(
        "equal columns", _raw("t.parquet", _parquet(names)), r"the column output is there tw"
    )
    twice = pyarrow.struct([("a", pyarrow.int64()), ("a", pyarrow.int64())])
    inner = pyarrow.table({"x": pyarrow.nulls(1, twice), "output": ["a"]})
    yield Case("equal fields", lambda _: inner, r"two of the fields a, a")
    at = datetime.datetime(2024, 1, 2)
    for what, column in {
        "bytes": [b"\xff\x00"],
        "a date": [at.date()],
        "a time": [at],
        "a span": [at - at],
        "a decimal": [decimal.Decimal("1.50")],
        "a list": [[1, None]],
        "NaN": [float("nan")],
        "a map": pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "a dictionary": pyarrow.array(["x"]).dictionary_encode(),
        "large text": pyarrow.array(["x"], pyarrow.large_string()),
        "half a float": pyarrow.array([1.5], pyarrow.float16()),
        "a view": pyarrow.array(["x"], pyarrow.string_view()),
        "JSON": pyarrow.array(['{"a": null}'], pyarrow.json_()),
        "nothing": pyarrow.nulls(1),
    }.items():
        extra = pyarrow.table({"instruction": ["a"], "output": ["b"], "x": column})
        yield Case(f"{what} beside", lambda _, extra=extra: extra, rows=1)
        yield Case(f"{what} beside, in a file", _raw("t.arrow", _arrow(extra)), rows=1)
        if what not in ("a view", "JSON", "half a float"):
            yield Case(f"{what} beside, in parquet", _raw("t.parquet", _parquet(extra)), rows=1)
        wrong = pyarrow.table({"instruction": ["a"], "output": column})
        if what not in ("a dictionary", "large text", "a view", "a date", "a time", "a span"):
            yield Case(f"{what} as output", lambda _, wrong=wrong: wrong, r"row 1: field 'output'")
    broken = pyarrow.array(["{"]).cast(pyarrow.json_())
    wrong = pyarrow.table({"instruction": ["a"], "output": broken})
    yield Case("broken JSON", lambda _: wrong, r"row 1: field 'output': cannot be read: not valid")


# --- objects --------------------------------------------------------------------------------------


class _Raises:
    """An object that fails at whatever is asked of it."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __iter__(self) -> Iterator[Any]:
        yield {"instruction": "a", "output": "b"}
        raise self.error("inside")


def object_cases() -> Iterator[Case]:
    """Objects of this process: of no kind, broken, and of other libraries."""
    import datasets
    import numpy
    import pandas

    good = {"instruction": "a", "output": "b"}
    cyclic: dict[str, Any] = dict(good)
    cyclic["x"] = cyclic
    loop: list[Any] = []
    loop.append(loop)
    wide: list[Any] = ["x"]
    for _ in range(60):
        wide = [wide, wide]
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    for what, value, problem in (
        ("itself", cyclic, r"row 2: field 'x.*nested more than 100 deep"),
        ("a list of itself", {**good, "x": loop}, r"row 2: field 'x.*nested more than 100 deep"),
        ("a tree that multiplies", {**good, "x": wide}, r"row 2: longer than"),
        ("5,000 levels", {**good, "x": deep}, r"row 2: field 'x.*nested more than 100 deep"),
        ("a number of 5,000 digits", {**good, "x": 10**5000}, r"row 2: field 'x': a whole number"),
        ("such an output", {**good, "output": 10**5000}, r"row 2: field 'output': a whole number"),
        ("a large number", {**good, "output": 10**4000}, r"row 2: field 'output': got a number"),
        (
            "half a character",
            {**good, "output": "\ud800"},
            r"row 2: field 'output': .*half of a ch",
        ),
        ("such a key", {**good, "\ud800": 1}, r"row 2: field '.*half of a character"),
        ("an object", {**good, "x": object()}, r"row 2: field 'x': got a object; expected text"),
        ("a function", {**good, "x": [print]}, r"row 2: field 'x\[0\]': got a builtin"),
        ("a class", {**good, "x": {"y": int}}, r"row 2: field 'x\.y': got a type"),
        (
            "a number as key",
            {**good, 1: 2},
            r"row 2: field '': a field is named by a number \(1\)|"
            r"row 2: .*named by a number",
        ),
        ("null as key", {**good, None: 2}, r"row 2: .*a field is named by null"),
        ("a complex number", {**good, "x": 1j}, r"row 2: field 'x': got a complex"),
        ("5 MB of text", {**good, "x": "x" * 5_000_000}, r"row 2: longer than 4,194,304"),
        ("many values", {**good, "x": [0] * 2_000_000}, r"row 2: longer than 4,194,304"),
        ("an array of many", {**good, "x": numpy.zeros(2_000_000)}, r"row 2: longer than"),
        ("null", None, r"row 2: got null; expected a mapping"),
        ("a number", 3, r"row 2: got a number \(3\); expected a mapping"),
        ("a number of 5,000 digits alone", 10**5000, r"row 2: got a number \(\d+ bits\); expected"),
        ("a text", "x", r"row 2: got the text 'x' among other things"),
        ("bytes", b"x", r"row 2: got a bytes; expected a mapping"),
        ("a list", ["a", "b"], r"row 2: got a list of 2; expected a mapping"),
        ("NaN as output", {**good, "output": float("nan")}, r"row 2: field 'output': got a number"),
        (
            "an array as output",
            {**good, "output": numpy.zeros(2)},
            r"row 2: field 'output': got a l",
        ),
        ("bytes as output", {**good, "output": b"\xff"}, r"row 2: field 'output'"),
    ):
        yield Case(f"{what} in a list", lambda _, value=value: [good, value], problem)
        yield Case(f"{what} in a tuple", lambda _, value=value: (good, value), problem)
        if isinstance(value, dict) and 1 not in value and None not in value:
            fields = {**good, **{k: v for k, v in value.items() if v is not cyclic}}
            if "x" in fields or value["output"] is not good["output"]:
                frame = pandas.DataFrame(
                    {k: pandas.Series([good.get(k), v], dtype=object) for k, v in fields.items()}
                )
                if what != "NaN as output":
                    yield Case(f"{what} in a frame", lambda _, frame=frame: frame, problem)
    for value in (
        None,
        3,
        10**5000,
        1.5,
        True,
        b"x",
        bytearray(b"x"),
        object(),
        int,
        print,
        good,
        {},
    ):
        yield Case(f"a {type(value).__name__} as data", lambda _, value=value: value, r"^got ")
    for value in ([], (), [[]], [None], iter([good]), (row for row in [good]), "", [""], ["", ""]):
        yield Case(f"{value!r:.20} as data", lambda _, value=value: value, r".")
    for error in (
        ValueError,
        KeyError,
        RuntimeError,
        OSError,
        RecursionError,
        UnicodeError,
        OverflowError,
        ZeroDivisionError,
        StopAsyncIteration,
        AssertionError,
    ):
        yield Case(
            f"an iterable that raises {error.__name__}",
            lambda _, error=error: _Raises(error),
            rf"row 2: cannot be read: {error.__name__}",
        )
    for what, value in {
        "numpy text": {**good, "output": numpy.str_("b")},
        "numpy numbers": {
            **good,
            "x": numpy.float32(1.5),
            "y": numpy.int64(3),
            "z": numpy.bool_(1),
        },
        "arrays": {"messages": numpy.array(TURNS, dtype=object)},
        "arrays of arrays": {**good, "history": numpy.array([["a", "b"]])},
        "missing": {**good, "input": pandas.NA, "x": pandas.NaT, "y": pandas.Timestamp(0)},
        "a tuple": {"messages": tuple(TURNS)},
        "a set": {**good, "x": {"b", "a"}},
        "a path": {**good, "x": Path("a")},
        "bytes beside": {**good, "x": b"\xff"},
        "a date": {**good, "x": numpy.datetime64("2024-01-01")},
        "an ordered mapping": pandas.Series(good),
    }.items():
        if what == "an ordered mapping":
            yield Case(what, lambda _, value=value: [value], r"row 1: got a Series")
            continue
        yield Case(f"{what} in a list", lambda _, value=value: [value], rows=1)
        frame = pandas.DataFrame({k: pandas.Series([v], dtype=object) for k, v in value.items()})
        yield Case(f"{what} in a frame", lambda _, frame=frame: frame, rows=1)
    frame = pandas.DataFrame([["a", "b", "c"]], columns=["instruction", "output", "output"])
    yield Case("equal columns in a frame", lambda _: frame, r"the column output twice")
    numbered = pandas.DataFrame([["a", "b"]])
    yield Case(
        "numbers as columns", lambda _: numbered, r"no format knows rows with the fields 0, 1"
    )
    layered = pandas.DataFrame([["a"]], columns=pandas.MultiIndex.from_tuples([("a", "b")]))
    yield Case("layered columns", lambda _: layered, r"no format knows")
    nothing = pandas.DataFrame({"instruction": []})
    yield Case("an empty frame", lambda _: nothing, r"holds no rows")
    yield Case("a series", lambda _: pandas.Series([1, 2]), r"row 1: ")
    rows = datasets.Dataset.from_list([{"messages": TURNS}] * 3)
    for kind in ("numpy", "pandas", "arrow", "python"):
        yield Case(f"a data set as {kind}", lambda _, k=kind: rows.with_format(k), rows=3)
    yield Case("a dict", lambda _: datasets.DatasetDict({"train": rows}), rows=3)
    yield Case("a dict of one", lambda _: datasets.DatasetDict({"x": rows}), rows=3)
    two = datasets.DatasetDict({"x": rows, "y": rows})
    yield Case("a dict of two", lambda _: two, r"splits x, y; expected one with a 'train' split")
    yield Case("a dict of none", lambda _: datasets.DatasetDict(), r"got a DatasetDict")
    stream = rows.to_iterable_dataset()
    yield Case("a stream", lambda _: stream, rows=3)
    failing = stream.map(lambda row: row["nothing"])
    yield Case("a stream that fails", lambda _: failing, r"row 1: cannot be read: KeyError")


# --- tool calls and turns -------------------------------------------------------------------------


def turn_cases() -> Iterator[Case]:
    """Garbage where turns, tools and calls are meant, as text and as values."""
    deep = "[" * 5000 + "]" * 5000
    garbage: list[Any] = [
        None, 3, 1.5, True, "", "x", "{", "[", "null", "[null]", "{}", "[]", [], {}, [None], [3],
        [[]], [{}], [{"function": 3}], [{"function": {}}], [{"function": {"name": 3}}],
        [{"function": {"name": "f", "arguments": "{"}}], [{"name": "f", "arguments": 3}],
        [{"function": {"name": "f", "arguments": [1]}}], [{"function": None}], {"a": {"b": [1]}},
        '{"name": "f", "arguments": ' + deep + "}", "[" * 100_000, "9" * 5000, '[{"name": 3}]',
        '{"name": "f", "name": "g"}', '{"name": "f", "arguments": {"x": NaN}}', "\\ud800",
        '{"name": "f", "arguments": "' + "[" * 3000 + '"}',
        '"\\ud800"', '[{"name": "f", "arguments": "\\"{\\""}]',
    ]  # fmt: skip
    for number, value in enumerate(garbage):
        for field, row in {
            "tool_calls": {"messages": [TURNS[0], {**TURNS[1], "tool_calls": value}]},
            "tools": {"messages": TURNS, "tools": value},
            "messages": {"messages": value},
            "a turn": {"messages": [TURNS[0], value]},
            "content": {"messages": [TURNS[0], {"role": "assistant", "content": value}]},
            "role": {"messages": [TURNS[0], {"role": value, "content": "x"}]},
            "function_call": {"conversations": [
                {"from": "human", "value": "a"}, {"from": "function_call", "value": value}]},
            "from": {"conversations": [{"from": value, "value": "a"}]},
            "chosen": {"prompt": "a", "chosen": value, "rejected": "b"},
            "prompt": {"prompt": value, "chosen": "a", "rejected": "b"},
            "history": {"instruction": "a", "output": "b", "history": value},
            "system": {"instruction": "a", "output": "b", "system": value},
        }.items():  # fmt: skip
            lines = (json.dumps(row) + "\n").encode()
            yield Case(
                f"{field} is garbage {number}", _raw("t.jsonl", lines), r"t\.jsonl", either=True
            )


# --- paths and hub ids ----------------------------------------------------------------------------


def path_cases() -> Iterator[Case]:
    """Paths to what is no file of rows, and ids of data sets that cannot be reached."""

    def fifo(directory: Path, name: str = "t.jsonl") -> Path:
        os.mkfifo(directory / name)
        return directory / name

    def link(directory: Path, name: str, to: str) -> Path:
        (directory / name).symlink_to(to)
        return directory / name

    def directory_of(**files: bytes) -> Callable[[Path], Path]:
        def make(directory: Path) -> Path:
            for name, content in files.items():
                (directory / name.replace("__", ".")).write_bytes(content)
            return directory

        return make

    good = (_GOOD + "\n").encode()
    yield Case("a pipe", fifo, r"t\.jsonl: is a pipe and no regular file")
    yield Case("a pipe in a directory", lambda d: fifo(d).parent, r"t\.jsonl: is a pipe")
    yield Case("a pipe in a list", lambda d: [fifo(d)], r"t\.jsonl: is a pipe")
    for device in ("/dev/zero", "/dev/null", "/dev/random"):
        yield Case(device, lambda d, device=device: device, r"^/dev/")
        yield Case(
            f"a link to {device}", lambda d, to=device: link(d, "t.jsonl", to), r"is a device"
        )
    yield Case("a link to nothing", lambda d: link(d, "t.jsonl", "gone"), r"t\.jsonl: no such file")
    yield Case(
        "such a link in a directory", lambda d: link(d, "t.jsonl", "gone").parent, r"no such"
    )
    yield Case(
        "a link to itself", lambda d: link(d, "t.jsonl", "t.jsonl"), r"t\.jsonl: cannot be r"
    )
    yield Case("an empty directory", lambda d: d, r"a directory without any data file")
    yield Case(
        "a directory of text", directory_of(a__txt=b"x"), r"a directory without any data file"
    )
    yield Case(
        "a directory with a broken file", directory_of(a__jsonl=good, b__jsonl=b"{"), r"b\.js"
    )
    yield Case(
        "a directory with an empty file", directory_of(a__jsonl=good, b__csv=b""), r"b\.csv: t"
    )
    yield Case(
        "a saved data set cut short",
        directory_of(state__json=b"{", dataset_info__json=b"{}"),
        r"state\.json: not what save_to_disk writes",
    )
    for state in (
        b"{}",
        b"[]",
        b"3",
        b'{"_data_files": 3}',
        b'{"_data_files": [{"filename": "../x"}]}',
        b'{"_data_files": [{"filename": "gone.arrow"}]}',
        b'{"_data_files": []}',
        b"\xff",
        b"[" * 5000,
    ):
        yield Case(
            f"a saved data set with {state[:40]!r}",
            directory_of(state__json=state, dataset_info__json=b"{}"),
            r"arrow|state|any data",
        )
        yield Case(
            f"a saved dict with {state[:40]!r}",
            directory_of(dataset_dict__json=state),
            r"dataset_dict\.json: not what save_to_disk writes",
        )
    yield Case(
        "a saved dict without a split",
        directory_of(dataset_dict__json=b'{"splits": []}'),
        r"a saved DatasetDict with no split",
    )
    for path in (
        "gone.jsonl",
        "a\0b.jsonl",
        "x" * 300 + ".jsonl",
        "x/" * 3000 + "t.jsonl",
        "\udcff.jsonl",
        "~nobody-at-all/t.jsonl",
        "~/gone/t.jsonl",
        "t",
        "t.txt",
        ".",
        "..",
        "/",
        "//",
        " ",
        "\n",
        "*.jsonl",
        "x" * 1_000_000,
        '{"a": 1}',
        "\ud800/x.csv",
        "file:///t.jsonl",
        "https://x/t.jsonl",
        "s3://x/t.jsonl",
        "a/b/c/d",
        "nothing",
    ):
        yield Case(f"the path {path[:20]!r}", lambda d, path=path: path, r".")
        yield Case(f"the path {path[:20]!r} in a list", lambda d, path=path: [path], r".")
    for name in (
        "owner/name",
        "owner/name:",
        "owner/name:x",
        "owner/name:train[",
        "owner/name:../x",
        "owner/name:train[:1e9]",
        "o/n:" + "x" * 5000,
        "owner/name-_.",
        "0/0",
        "ö/ü",
        "a/b:c:d",
    ):
        yield Case(
            f"the id {name[:20]}",
            lambda d, name=name: name,
            r"is no file or dir|no such|name too long",
        )
    yield Case("a file of another kind", _raw("t.xlsx", b"x"), r"ends in '\.xlsx'; expected")
    yield Case("a path that is an object", lambda d: Path(_raw("t.jsonl", good)(d)), rows=1)
    yield Case(
        "several paths", lambda d: [_raw("a.jsonl", good)(d), _raw("b.jsonl", good)(d)], rows=2
    )


# --- large ----------------------------------------------------------------------------------------


def large_cases() -> Iterator[Case]:
    """What costs memory or time: rows of 50 MB, bombs, files of nothing."""
    large = b"x" * 50_000_000
    limit = r"4,194,304"
    row = _HALF.encode() + b'"' + large + b'"}'
    yield Case("a row of 50 MB", _raw("t.jsonl", row), rf"line 1: longer than {limit}")
    yield Case(
        "a row of 50 MB, last", _raw("t.jsonl", _GOOD.encode() + b"\n" + row), r"line 2: lon"
    )
    yield Case(
        "such a row in a list", _raw("t.json", b"[" + row + b"]"), rf"row 1: longer than {limit}"
    )
    yield Case(
        "such a row in an object", _raw("t.json", b'{"d": [' + row + b"]}"), r"row 1: longer"
    )
    yield Case("such a row alone", _raw("t.json", row), r"t\.json.*longer than")
    yield Case("a cell of 50 MB", _raw("t.csv", b"instruction,output\na," + large + b"\n"), limit)
    yield Case(
        "a cell of many lines",
        _raw("t.csv", b'instruction,output\na,"' + b"x\n" * 5_000_000 + b'"\n'),
        limit,
    )
    yield Case("a header of 50 MB", _raw("t.csv", large), limit)
    big = [{"instruction": "a", "output": "x" * 50_000_000}]
    yield Case(
        "a row of 50 MB in parquet",
        lambda d: _raw("t.parquet", _parquet(_table(big)))(d),
        r"row 1: 50,0\d\d,\d\d\d bytes; a row may have 4,194,304",
    )
    yield Case("in arrow", lambda d: _raw("t.arrow", _arrow(_table(big)))(d), r"row 1: 50,0")
    yield Case("in a list", lambda d: big, rf"row 1: longer than {limit}")
    yield Case(
        "lists by the million", _raw("t.jsonl", b'{"x": [' + b"[]," * 16_000_000 + b"[]]}"), limit
    )
    yield Case("one open list", _raw("t.json", b"[" * 20_000_000), r"nested more than 100 deep")
    yield Case("one open text", _raw("t.json", b'["' + large), r"t\.json")
    yield Case("blanks", _raw("t.json", b" " * 50_000_000), r"t\.json")
    yield Case("blank lines", _raw("t.json", b"\n" * 5_000_000), r"line 100001: 100,000 blank")
    yield Case("few blank lines", _raw("t.json", b"\n" * 99_000), r"the file is empty")
    yield Case("2,000,000 columns", _raw("t.csv", b"a," * 2_000_000 + b"b\n"), r"t\.csv")
    member = {
        "nothing": bytes(1 << 24),
        "one row": (b"x" * 999 + b"\n") * 16_000,
        "equal rows": (_GOOD.encode() + b"\n") * 300_000,
        "blank lines": b"\n" * (1 << 24),
    }
    for (what, content), name in itertools.product(
        member.items(), ("t.jsonl.gz", "t.json.gz", "t.csv.gz", "t.parquet.gz", "t.arrow.gz")
    ):
        packed = gzip.compress(content, 9) * 64  # a gigabyte, from a megabyte
        yield Case(f"a bomb of {what} in {name}", _raw(name, packed), re.escape(name))

    def sparse(directory: Path, name: str) -> Path:
        with (directory / name).open("wb") as stream:
            stream.truncate(1_000_000_000)
        return directory / name

    for name in ("t.json", "t.jsonl", "t.csv", "t.tsv", "t.parquet", "t.arrow"):
        yield Case(
            f"a gigabyte of nothing in {name}",
            lambda d, name=name: sparse(d, name),
            re.escape(name),
        )
    import pyarrow

    same = pyarrow.table({"output": pyarrow.nulls(100_000_000)})
    yield Case(
        "a parquet file of 100 million rows of nothing",
        lambda d: _raw("t.parquet", _parquet(same))(d),
        r"t\.parquet: holds 100,000,000 rows",
    )


# --- recipes --------------------------------------------------------------------------------------

_RECIPE = """\
tunesmith: 1
model: org/model
steps:
  - peft: lora
    r: 16
  - train: sft
    data: [a.json, "b.json"]
    learning_rate: 2.0e-4
"""


def recipe_cases() -> Iterator[Case]:
    """Recipes cut off, changed, in other encodings, and beyond bounds."""
    for end in range(0, len(_RECIPE), 5):
        yield Case(f"cut at {end}", _raw("r.yaml", _RECIPE[:end].encode()), either=True)
    chance = random.Random(1)
    for number in range(120):
        text = bytearray(_RECIPE.encode())
        for _ in range(1 + number % 5):
            text[chance.randrange(len(text))] = chance.choice(
                b"{}[]:,&*!|>'\"%@`#-\t\n\0 \xff\x85a9.~"
            )
        yield Case(f"changed {number}", _raw("r.yaml", bytes(text)), either=True)
    body = json.dumps({"model": "m", "steps": [{"peft": "lora", "r": 16}]})
    for end in range(0, len(body), 3):
        yield Case(f"JSON cut at {end}", _raw("r.json", body[:end].encode()), r"r\.json")
    for code in ("utf-16", "utf-16-le", "utf-32", "utf-7"):
        yield Case(
            code, _raw("r.yaml", _RECIPE.encode(code)), either=code == "utf-7", refused=r"r\.y"
        )
    for number in range(20):
        yield Case(f"noise {number}", _raw("r.yaml", chance.randbytes(200)), r"r\.yaml")
    for text in (
        "&a [*a]",
        "a: &a {b: *a}",
        "*a",
        "<<: 3",
        "<<: [1]",
        "!!python/name:os.system x",
        "!!int x",
        "!!float x",
        "!!timestamp x",
        "!!binary x",
        "!!omap x",
        "!!pairs 3",
        "!!set 3",
        "? [a]",
        "? {a: b}\n: c",
        "- - - -",
        "--- a\n--- b",
        "%YAML 9.9\n---\na",
        "a: 2024-99-99",
        "a: 99:99:99",
        "a: 0x",
        "a: 0b2",
        "a: 1" + "0" * 5000,
        "a: .nan",
        "model: m\nseed: .inf",
        "model: m\nseed: 1e400",
        "model: m\nsteps: {a: b}",
        "model: [m]",
        "model: m\nsteps: [[[]]]",
        "model: m\nsteps: [{train: {a: b}}]",
        "model: m\nsteps: [{train: ../x}]",
        "model: m\nsteps: [{train: a/b}]",
    ):
        yield Case(f"{text[:20]!r}", _raw("r.yaml", (text + "\n").encode()), r"r\.yaml")


KINDS: dict[str, Callable[[], Iterator[Case]]] = {
    "json": json_cases,
    "json cut": json_cut_cases,
    "json taken": json_taken_cases,
    "csv": csv_cases,
    "gzip": gzip_cases,
    "arrow": arrow_cases,
    "objects": object_cases,
    "turns": turn_cases,
    "paths": path_cases,
    "large": large_cases,
    "recipes": recipe_cases,
}


def tried(case: Case, kind: str) -> dict[str, Any]:
    """Try one case; return what came of it and whether that is right."""
    from tunesmith.engine.dataset import load_data
    from tunesmith.errors import TunesmithError
    from tunesmith.plugin.registry import registry
    from tunesmith.recipe import Recipe

    with tempfile.TemporaryDirectory() as directory:
        data = case.make(Path(directory))
        before = _peak()
        begin, worked = time.monotonic(), time.process_time()
        try:
            if kind == "recipes":
                Recipe.from_yaml(data)
                rows = -1
            else:
                rows = len(load_data(data, None, registry()).examples)
            came = "taken"
            message = f"{rows} rows"
            right = case.either or (not case.refused and case.rows in (-1, rows))
        except TunesmithError as error:
            message = str(error)
            came = "refused"
            try:
                message.encode()
                right = case.either or bool(case.refused and re.search(case.refused, message, re.S))
                right = right and 0 < len(message) < 4000
            except UnicodeEncodeError:
                right = False
        except BaseException as error:
            message = f"{type(error).__name__}: {error!s:.300}"
            came = "raw"
            right = False
    seconds, worked = time.monotonic() - begin, time.process_time() - worked
    return {
        "case": case.name,
        "came": came,
        "right": right and worked < 20 and seconds < 120,
        "message": message[:600].encode("utf-8", "backslashreplace").decode(),
        "seconds": round(seconds, 2),
        "grown": _peak() - before,
    }


def _peak() -> int:
    """Return the most memory this process has had, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says begins with the memory of whoever started the process
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(kind: str, step: int = 1) -> None:
    """Try every `step`-th case of a kind and print what came of each."""
    import warnings

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(tempfile.gettempdir())
    warnings.simplefilter("ignore")
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    for case in itertools.islice(KINDS[kind](), 0, None, step):
        print(json.dumps({"begun": case.name}), flush=True)
        print(json.dumps(tried(case, kind)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
