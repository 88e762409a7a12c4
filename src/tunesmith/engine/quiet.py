"""Keeps libraries from talking over the run: it has a voice of its own."""

from __future__ import annotations

import logging as logging_levels
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_libraries"]


# it tells at each import that a kernel is not there which nothing here asks for
_foreign = logging_levels.getLogger("bitsandbytes.backends.cpu.ops")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Switch off transformers' loading bars, and warnings that no user can act on."""
    from transformers.utils import logging

    _foreign.setLevel(logging_levels.ERROR)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT reads an attribute that transformers has renamed
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            # accelerate passes on an argument that torch has renamed
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
