"""What a Dolly row says to a model."""

from __future__ import annotations

import pytest
from tunesmith_example.dolly import Dolly

from tunesmith.data.examples import Conversation, Message
from tunesmith.errors import RowError
from tunesmith.plugin.options import NoOptions

ROW = {
    "instruction": "Who sang?",
    "context": "The thrush sang.",
    "response": "The thrush.",
    "category": "closed_qa",
}


def test_the_context_stands_below_the_instruction():
    assert Dolly(NoOptions()).convert(ROW) == Conversation(
        (Message("user", "Who sang?\n\nThe thrush sang."), Message("assistant", "The thrush."))
    )


def test_without_context_the_question_is_the_instruction_alone():
    (asked, _) = Dolly(NoOptions()).convert({**ROW, "context": ""}).messages
    assert asked.content == "Who sang?"


def test_an_alpaca_row_is_not_taken_for_dolly():
    row = {"instruction": "Add.", "input": "1 1", "output": "2"}
    assert Dolly(NoOptions()).recognise(row) == 0


def test_a_missing_response_is_named():
    with pytest.raises(RowError, match="field 'response': got nothing; expected text"):
        Dolly(NoOptions()).convert({"instruction": "Who sang?"})
