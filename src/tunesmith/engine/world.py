"""World: the processes that train together, as `torchrun` starts them; mostly one.

One of them, the main process, owns the run directory, the report and what is said. The others read
the same data, build the same trainer, and do what the main one decides. What is decided goes
through the launcher's key-value store, where a wait can be broken off by a signal or by another
process's failure; tensors go through the process group (gloo on the CPU, nccl on CUDA). See
docs/adr/0023-one-main-process.md. Importing this imports no torch.
"""

from __future__ import annotations

import atexit
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import attrs

from tunesmith.engine.signals import current as stopping
from tunesmith.engine.signals import heed
from tunesmith.errors import RunError, TunesmithError

__all__ = ["World", "current"]

T = TypeVar("T")

NEEDED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
OTHERS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""By which accelerate would take part in a group of several processes that we know nothing of."""

PATIENCE = 7 * 24 * 3600.0
"""Seconds in which the main process has to end what the others wait for, such as an evaluation;
one that ends, or is killed, is known at once."""
COLLECTIVE = 3600.0
"""Seconds in which all processes have to come to the same exchange of tensors."""
LOOK = 0.02
HEARD = 0.2
HEARING = 5.0
"""Seconds in which a process that fails has said why, once it is found to be gone."""
FAREWELL = 10.0
"""Seconds in which the main process has heard of a failure, so that another need not tell it."""


class ElsewhereError(RunError):
    """Another process has failed; the message is that one's."""

    def __init__(self, text: str, notes: list[str]) -> None:
        super().__init__(text)
        for note in notes:
            self.add_note(note)


