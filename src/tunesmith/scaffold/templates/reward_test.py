"""The reward passes tunesmith's kit, and counts words."""

import pytest
from tunesmith_newname import NewName, NewNameConfig

from tunesmith.data.examples import Message, Prompt
from tunesmith.errors import DataError
from tunesmith.testing.conformance import RewardConformance

ASKED = (Message("user", "What sings?"),)


class TestNewName(RewardConformance):
    """A finite number for each completion, whatever the others are."""

    plugin = "tunesmith_newname"
    name = "newname"


def test_it_is_one_for_the_right_words_and_half_for_one_of_two_that_are():
    """In any order, in capitals or not."""
    prompts = [Prompt(ASKED, {"answer": "the thrush"})] * 3
    said = ["Thrush the", "the stone", "a stone"]
    assert NewName(NewNameConfig()).score(prompts, said, [[1]] * 3) == [1.0, 0.5, 0.0]


def test_a_column_that_is_not_there_is_named():
    """And what there is."""
    with pytest.raises(DataError, match="no column 'answer'; it has: right"):
        NewName(NewNameConfig()).score([Prompt(ASKED, {"right": "x"})], ["x"], [[1]])
