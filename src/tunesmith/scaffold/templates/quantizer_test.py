"""The quantizer passes tunesmith's kit."""

from tunesmith.testing.conformance import QuantizerConformance


class TestNewName(QuantizerConformance):
    """8 bits are off by less than a hundredth."""

    plugin = "tunesmith_newname"
    name = "newname"
    tolerance = 0.01
    nbytes_tolerance = 0.01
