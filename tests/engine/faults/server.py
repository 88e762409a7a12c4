"""Runs a recipe again and again, each time in a child of a process that has imported everything.

A line of JSON comes in for each: "recipe" (YAML), "out" (run directory), "env" (see inject.cpp),
"said" (file for what the child says), "kill_after" (seconds, or null). A line goes out: how the
child ended, as `os.waitstatus_to_exitcode` says it: 0 finished, 1 a TunesmithError, 2 any other.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any


def run(recipe: str, out: Path) -> None:
    from tunesmith.engine import training
    from tunesmith.engine.resuming import Pace
    from tunesmith.engine.runner import run as run_recipe
    from tunesmith.plugin.events import Warned
    from tunesmith.plugin.registry import registry
    from tunesmith.recipe import Recipe

    training.Pace = lambda: Pace(seconds=0.0, dearest=1e9)  # type: ignore[assignment,misc]

    def listen(_: Any, event: Any) -> None:
        if isinstance(event, Warned):
            print("warned:", event.text, flush=True)

    run_recipe(Recipe.from_yaml(recipe), out, registry(), [listen])


def child(job: dict[str, Any]) -> None:
    said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if job.get("kill_after") is not None:
        timer = threading.Timer(job["kill_after"], os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    os.environ.update(job["env"])
    from tunesmith.errors import TunesmithError

    status = 0
    try:
        run(job["recipe"], Path(job["out"]))
    except TunesmithError as error:
        print("error:", error, *getattr(error, "__notes__", ()), flush=True)
        status = 1
    except BaseException:
        traceback.print_exc()
        status = 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    first = json.loads(sys.stdin.readline())
    run(first["recipe"], Path(first["out"]))  # imports, and warms what is kept in memory
    gc.collect()
    gc.freeze()  # a child that collects garbage need not walk over all that was imported
    print(json.dumps(0), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            child(job)
        _, status = os.waitpid(pid, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), file=answers)


if __name__ == "__main__":
    main()
