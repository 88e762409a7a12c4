"""The metric passes tunesmith's kit: with every kind of tokenizer, leaving the model as it was."""

from tunesmith_newname import NewName

from tunesmith.plugin.metrics import MetricConfig
from tunesmith.testing import tiny_examples, tiny_session
from tunesmith.testing.conformance import MetricConformance


class TestNewName(MetricConformance):
    """Finite numbers by name."""

    plugin = "tunesmith_newname"
    name = "newname"


def test_it_does_not_depend_on_how_rows_are_batched(tmp_path):
    """Padding counts for nothing."""
    session = tiny_session(tmp_path / "base")
    session.model.eval()
    examples = tiny_examples("conversation")
    one, four = (
        NewName(MetricConfig(batch_size=size)).measure(session, examples).values for size in (1, 4)
    )
    assert one == four
    assert one["tokens"] > len(examples)
