"""Memory as a plan predicts it and a run measures it: what a stage takes beyond what was there.

The base is what the process holds before the stage has loaded anything: Python, its libraries, the
rows. So the figure is what the model, its training and its optimizer take, on the CPU as on a GPU,
and the plan's prediction is of the same.
"""

from __future__ import annotations

import gc
import resource
import sys
from contextlib import suppress
from pathlib import Path

import attrs

__all__ = ["StageMemory"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@attrs.define
class StageMemory:
    """Measures one stage: made before its model is loaded, `begin` when its training begins.

    On CUDA it is the device memory that torch has allocated. On the CPU it is the resident set:
    where the system can (Linux), its peak is counted anew from `begin`, so that neither an earlier
    stage nor the mapped files of loading are in it; elsewhere the process's peak is taken if it has
    grown since, and what is held at the time of asking if it has not.
    """

    base: int = attrs.field(init=False)
    _seen: int = attrs.field(default=0, init=False)
    _highest_before: int = attrs.field(default=0, init=False)
    _anew: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        from tunesmith.nn.loading import trim_heap

        # what is torn down already is no part of the base
        gc.collect()
        trim_heap()
        self.base = _allocated() if _on_cuda() else _resident()

    def begin(self) -> None:
        """Count the peak from here on."""
        if _on_cuda():
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        with suppress(OSError):
            _CLEAR.write_text("5")
            self._anew = True
        self._highest_before = _highest()

    def peak(self) -> int:
        """Return the bytes that the stage has taken at most, so far."""
        if _on_cuda():
            import torch

            return max(0, int(torch.cuda.max_memory_allocated()) - self.base)
        highest = _highest()
        if self._anew or highest > self._highest_before:
            self._seen = max(self._seen, highest)
        self._seen = max(self._seen, _resident())
        return max(0, self._seen - self.base)


def _on_cuda() -> bool:
    import torch

    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _allocated() -> int:
    import torch

    return int(torch.cuda.memory_allocated())


def _resident() -> int:
    """Return the bytes of this process that are in memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _highest() -> int:
    """Return the most that `_resident` has been: since it was counted anew, where that is done."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
