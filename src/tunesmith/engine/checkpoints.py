"""The checkpoints of one stage: complete or not there, checked before they are used, few.

    checkpoints/checkpoint-40/
      weights.safetensors    what is trained, by the model's own names
      states.safetensors     tensors of optimizer and random number generators
      states.json            the rest of optimizer, scheduler, scaler, generators, trainer
      trainer_state.json     transformers' TrainerState
      checkpoint.json        step, sizes and hashes of the files above; sealed, written last

See docs/adr/0013-complete-or-not-there.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunesmith.engine.durable import (
    DRAFT,
    created,
    draft_of,
    publish,
    remove,
    require_room,
    told,
)
from tunesmith.engine.seals import check_listing, first_difference, read_object, sealed, unsealed
from tunesmith.engine.states import (
    StateError,
    decode,
    encode,
    read_tensors,
    tensor_bytes,
    write_tensors,
)
from tunesmith.errors import RunError
from tunesmith.plugin.trainers import CHECKPOINTS_KEPT

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "Checkpoints", "Contents"]

NAME = re.compile(r"checkpoint-(?P<step>\d{1,18})")
MANIFEST = "checkpoint.json"
WEIGHTS = "weights.safetensors"
STATES = "states.safetensors"
VERSION = 1
FIELDS = {"version", "step", "over", "best_step", "files"}


@attrs.frozen
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    step: int
    over: bool
    """Whether the training had come to its end, so that only the weights are used again."""
    best_step: int | None
    """Step of the best evaluation so far, where the best weights are kept."""


@attrs.frozen
class Contents:
    """What a checkpoint holds."""

    weights: Mapping[str, torch.Tensor]
    states: Mapping[str, Any]
    """Anything that `states.encode` has a form for, by name."""
    trainer_state: str
    """JSON text of transformers' TrainerState."""


