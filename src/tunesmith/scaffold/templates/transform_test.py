"""The transform passes tunesmith's kit, and leaves out what is too long."""

from tunesmith_newname import NewName, NewNameConfig

from tunesmith.data.examples import Sourced
from tunesmith.testing import tiny_examples
from tunesmith.testing.conformance import TransformConformance


class TestNewName(TransformConformance):
    """Every row is returned or dropped."""

    plugin = "tunesmith_newname"
    name = "newname"
    options = {"characters": 30}


def test_a_row_that_is_too_long_is_dropped_with_a_reason():
    """The others go on as they are."""
    rows = [Sourced(example, f"row {n}") for n, example in enumerate(tiny_examples("conversation"))]
    dropped = []
    made = NewName(NewNameConfig(characters=25)).apply(
        rows, seed=0, drop=lambda where, reason: dropped.append((where, reason))
    )
    assert [row.where for row in made.rows] == ["row 1"]
    assert [where for where, _ in dropped] == ["row 0", "row 2", "row 3"]
    assert dropped[0][1] == "longer than 25 characters"
