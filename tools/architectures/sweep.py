"""Families one after another, some in a process at a time: a crash costs one, not all."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tools.architectures.families import NOT_TEXT, make_model, tiny_config
from tools.architectures.journey import Outcome, as_json, travel

__all__ = ["in_processes", "inside", "shares"]

GROUP = 8
ROOT = Path(__file__).parents[2]


def in_processes(names: list[str], bases: list[str]) -> Iterator[Outcome]:
    """Yield what becomes of each family on each base."""
    flags = [flag for base in bases for flag in ("--base", base)]
    for start in range(0, len(names), GROUP):
        left = names[start : start + GROUP]
        while left:
            finished: set[str] = set()
            with subprocess.Popen(
                [sys.executable, "-m", "tools.architectures", "--inner", *flags, *left],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            ) as running:
                assert running.stdout is not None
                found: list[Outcome] = []
                for line in running.stdout:
                    if not line.startswith("{"):
                        continue  # a family's own chatter
                    found.append(Outcome.from_json(line))
                    if len(found) == len(bases):  # all of a family
                        yield from found
                        finished.add(found[0].family)
                        found = []
            left = [name for name in left if name not in finished]
            if left:
                if running.returncode == 0:
                    raise RuntimeError(f"no outcome for {', '.join(left)}")
                text = f"the process ended with {running.returncode}"
                yield from (Outcome(left[0], base, "wrong", text) for base in bases)
                left = left[1:]


def inside(names: list[str], bases: list[str]) -> None:
    """Print the outcomes as lines of JSON: what a process of `in_processes` does."""
    _settle()
    for name in names:
        for outcome in _outcomes(name, bases):
            print(as_json(outcome), flush=True)


def shares(names: list[str]) -> dict[str, str]:
    """Return for each family how much of it, besides embeddings and head, goes into 4 bits."""
    import torch
    from transformers import AutoModelForCausalLM

    from tunesmith.errors import ModelError
    from tunesmith.nn.quantizable import ENDS, split

    found: dict[str, str] = {}
    for name in names:
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(tiny_config(name))
            parts = split(model)
        except ModelError:
            found[name] = "0 %"
            continue
        except Exception:  # there is no such model, as its row says
            continue
        others = sum(each.parameters for each in parts.kept if each.what != ENDS)
        found[name] = f"{100 * parts.quantized / (parts.quantized + others):.0f} %"
    return found


def _outcomes(family: str, bases: list[str]) -> list[Outcome]:
    """Make the family's model once and take it through everything on each base."""
    if family in NOT_TEXT:
        return [Outcome(family, base, "not tried", NOT_TEXT[family]) for base in bases]
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        try:
            make_model(family, model)
        except Exception as error:
            text = " ".join(f"no tiny model: {type(error).__name__}: {error}".split())
            return [Outcome(family, base, "not tried", text) for base in bases]
        return [travel(family, base, model, Path(place) / base) for base in bases]


def _settle() -> None:
    """Quieten libraries, import what every family needs, and keep it from the garbage collector."""
    import gc
    import warnings

    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }
    warnings.simplefilter("ignore")

    import peft  # noqa: F401
    import torch

    import tunesmith_plugins.trainers.dpo  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
