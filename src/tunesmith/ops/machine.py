"""What this machine's processor can do, as far as choices depend on it."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path

from tunesmith.errors import OptionError, close_matches

__all__ = ["ISAS", "check_environment", "cpu_flags", "cpu_multiplies_bf16"]

ISAS = ("amx_bf16", "avx512_bf16", "avx512", "avx2", "scalar")
"""Names of the instruction sets that the CPU kernels are compiled for, best first."""


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Raise `OptionError` for a setting of the kernels that none of them knows.

    What they do with it is to take the best, so a slip of the pen would go unseen.
    """
    problems = []
    isa = environment.get("TUNESMITH_ISA", "")
    if isa and isa not in ISAS:
        problems.append(
            f"TUNESMITH_ISA={isa}: expected one of {', '.join(ISAS)}{close_matches(isa, ISAS)}; "
            "leave it unset for the best this CPU has"
        )
    native = environment.get("TUNESMITH_NATIVE", "")
    if native not in ("", "0", "1"):
        problems.append(
            f"TUNESMITH_NATIVE={native}: expected 0, which switches the native kernels off, or 1"
        )
    if problems:
        raise OptionError(problems)


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the feature flags that Linux lists for the first processor; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def cpu_multiplies_bf16() -> bool:
    """Return whether bf16 products are done in hardware (AVX512-BF16 or AMX), not by conversion."""
    return bool(cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})
