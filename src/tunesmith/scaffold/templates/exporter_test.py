"""The exporter passes tunesmith's kit."""

from tunesmith.testing.conformance import ExporterConformance


class TestNewName(ExporterConformance):
    """It writes adapters, and refuses a session that has none."""

    plugin = "tunesmith_newname"
    name = "newname"
    needs_adapter = True
