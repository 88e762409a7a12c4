"""Take every causal-LM family of transformers through everything and write the table.

`python -m tools.architectures --write` does all and writes docs/reference/architectures.md;
`python -m tools.architectures llama mixtral` does these and prints what became of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.architectures import table
from tools.architectures.families import families
from tools.architectures.journey import BASES, VERDICTS, Outcome, as_json
from tools.architectures.sweep import in_processes, inside, shares


def main() -> int:
    """Do what the command line says; return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="*", help="which; all, unless given")
    parser.add_argument("--base", choices=BASES, action="append", help="on which; both")
    parser.add_argument("--out", type=Path, help="add each outcome to this file, a line of JSON")
    parser.add_argument("--outcomes", type=Path, help="take them from such a file instead")
    parser.add_argument("--write", action="store_true", help="write the page")
    parser.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names, bases = given.family or families(), given.base or list(BASES)
    if given.inner:
        inside(names, bases)
        return 0
    if given.outcomes:
        lines = given.outcomes.read_text(encoding="utf-8").splitlines()
        outcomes = list({(o.family, o.base): o for o in map(Outcome.from_json, lines)}.values())
    else:
        outcomes = []
        for outcome in in_processes(names, bases):
            outcomes.append(outcome)
            print(f"{outcome.family:28} {outcome.base:6} {outcome.verdict:8} {outcome.text[:400]}")
            if given.out:
                with given.out.open("a", encoding="utf-8") as stream:
                    stream.write(as_json(outcome) + "\n")
    verdicts = [outcome.verdict for outcome in outcomes]
    print({verdict: verdicts.count(verdict) for verdict in VERDICTS})
    if given.write:
        import transformers

        table.write(
            outcomes, shares(sorted({o.family for o in outcomes})), transformers.__version__
        )
    return int("wrong" in verdicts)


if __name__ == "__main__":
    sys.exit(main())
