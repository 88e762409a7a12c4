"""The process of one contestant: answers each line on stdin with a line of JSON on stdout.

Its argument is a `Job`. First it says {"ready": true}; each "turn" is answered with
{"values": [...], "note": text}; what goes wrong is said as {"failed": text}, and ends it. "end",
or the end of stdin, ends it as well.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

from benchmarks.train.cases import Job

__all__ = ["main"]


class _Channel:
    """The parent, at the other end of two pipes."""

    def __init__(self) -> None:
        # libraries print to stdout as they like; the pipe is for us alone
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, **message: Any) -> None:
        """Send a message."""
        print(json.dumps(message), file=self._out, flush=True)

    def ready(self) -> None:
        """Say that the first turn may come."""
        self.say(ready=True)

    def turn(self) -> bool:
        """Wait for a turn; False once there are no more."""
        return sys.stdin.readline().strip() == "turn"

    def answer(self, *values: float, note: str = "") -> None:
        """Say what came out of the turn."""
        self.say(values=values, note=note)


def main(job_json: str) -> int:
    """Do a job; return 1 if it failed."""
    channel = _Channel()
    warnings.simplefilter("ignore")  # of libraries, about what is not asked here
    try:
        from benchmarks.train.jobs import KINDS

        job = Job(**json.loads(job_json))
        KINDS[job.kind](job, channel)
    except Exception as error:  # whatever breaks a contestant is reported, and the others go on
        channel.say(failed=f"{type(error).__name__}: {error}")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
