"""Reading what comes with a model: any damage is a `ModelError` that says what and what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError, TunesmithError

__all__ = ["AGAIN", "CONFIG_BYTES", "TOKENIZER_BYTES", "model_errors", "read_object", "reason"]

CONFIG_BYTES = 16 << 20
TOKENIZER_BYTES = 256 << 20
AGAIN = "take the file from the model's source again"


def reason(error: BaseException) -> str:
    """Return what an error of a library says, on one line of moderate length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines) or type(error).__name__
    if isinstance(error, KeyError):
        text = f"{text} is missing"
    return text if len(text) <= 300 else f"{text[:297]}..."


@contextmanager
def model_errors(what: str, advice: str) -> Iterator[None]:
    """Raise what a library raises inside as a `ModelError`: "`what`: the reason; `advice`".

    An error of tunesmith's own passes; so does what nobody may catch.
    """
    import torch

    try:
        yield
    except TunesmithError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _too_large(what, error) from error
    except Exception as error:
        if "allocate memory" in str(error):  # how a library says it
            raise _too_large(what, error) from error
        raise ModelError(f"{what}: {reason(error)}; {advice}") from error
    except BaseException as error:
        # the Rust below tokenizers and safetensors panics past `except Exception`
        if type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{what}: {reason(error)}; {advice}") from error


def _too_large(what: str, error: BaseException) -> ModelError:
    return ModelError(
        f"{what}: there is not enough memory for it ({reason(error)}); quantize it, take a "
        "smaller model, or a machine with more memory"
    )


_KINDS = {list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}


def read_object(file: Path, most: int = CONFIG_BYTES) -> dict[str, Any]:
    """Return the JSON object in a model's file; `ModelError` for anything else."""
    size = file.stat().st_size
    if size > most:
        raise ModelError(
            f"{file}: has {size:,} bytes; at most {most:,} are read of such a file; take the "
            "model from its source again"
        )
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: is not valid JSON ({reason(error)}); {AGAIN}") from error
    if not isinstance(row, dict):
        raise ModelError(
            f"{file}: holds {_KINDS.get(type(row), 'no object')}; expected an object with "
            f"settings; {AGAIN}"
        )
    return row
