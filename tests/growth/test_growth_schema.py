"""A package that is installed is in the schema that editors are given."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from tunesmith.cli import main


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"peft": "prompt_tuning", "tokens": 4}, ""),
        ({"peft": "tunesmith-growth:prompt_tuning"}, ""),
        ({"peft": "prompt_tuning", "tokens": 0}, "0 is less than the minimum of 1"),
        ({"peft": "prompt_tuning", "token": 4}, "'token' was unexpected"),
    ],
)
def test_an_installed_packages_plugins_are_in_the_schema(
    step: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    valid = jsonschema.Draft202012Validator(schema)
    found = [error.message for error in valid.iter_errors({"model": "m", "steps": [step]})]
    assert bool(found) == bool(said)
    assert said in "".join(found)
