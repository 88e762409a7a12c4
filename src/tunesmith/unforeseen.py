"""What a user of the command line is told of an error that nobody foresaw."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from pathlib import Path

__all__ = ["unforeseen"]


def unforeseen(error: BaseException, run: Path | None) -> str:
    """Return one line on an error; its traceback goes to a file, in the run directory if given."""
    if _out_of_memory(error):
        text = (
            f"there is not enough memory ({_first_line(error)}); lower batch_size or max_length, "
            "set gradient_checkpointing=True, quantize the model, or take a smaller one"
        )
    else:
        text = f"{type(error).__name__}: {_first_line(error)}"
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    where = _keep("".join(traceback.format_exception(error)), run)
    told = f"the traceback is in {where}" if where else "its traceback could not be written"
    if _out_of_memory(error):
        return f"{text}{notes}; {told}"
    return f"{text}{notes}; nobody foresaw this: {told}; please report it"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0].strip() if lines else "no message"
    return text if len(text) <= 300 else f"{text[:297]}..."


def _out_of_memory(error: BaseException) -> bool:
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "allocate memory" in str(error))
    )


def _keep(text: str, run: Path | None) -> Path | None:
    """Write a traceback where it can be found: run directory, user's cache, temporary directory."""
    name = f"traceback-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tunesmith"
    given = os.environ.get("TUNESMITH_CACHE")
    for place in (run, Path(given).expanduser() if given else cache, Path(tempfile.gettempdir())):
        if place is None:
            continue
        try:
            place.mkdir(parents=True, exist_ok=True)
            (place / name).write_text(text, encoding="utf-8")
        except OSError:
            continue
        return place / name
    return None