@attrs.define(eq=False)
class World:
    """Which process this is, of how many."""

    rank: int = 0
    local_rank: int = 0
    """Its number on this machine."""
    size: int = 1
    told: bool = attrs.field(default=False, init=False)
    """Whether the main process tells what has ended this one."""
    failing: bool = attrs.field(default=False, init=False)
    """Whether the main process has heard that a process has failed."""
    _store: Any = attrs.field(default=None, init=False)
    _turn: int = attrs.field(default=0, init=False)
    _within: bool = attrs.field(default=False, init=False)
    _broken: bool = attrs.field(default=False, init=False)

    @classmethod
    def from_environment(cls) -> World:
        """Return the world that the environment tells of, as `torchrun` sets it.

        Errors: `RunError` for an environment that asks for several processes and says too little.
        """
        numbers = {name: _number(name) for name in NEEDED[:3]}
        size = numbers["WORLD_SIZE"]
        other = next((name for name in OTHERS if (_number(name) or 1) > 1), None)
        if size is None and other is not None:
            raise RunError(
                f"{other} is {os.environ[other]} and WORLD_SIZE is not set: this is one of several "
                "processes that know nothing of each other; start them by torchrun, or unset it"
            )
        if size is None or size == 1:
            return cls()
        missing = [name for name in NEEDED if not os.environ.get(name)]
        if missing:
            raise RunError(
                f"WORLD_SIZE is {size}, which asks for {size} processes, and "
                f"{', '.join(missing)} is not set, without which they do not find each other; "
                "start them by torchrun, or unset WORLD_SIZE for one process"
            )
        rank, local_rank = numbers["RANK"], numbers["LOCAL_RANK"]
        assert rank is not None
        assert local_rank is not None
        if rank >= size:
            raise RunError(f"RANK is {rank}; with WORLD_SIZE {size} it has to be less")
        return cls(rank, local_rank, size)

    @property
    def main(self) -> bool:
        """Whether this process owns the run directory and what is said."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.size > 1

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let whatever ends one process end all of them, with the message of the first.

        The main process raises it; the others raise the same, once that one has told of it. Within
        another `together` this is that one.
        """
        if not self.several or self._within:
            yield
            return
        self._join()
        self._within = True
        try:
            with self._listening():
                try:
                    yield
                except BaseException as error:
                    own = self._over(error)
                    if own is error:
                        raise
                    raise own from error
        finally:
            self._within = False

    def share(self, make: Callable[[], T]) -> T:
        """Return what `make` returns in the main process, which alone calls it: plain JSON data.

        Errors: those of `make`, in every process.
        """
        if not self.several:
            return make()
        key = self._key()
        if self.main:
            value = make()
            self._store.set(key, json.dumps(value))
            return value
        self._wait(key)
        found: T = json.loads(self._store.get(key))
        return found

    def barrier(self) -> None:
        """Wait until every process is here."""
        if not self.several:
            return
        key = self._key()
        if self._store.add(f"{key}/here", 1) == self.size:
            self._store.set(key, "")
        self._wait(key)

    def most(self, number: int) -> int:
        """Return the greatest number that a process has given; all have to ask at the same time."""
        if not self.several:
            return number
        import torch
        import torch.distributed as dist

        held = torch.tensor([number], dtype=torch.int64)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return int(held)

    def gather(self, value: T) -> list[T]:
        """Return what each process has given, by rank; all have to give at the same time."""
        if not self.several:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def hear(self) -> None:
        """Raise what another process has failed with, which it is about to say."""
        until = time.monotonic() + HEARING
        while time.monotonic() < until:
            self._look()
            time.sleep(LOOK)

    def device(self, name: str) -> str:
        """Return the device of this process, where the run is on `name`: one GPU for each.

        Errors: `RunError` for a device that several processes cannot train on.
        """
        if not self.several or name == "cpu":
            return name
        if name != "cuda":
            raise RunError(
                f"device '{name}': {self.size} processes cannot share it; use device='cuda', which "
                "gives each its own, device='cpu', or one process"
            )
        import torch

        if self.local_rank >= torch.cuda.device_count():
            raise RunError(
                f"device 'cuda': process {self.rank} would be on GPU {self.local_rank}, and there "
                f"are {torch.cuda.device_count()} here; start no more processes than that"
            )
        torch.cuda.set_device(self.local_rank)
        return f"cuda:{self.local_rank}"

    def sees(self, path: Path) -> None:
        """Raise `RunError` if this process does not see what the main one has made."""
        if not path.exists():
            raise RunError(
                f"process {self.rank} does not see {path}, which the main process has made; the "
                "run directory has to be on a file system that all machines share"
            )

    def _join(self) -> None:
        import torch
        import torch.distributed as dist

        if self._broken:
            raise RunError(
                "an earlier run of these processes has failed, and they are not connected any "
                "more; start them anew"
            )
        if self._store is not None:
            return
        if not dist.is_available():
            raise RunError(f"WORLD_SIZE is {self.size}, and this torch has no torch.distributed")
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=COLLECTIVE))
            atexit.register(self._leave)
        if dist.get_world_size() != self.size:
            raise RunError(
                f"WORLD_SIZE is {self.size}, and this process is in a group of "
                f"{dist.get_world_size()}; start the processes by torchrun"
            )
        everyone = dist.distributed_c10d._get_default_store()
        self._store = dist.distributed_c10d.PrefixStore("tunesmith", everyone)

    def _key(self) -> str:
        self._turn += 1
        return f"turn/{self._turn}"

    def _wait(self, key: str) -> None:
        """Wait for a key; a signal, or what another process has failed with, is raised."""
        until = time.monotonic() + PATIENCE
        while not self._store.check([key]):
            stopping().check()
            self._look()
            if time.monotonic() > until:
                raise RunError(f"process {self.rank} has waited {PATIENCE:.0f} s in vain")
            time.sleep(LOOK)

    def _look(self) -> None:
        record = self._record()
        if record is None or record["rank"] == self.rank:
            return
        if record["signal"] is not None:
            heed(record["signal"])
            stopping().check()
        raise ElsewhereError(record["text"], record["notes"])

    def _record(self) -> Any:
        """Return what the first process that has failed says of it."""
        if not self._store.check(["failed"]):
            return None
        return json.loads(self._store.get("failed"))

    def _over(self, error: BaseException) -> BaseException:
        """Tell the others of an error; return the one that this process is to end with."""
        self._broken = True
        # whoever has started the processes ends the rest of them when one has ended
        stopping().deaf = True
        own = error
        with suppress(Exception):  # the store may be gone with the process that had it
            own = self._cause_of(error)
            if isinstance(own, ElsewhereError):
                self.told = not self.main
            elif self._store.add("failures", 1) == 1:
                record = {
                    "rank": self.rank,
                    "signal": stopping().asked,
                    "text": self._text(own),
                    "notes": list(getattr(own, "__notes__", ())) if _meant(own) else [],
                }
                self._store.set("failed", json.dumps(record))
            else:
                self.told = not self.main
            if self.main:
                self._store.set("heard", "")
            until = time.monotonic() + FAREWELL
            while not self.main and not self.told and time.monotonic() < until:
                self.told = self._store.check(["heard"])
                time.sleep(LOOK)
        return own

    def _cause_of(self, error: BaseException) -> BaseException:
        """Return the error itself, or that of another process which has led to it."""
        if _meant(error):
            return error
        lost = stopping().asked is None and _is_connection(error)
        until = time.monotonic() + (HEARING if lost else 0.0)
        record = self._record()
        while record is None and time.monotonic() < until:
            time.sleep(LOOK)
            record = self._record()
        if record is not None and record["rank"] != self.rank:
            # a signal that has come here is of whoever ends the rest of the processes
            heed(record["signal"])
            return ElsewhereError(record["text"], record["notes"])
        if not lost:
            return error
        found = RunError(
            f"a process of the {self.size} has ended without saying why: it was killed, or the "
            "connection to it is lost; run the same again, which goes on from the last checkpoint"
        )
        found.add_note(f"seen as {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        return found

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Let the main process hear of a failure while it waits for tensors of the failed one."""
        over = threading.Event()

        def listen() -> None:
            while not over.wait(HEARD):
                if self._record() is not None:
                    self.failing = True
                    self._store.set("heard", "")
                    return

        def safely() -> None:
            with suppress(Exception):  # the store is gone with the process that had it
                listen()

        listener = threading.Thread(target=safely, name="tunesmith-listener", daemon=True)
        if self.main:
            listener.start()
        try:
            yield
        finally:
            over.set()
            if self.main:
                listener.join(HEARING)

    def _text(self, error: BaseException) -> str:
        if _meant(error):
            return f"process {self.rank} of {self.size}: {error}"
        from tunesmith.unforeseen import unforeseen

        return f"process {self.rank} of {self.size}: {unforeseen(error, None)}"

    def _leave(self) -> None:
        import torch.distributed as dist

        with suppress(Exception):
            if dist.is_initialized() and not self._broken:
                dist.destroy_process_group()


_world: World | None = None


def current() -> World:
    """Return the world of this process; it stays the same."""
    global _world
    if _world is None:
        _world = World.from_environment()
    return _world


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise RunError(f"{name}: got {text!r}; expected a number; start the processes by torchrun")
    return number


def _meant(error: BaseException) -> bool:
    """Whether an error's message is one for users, whom a traceback tells nothing."""
    return isinstance(error, TunesmithError)


def _is_connection(error: BaseException) -> bool:
    """Whether an error may come from another process having ended."""
    if _meant(error) or not isinstance(error, RuntimeError):
        return False
    text = f"{type(error).__name__}: {error}".lower()
    return any(
        part in text for part in ("gloo", "nccl", "connection", "distnetwork", "distbackend")
    )
