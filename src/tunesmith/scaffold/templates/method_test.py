"""The method passes tunesmith's kit, and trains B alone."""

from tunesmith_newname import NewName, NewNameConfig

from tunesmith.testing import tiny_session
from tunesmith.testing.conformance import MethodConformance


class TestNewName(MethodConformance):
    """On a plain base and on one in 4 bits."""

    plugin = "tunesmith_newname"
    name = "newname"
    options = {"r": 4}


def test_only_b_is_trained(tmp_path):
    """A is as large, and frozen."""
    session = tiny_session(tmp_path / "base", method=NewName(NewNameConfig(r=4)), trains=True)
    trained = [name for name, each in session.model.named_parameters() if each.requires_grad]
    assert trained
    assert all(".lora_B." in name for name in trained)
