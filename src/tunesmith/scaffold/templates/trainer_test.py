"""The trainer passes tunesmith's kit: with every kind of tokenizer, and on held-out rows."""

from tunesmith.testing.conformance import TrainerConformance


class TestNewName(TrainerConformance):
    """Two steps on a tiny model."""

    plugin = "tunesmith_newname"
    name = "newname"
