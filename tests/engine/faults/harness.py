"""Runs a recipe under the faults of inject.cpp, in a process that forks a child for each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def built(directory: Path) -> Path:
    """Return the library that is preloaded, compiled into a directory."""
    library = directory / "inject.so"
    command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-o", library, HERE / "inject.cpp", "-ldl"], check=True)
    return library


@attrs.frozen
class Ended:
    """How a child ended."""

    status: int
    """0 finished, 1 a TunesmithError, 2 another error, -9 killed."""
    said: str


class Faults:
    """A server with the library preloaded; a context manager."""

    def __init__(self, library: Path, recipe: str, scratch: Path) -> None:
        self.recipe = recipe
        self.scratch = scratch
        self.whole = scratch / "whole"
        """A run of the recipe that nothing has disturbed."""
        env = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.engine.faults.server"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._ask({"recipe": recipe, "out": str(self.whole)}) == 0

    def run(
        self,
        out: Path,
        *,
        at: int = 0,
        how: str = "kill",
        kill_after: float | None = None,
        recipe: str | None = None,
    ) -> Ended:
        """Run the recipe, or another, with a fault at its `at`-th operation on files in `out`."""
        said = self.scratch / "said.txt"
        env = {"INJECT_AT": str(at), "INJECT_HOW": how, "INJECT_UNDER": str(out)}
        job: dict[str, Any] = {"recipe": recipe or self.recipe, "out": str(out), "said": str(said)}
        status = self._ask({**job, "env": env, "kill_after": kill_after})
        return Ended(status, said.read_text(errors="replace"))

    def operations(self, recipe: str | None = None) -> list[str]:
        """Return what an undisturbed run does to its files, in order: "write recipe.yaml"."""
        log, out = self.scratch / "operations.txt", self.scratch / "counted"
        env = {"INJECT_AT": "0", "INJECT_UNDER": str(out), "INJECT_LOG": str(log)}
        said = str(self.scratch / "said.txt")
        job = {"recipe": recipe or self.recipe, "out": str(out), "said": said}
        log.unlink(missing_ok=True)
        assert self._ask({**job, "env": env}) == 0
        shutil.rmtree(out)
        lines = log.read_text().splitlines()
        return [line.partition(" ")[2].replace(f"{out}/", "") for line in lines]

    def _ask(self, job: dict[str, Any]) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(job), file=self._server.stdin, flush=True)
        answer: int = json.loads(self._server.stdout.readline())
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._server:  # closes its pipes, at which it ends
            pass
