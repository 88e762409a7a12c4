"""write_report: a run directory as one HTML file that needs nothing else to be read.

What is missing or broken is said in the report; a half-finished run has one too.
"""

from __future__ import annotations

from pathlib import Path

from tunesmith.engine.durable import write_text
from tunesmith.errors import RunError
from tunesmith.report.page import page
from tunesmith.report.reading import read_run

__all__ = ["write_report"]


def write_report(run_directory: Path) -> Path:
    """Write `report.html` into a run directory from what lies there, and return its path.

    Errors: `RunError` if there is no such directory, or it cannot be written.
    """
    run_directory = Path(run_directory)
    if not run_directory.is_dir():
        raise RunError(f"{run_directory}: no such run directory; give the directory of a run")
    text = page(read_run(run_directory))
    target = run_directory / "report.html"
    # a lone surrogate, which JSON can hold and UTF-8 cannot, becomes a question mark
    write_text(target, text.encode("utf-8", "replace").decode())
    return target
