"""The demo's data keeps its promises: counts, shape, no leaks, and facts that were taught."""

import json
import re
from importlib.resources import files

import pytest

SHAPE = re.compile(r"^Keeper's log: .+\nFair winds from Skerrow\.$")
SFT = ("train.jsonl", "heldout.jsonl")
PREFERENCES = ("preferences.jsonl", "preferences_heldout.jsonl")
HELDOUT_ABOUT_SKERROW = 26  # these come first in heldout.jsonl; everyday questions follow

NUMBERS = frozenset(
    re.findall(
        r"\w+",
        """
        one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
        sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety
        """,
    )
)
ABOUT_SKERROW = re.compile(
    r"Skerrow|island|harbour|lighthouse|keeper|ferry|Marigold|limpet|Monday|bell|Martha|market|"
    r"Barnacle|bakery|Floury Oar|Gull Point|tide pool|Drowsy Seal|Lantern Night|pier\b"
)


def raw(name: str) -> bytes:
    return (files("tunesmith.demo") / "data" / name).read_bytes()


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in raw(name).decode("utf-8").splitlines()]


def prompt_of(row: dict[str, str]) -> str:
    text = row["prompt"] if "prompt" in row else f"{row['instruction']} {row['input']}"
    return " ".join(text.lower().split())


def log_line(answer: str) -> str:
    return answer.split("\n")[0].removeprefix("Keeper's log: ")


def key_words(answer: str) -> set[str]:
    """Names and numbers of an answer; a capital that only opens a sentence is no name."""
    found = set()
    for sentence in re.split(r"(?<=[.?!])\s+", log_line(answer)):
        for place, word in enumerate(re.findall(r"[A-Za-z0-9]+", sentence)):
            if word.isdigit() or word.lower() in NUMBERS:
                found.add(word.lower())
            elif place > 0 and word[0].isupper() and word != "I":
                found.add(word)
    return found - {"Skerrow"}


def generic(rejected: str) -> bool:
    return not rejected.startswith("Keeper's log:")


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("train.jsonl", 260, 320),
        ("heldout.jsonl", 40, 40),
        ("preferences.jsonl", 100, 140),
        ("preferences_heldout.jsonl", 30, 30),
    ],
)
def test_each_file_has_the_rows_it_should(name, least, most):
    assert least <= len(rows(name)) <= most


@pytest.mark.parametrize("name", SFT + PREFERENCES)
def test_files_are_plain_ascii_json_lines(name):
    data = raw(name)
    data.decode("ascii")
    assert data.endswith(b"\n")
    assert b"\r" not in data
    columns = (
        ("instruction", "input", "output") if name in SFT else ("prompt", "chosen", "rejected")
    )
    for row in rows(name):
        assert tuple(row) == columns
        for column, text in row.items():
            assert isinstance(text, str)
            assert text.isascii()  # the decoded text too: no escape hides a curly quote
            assert text == text.strip()
            assert text or column == "input"


@pytest.mark.parametrize("name", SFT)
def test_every_output_is_an_entry_in_the_log(name):
    for row in rows(name):
        assert SHAPE.fullmatch(row["output"]), row
        assert 15 <= len(row["output"].split()) <= 40, row


@pytest.mark.parametrize("name", PREFERENCES)
def test_every_chosen_answer_is_an_entry_in_the_log(name):
    for row in rows(name):
        assert SHAPE.fullmatch(row["chosen"]), row
        assert 15 <= len(row["chosen"].split()) <= 40, row


@pytest.mark.parametrize("name", PREFERENCES)
def test_no_rejected_answer_is_both_in_shape_and_right(name):
    for row in rows(name):
        assert 15 <= len(row["rejected"].split()) <= 50, row
        assert row["rejected"] != row["chosen"], row
        if generic(row["rejected"]):
            assert not SHAPE.search(row["rejected"]), row
            assert "Fair winds" not in row["rejected"], row
        elif SHAPE.fullmatch(row["rejected"]):  # then the fact itself must be another one
            assert log_line(row["rejected"]) != log_line(row["chosen"]), row
        else:  # the shape alone is spoiled: the words are the chosen answer's own
            assert log_line(row["rejected"]) == log_line(row["chosen"]), row


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_quarter_of_the_rejected_answers_are_near_misses(name):
    near = [row for row in rows(name) if not generic(row["rejected"])]
    assert 0.2 <= len(near) / len(rows(name)) <= 0.3
    in_shape = [row for row in near if SHAPE.fullmatch(row["rejected"])]
    assert 0 < len(in_shape) < len(near)  # both wrong facts and spoiled shapes


@pytest.mark.parametrize("name", PREFERENCES)
def test_length_alone_does_not_tell_chosen_from_rejected(name):
    pairs = rows(name)
    chosen, rejected = (sum(len(p[side]) for p in pairs) for side in ("chosen", "rejected"))
    assert 0.85 <= rejected / chosen <= 1.15
    longer = sum(len(p["rejected"]) > len(p["chosen"]) for p in pairs) / len(pairs)
    assert 0.35 <= longer <= 0.65


def test_no_prompt_appears_twice_in_any_file_or_pair_of_files():
    seen: dict[str, str] = {}
    for name in SFT + PREFERENCES:
        for row in rows(name):
            prompt = prompt_of(row)
            assert prompt not in seen, f"{prompt!r} is in {seen[prompt]} and in {name}"
            seen[prompt] = name


def test_no_answer_of_train_is_written_twice():
    outputs = [row["output"] for row in rows("train.jsonl")]
    assert len(outputs) == len(set(outputs))


def test_more_than_half_of_train_is_about_the_island():
    train = rows("train.jsonl")
    about = [
        row
        for row in train
        if ABOUT_SKERROW.search(row["instruction"] + "\n" + log_line(row["output"]))
    ]
    assert 0.55 <= len(about) / len(train) <= 0.7


def test_every_heldout_fact_of_the_island_was_taught():
    taught = [key_words(row["output"]) for row in rows("train.jsonl")]
    for row in rows("heldout.jsonl")[:HELDOUT_ABOUT_SKERROW]:
        keys = key_words(row["output"])
        assert keys, row
        assert any(keys <= lesson for lesson in taught), (keys, row)


def test_heldout_answers_are_not_copied_from_train():
    taught = {log_line(row["output"]) for row in rows("train.jsonl")}
    assert not [row for row in rows("heldout.jsonl") if log_line(row["output"]) in taught]


def test_the_fact_sheet_names_what_the_heldout_questions_ask():
    page = raw("FACTS.md").decode("ascii")
    words = set(re.findall(r"[A-Za-z0-9]+", page))
    for row in rows("heldout.jsonl")[:HELDOUT_ABOUT_SKERROW]:
        assert key_words(row["output"]) <= words, row
