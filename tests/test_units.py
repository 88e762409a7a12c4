"""Bytes are in binary units, in two to four digits, wherever a person reads them."""

import re
from pathlib import Path

import pytest

from tunesmith.units import byte_size

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (3482, "3.4 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (940 * 2**20, "940 MiB"),
        (2**30 - 1, "1.0 GiB"),
        (1.9e9, "1.8 GiB"),
        (64 * 2**30, "64.0 GiB"),
        (3 * 2**40, "3.0 TiB"),
    ],
)
def test_bytes_are_written_in_the_unit_that_leaves_few_digits(count, text):
    assert byte_size(count) == text


def test_no_message_divides_bytes_by_itself():
    """A second way to write bytes is how one number came to stand in three units."""
    own = re.compile(r"/ 2 ?\*\* ?(10|20|30)|/ 1024\b|/ 1e9|\d+ MB\b|\} (MB|GB)\b")
    found = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for folder in ("src", "plugins/tunesmith_plugins")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if own.search(line.partition("#")[0])
    ]
    assert found == [], "use tunesmith.units.byte_size"
