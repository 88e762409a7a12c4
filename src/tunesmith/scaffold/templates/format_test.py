"""The format passes tunesmith's kit."""

from tunesmith.testing.conformance import FormatConformance


class TestNewName(FormatConformance):
    """Rows that it takes, and rows that it has to refuse."""

    plugin = "tunesmith_newname"
    name = "newname"
    good_rows = (
        {"question": "Who sang?", "context": "The thrush sang.", "answers": {"text": ["It did."]}},
        {"question": "Who sang?", "answers": {"text": ["The thrush.", "A bird."]}},
    )
    bad_rows = (
        {"question": "Who sang?"},
        {"question": "Who sang?", "answers": {"text": []}},
        {"question": None, "answers": {"text": ["The thrush."]}},
        {"question": "Who sang?", "context": 3, "answers": {"text": ["The thrush."]}},
    )
