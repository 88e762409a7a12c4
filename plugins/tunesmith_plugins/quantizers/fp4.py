"""FP4: 4-bit floats, as bitsandbytes has them."""

from __future__ import annotations

from typing import ClassVar

import attrs

from tunesmith_plugins.quantizers.nf4 import NF4, NF4Config

__all__ = ["FP4", "FP4Config"]


@attrs.frozen(kw_only=True)
class FP4Config(NF4Config):
    """Options of `.quantize("fp4")`: those of nf4, which is the better of the two."""


class FP4(NF4):
    """Does as `NF4` does with another table, for models that are stored with it."""

    quant_type: ClassVar[str] = "fp4"
