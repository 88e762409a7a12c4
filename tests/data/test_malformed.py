"""Whatever is wrong with data or a recipe is told in our words, at once and within bounds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("malformed.py")
MEMORY = 600_000_000
"""Bytes that reading one input may take, the largest that are refused included."""


def tried(kind: str, step: int) -> list[dict]:
    """Try every `step`-th input of a kind in a process of its own and return what came of each."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), kind, str(step)], capture_output=True, text=True, timeout=900
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    # a process that ended, or was ended, says by its last line what it was at
    assert done.returncode == 0, (lines[-1:], done.stderr[-1000:])
    return [line for line in lines if "came" in line]


def check(outcomes: list[dict], least: int) -> None:
    assert len(outcomes) >= least
    wrong = [outcome for outcome in outcomes if not outcome["right"]]
    assert not wrong, json.dumps(wrong[:5], indent=1)
    assert max(outcome["grown"] for outcome in outcomes) < MEMORY


@pytest.mark.parametrize(
    ("kind", "step", "least"),
    [
        ("json", 7, 60),
        ("json cut", 9, 9),
        ("json taken", 2, 15),
        ("csv", 4, 50),
        ("gzip", 5, 9),
        ("arrow", 9, 35),
        ("objects", 5, 25),
        ("turns", 9, 45),
        ("paths", 3, 30),
        ("recipes", 4, 50),
    ],
)
def test_some_malformed_inputs_of_each_kind_are_told(kind, step, least):
    check(tried(kind, step), least)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "least"),
    [
        ("json", 450),
        ("json cut", 80),
        ("json taken", 30),
        ("csv", 200),
        ("gzip", 45),
        ("arrow", 350),
        ("objects", 130),
        ("turns", 400),
        ("paths", 90),
        ("large", 40),
        ("recipes", 200),
    ],
)
def test_every_malformed_input_is_told(kind, least):
    check(tried(kind, 1), least)
