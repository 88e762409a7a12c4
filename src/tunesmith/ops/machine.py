"""What this machine's processor can do, as far as choices depend on it."""

from __future__ import annotations

import functools
from pathlib import Path

__all__ = ["cpu_flags", "cpu_multiplies_bf16"]


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
