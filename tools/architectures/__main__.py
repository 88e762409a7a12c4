"""Take every causal-LM family of transformers through everything and write the table.

`python -m tools.architectures` does all and writes docs/reference/architectures.md;
`python -m tools.architectures llama mixtral` does these and prints what became of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.architectures.families import NOT_TEXT, families, make_model
from tools.architectures.journey import BASES, Outcome, as_json, travel

GROUP = 12


def main() -> int:
    """Do what the command line says; return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="*")
    parser.add_argument("--base", choices=BASES, action="append")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = given.family or families()
    bases = given.base or list(BASES)
    if given.inner:
        _quiet()
        _settle()
        for name in names:
            for outcome in sweep(name, bases):
                print(as_json(outcome), flush=True)
        return 0
    wrong = 0
    done = []
    for start in range(0, len(names), GROUP):
        group = names[start : start + GROUP]
        for outcome in _in_a_process(group, bases):
            wrong += outcome.verdict == "wrong"
            done.append(outcome)
            line = f"{outcome.family:28} {outcome.base:6} {outcome.verdict:8} {outcome.text[:400]}"
            print(line, flush=True)
            if given.out:
                with given.out.open("a") as stream:
                    stream.write(as_json(outcome) + "\n")
    print({v: sum(o.verdict == v for o in done) for v in ("right", "refused", "wrong")})
    return int(wrong > 0)


def sweep(family: str, bases: list[str]) -> list[Outcome]:
    """Make the family's model once and take it through everything on each base."""
    if family in NOT_TEXT:
        return [Outcome(family, base, "refused", NOT_TEXT[family]) for base in bases]
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        try:
            make_model(family, model)
        except Exception as error:
            text = " ".join(f"no tiny model: {type(error).__name__}: {error}".split())
            return [Outcome(family, base, "wrong", text) for base in bases]
        return [travel(family, base, model, Path(place) / base) for base in bases]


def _in_a_process(names: list[str], bases: list[str]) -> list[Outcome]:
    flags = [flag for base in bases for flag in ("--base", base)]
    left = list(names)
    found: list[Outcome] = []
    while left:
        ran = subprocess.run(
            [sys.executable, "-m", "tools.architectures", "--inner", *flags, *left],
            stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
        found += [Outcome(**line) for line in lines]
        finished = {name for name in left if sum(o.family == name for o in found) == len(bases)}
        rest = [name for name in left if name not in finished]
        if rest and ran.returncode == 0:
            raise RuntimeError(f"no outcome for {rest}")
        if rest:
            found = [o for o in found if o.family != rest[0]]
            text = f"the process died with {ran.returncode}"
            found += [Outcome(rest[0], base, "wrong", text) for base in bases]
            rest = rest[1:]
        left = rest
    return found


def _settle() -> None:
    """Import what every family needs, and keep it out of the garbage collector's rounds."""
    import gc

    import peft  # noqa: F401
    import torch

    import tunesmith_plugins.trainers.dpo  # noqa: F401

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def _quiet() -> None:
    import warnings

    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.simplefilter("ignore")


if __name__ == "__main__":
    sys.exit(main())
