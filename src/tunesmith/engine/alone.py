"""One run at a time in a process: runs share its random numbers and transformers' way of loading.

Two at once would make other bytes than each alone, without an error, and models with parameters on
the meta device. Processes of their own share nothing of the kind.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import attrs

from tunesmith.errors import RunError

__all__ = ["alone"]


@attrs.frozen
class _Holder:
    """Who is at work."""

    what: str
    brief: bool
    """Whether it is over soon, so that another waits for it."""


_free = threading.Condition()
_holder: _Holder | None = None
_forked_within: str = ""
"""What was at work in the process that this one was forked from."""


@contextmanager
def alone(what: str, *, brief: bool = False) -> Iterator[None]:
    """Do something that nothing else in this process may go beside.

    `what` says it, for messages. Something `brief` is waited for; a run is not: `RunError`.
    """
    global _holder
    mine = _Holder(what, brief)
    if _forked_within:
        raise RunError(
            f"{what}: this process was forked while {_forked_within} was at work, and the threads "
            "and random numbers it shares do not outlive that; start it by spawn, such as "
            "multiprocessing.get_context('spawn'), or fork before the run begins"
        )
    with _free:
        while _holder is not None:
            if not _holder.brief:
                raise RunError(
                    f"{what}: {_holder.what} is at work in this process, and both would draw from "
                    "the same random numbers and load models in each other's way; wait until it "
                    "is done, or do this in a process of its own"
                )
            _free.wait()
        _holder = mine
    try:
        yield
    finally:
        with _free:
            if _holder is mine:
                _holder = None
                _free.notify_all()


def _in_child() -> None:
    """Know, in a process forked while something was at work, that it has only half of it."""
    global _free, _holder, _forked_within
    if _holder is not None:
        _forked_within = _holder.what
    _free, _holder = threading.Condition(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