@attrs.define
class Checkpoints:
    """The checkpoints in a directory, for the process that owns it."""

    directory: Path
    put_aside: Callable[[Path], Path]
    """Moves what is broken out of the way and returns where to; it is never deleted."""
    warn: Callable[[str], None]
    keep: int = CHECKPOINTS_KEPT
    """Complete ones that stay at a time, beside the best one."""
    complete: dict[int, Checkpoint] = attrs.field(factory=dict, init=False)
    """Those that were written or checked by this process, by step."""

    def begin(self) -> Checkpoint | None:
        """Clear what was being written, and return the checkpoint to go on from.

        That is the newest one which is complete, and whose best weights are; newer ones that are
        not are named and put aside.
        """
        self.complete.clear()
        for entry in list(self.directory.iterdir()):
            if DRAFT.fullmatch(entry.name):
                remove(entry, self.directory)
        steps = sorted(_steps(self.directory), reverse=True)
        for step in steps:
            found = self._checked(step)
            if found is None:
                continue
            if found.best_step is not None and self._checked(found.best_step) is None:
                self._reject(found.path, f"its best weights (step {found.best_step}) are not whole")
                self.complete.pop(step, None)
                continue
            return found
        return None

    def write(
        self, step: int, contents: Contents, *, over: bool = False, best_step: int | None = None
    ) -> Checkpoint:
        """Write a checkpoint; errors say what was kept, and that is never less than one."""
        if step in self.complete:
            return self.complete[step]
        tensors: dict[str, torch.Tensor] = {}
        states = json.dumps(encode(contents.states, tensors))
        need = tensor_bytes(contents.weights) + tensor_bytes(tensors)
        need += len(states) + len(contents.trainer_state)
        self._rotate(max(1, self.keep - 1))
        final = self.directory / f"checkpoint-{step}"
        require_room(self.directory, need, final.name, self.kept())
        draft = draft_of(final)
        with told(final, need=need, kept=self.kept):
            try:
                draft.mkdir()
                files = {
                    WEIGHTS: write_tensors(draft / WEIGHTS, contents.weights),
                    STATES: write_tensors(draft / STATES, tensors),
                    "states.json": _write(draft / "states.json", states),
                    "trainer_state.json": _write(
                        draft / "trainer_state.json", contents.trainer_state
                    ),
                }
                record = {"step": step, "over": over, "best_step": best_step, "files": files}
                _write(draft / MANIFEST, sealed({"version": VERSION, **record}))
                publish(draft, final)
            except BaseException:
                with suppress(OSError, RunError):
                    remove(draft, self.directory)
                raise
        self.complete[step] = Checkpoint(final, step, over, best_step)
        self._rotate(self.keep)
        return self.complete[step]

    def know(self, step: int, *, over: bool = False, best_step: int | None = None) -> Checkpoint:
        """Take note of a checkpoint that the process which owns the directory writes."""
        found = Checkpoint(self.directory / f"checkpoint-{step}", step, over, best_step)
        self.complete[step] = found
        return found

    def at(self, step: int | None) -> Checkpoint | None:
        """Return the complete checkpoint of a step, if there is one."""
        return self.complete.get(step) if step is not None else None

    def kept(self) -> str:
        """Say which checkpoint a run would go on from."""
        if not self.complete:
            return "no checkpoint was complete before it"
        return f"{self.complete[max(self.complete)].path} is kept"

    def weights(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        """Return the weights of a checkpoint, on the CPU."""
        return read_tensors(checkpoint.path / WEIGHTS)

    def states(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the states that were kept with a checkpoint."""
        try:
            tree = read_object(checkpoint.path / "states.json")
            found: dict[str, Any] = decode(tree, read_tensors(checkpoint.path / STATES))
        except (ValueError, StateError, KeyError) as error:
            raise RunError(f"{checkpoint.path}: cannot be read: {error}; delete it") from error
        return found

    def _checked(self, step: int) -> Checkpoint | None:
        """Return a checkpoint whose every file is as it was written; put a broken one aside."""
        if step in self.complete:
            return self.complete[step]
        path = self.directory / f"checkpoint-{step}"
        try:
            found = _read(path, step)
        except ValueError as error:
            if os.path.lexists(path):
                self._reject(path, str(error))
            return None
        self.complete[step] = found
        return found

    def _reject(self, path: Path, why: str) -> None:
        self.warn(f"{path.name} is not used: {why}; it is kept in {self.put_aside(path)}")

    def _rotate(self, keep: int) -> None:
        """Remove all but the newest `keep` complete checkpoints and the best one of each."""
        newest = sorted(self.complete)[-keep:]
        stay = {*newest, *(self.complete[step].best_step for step in newest)}
        for step in _steps(self.directory):
            if step in stay or not newest:
                continue
            self.complete.pop(step, None)
            path = self.directory / f"checkpoint-{step}"
            gone = draft_of(path)  # half removed, it must not look like a checkpoint
            with told(path):
                path.rename(gone)
            remove(gone, self.directory)


def _read(path: Path, step: int) -> Checkpoint:
    """Return a checkpoint; `ValueError` says what is wrong with it."""
    if path.is_symlink() or not path.is_dir():
        raise ValueError("it is not a directory")
    try:
        record = unsealed(read_object(path / MANIFEST))
    except ValueError as error:
        raise ValueError(f"{MANIFEST}: {error}") from error
    if record.get("version") != VERSION or set(record) != FIELDS:
        raise ValueError(f"{MANIFEST} was written by another version of tunesmith")
    best = record["best_step"]
    if record["step"] != step or type(record["over"]) is not bool:
        raise ValueError(f"{MANIFEST} is that of another checkpoint")
    if best is not None and (type(best) is not int or not 0 < best <= step):
        raise ValueError(f"{MANIFEST} names {best!r} as the best step")
    files = check_listing(record["files"])
    if missing := {WEIGHTS, STATES, "states.json", "trainer_state.json"} - set(files):
        raise ValueError(f"{MANIFEST} does not list {', '.join(sorted(missing))}")
    if wrong := first_difference(path, files):
        raise ValueError(wrong)
    return Checkpoint(path, step, record["over"], best)


def _steps(directory: Path) -> list[int]:
    """Return the steps whose checkpoints a directory seems to hold."""
    found = (NAME.fullmatch(entry.name) for entry in directory.iterdir())
    return [
        int(match["step"])
        for match in found
        if match and match[0] == f"checkpoint-{int(match['step'])}"
    ]


def _write(path: Path, text: str) -> dict[str, Any]:
    data = text.encode()
    with created(path) as stream:
        stream.write(data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
