"""Amounts as people read them: the same words in a plan, on the console, in a report, in an error.

Bytes are in binary units everywhere: 1 MiB is 2**20 bytes.
"""

from __future__ import annotations

__all__ = ["byte_size"]


def byte_size(count: float) -> str:
    """Return a number of bytes, such as "512 bytes", "3.4 KiB", "940 MiB" or "1.8 GiB"."""
    # what would be rounded to 1024 of a unit is 1.0 of the next
    for unit, above in (("bytes", 1023.5), ("KiB", 1023.5), ("MiB", 1023.5), ("GiB", 1023.95)):
        if abs(count) < above:
            whole = unit == "bytes" or (unit != "GiB" and abs(count) >= 9.95)
            return f"{count:.0f} {unit}" if whole else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"
