"""The run directory and its one owner: nothing else writes into it.

    runs/a/
      recipe.yaml              what was asked
      lock.json                what it was resolved to: versions, hashes, plugins, fingerprints
      report.html
      stages/03-sft/           one directory a finished stage
        stage.json             fingerprint, options, metrics, seconds; written last
        adapter/ or model/     what it made
        log.jsonl              what the trainer logged
        dropped.jsonl          rows that were left out, and why
        cut.jsonl              rows that are used without the end of their answer
      stages/.03-sft.partial/  a stage at work, or one that was interrupted
      superseded/              finished stages that a changed recipe has replaced

A stage appears under its name by one rename, when it is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs

from tunesmith.errors import RunError

__all__ = ["RunStore", "Stage", "problem_with", "read_stages"]

MARKER = "recipe.yaml"
PARTIAL_MARK = "fingerprint"
STAGE_NAME = re.compile(r"\d{2,}-[A-Za-z0-9][A-Za-z0-9._-]*")
FINGERPRINT = re.compile(r"[0-9a-f]{2,64}")


@attrs.frozen
class Stage:
    """What a step has done, kept durably."""

    name: str
    """Number and label, such as "03-sft"."""
    path: Path
    verb: str
    plugin: str
    fingerprint: str
    options: Mapping[str, Any] = attrs.field(factory=dict)
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    seconds: float = 0.0
    finished: str = ""
    """ISO 8601 time, UTC."""

    @property
    def adapter(self) -> Path | None:
        """Directory of the adapter that the stage trained, in PEFT's format."""
        directory = self.path / "adapter"
        return directory if directory.is_dir() else None

    @property
    def model(self) -> Path | None:
        """Directory of the full model that the stage made, if it made one."""
        directory = self.path / "model"
        return directory if (directory / "config.json").is_file() else None

    def to_dict(self) -> dict[str, Any]:
        """Return what stage.json holds."""
        return {
            "name": self.name,
            "verb": self.verb,
            "plugin": self.plugin,
            "fingerprint": self.fingerprint,
            "options": dict(self.options),
            "metrics": dict(self.metrics),
            "seconds": self.seconds,
            "finished": self.finished,
        }


def problem_with(directory: Path) -> str | None:
    """Return why a directory cannot be a run directory, or None; leaves no trace."""
    if directory.is_dir():
        foreign = not (directory / MARKER).exists() and any(
            entry.name != "run.lock" for entry in directory.iterdir()
        )
        if foreign:
            return (
                f"run directory {directory}: is not empty and holds no run ({MARKER} is missing); "
                "choose another directory"
            )
    elif directory.exists():
        return f"run directory {directory}: is a file; choose another path"
    nearest = directory
    while not nearest.exists():
        nearest = nearest.parent
    probe = nearest / f".tunesmith-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        return (
            f"run directory {directory}: cannot be written ({reason.lower()}); choose another "
            "directory or mend its permissions"
        )
    return None


class RunStore:
    """Owns a run directory while a run goes; a context manager that holds the directory's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None

    def __enter__(self) -> Self:
        if problem := problem_with(self.path):
            raise RunError(problem)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _lock_file(self.path / "run.lock")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.close()
        self._lock = None

    def write_recipe(self, text: str) -> None:
        """Keep the recipe as YAML."""
        _write_atomically(self.path / MARKER, text)

    def write_lock(self, lock: Mapping[str, Any]) -> None:
        """Keep what the recipe was resolved to."""
        _write_atomically(self.path / "lock.json", json.dumps(lock, indent=2, sort_keys=True))

    def find(self, name: str, fingerprint: str) -> Stage | None:
        """Return the finished stage of this name if its fingerprint is this one."""
        stage = _read_stage(self._final(name))
        return stage if stage is not None and stage.fingerprint == fingerprint else None

    def begin(self, name: str, fingerprint: str) -> Path:
        """Return the directory a stage shall work in.

        What an interrupted attempt with the same fingerprint left there (its checkpoints) is kept;
        anything else is cleared.
        """
        partial = self._partial(name)
        mark = partial / PARTIAL_MARK
        if partial.exists() and not (mark.exists() and mark.read_text() == fingerprint):
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        _write_atomically(mark, fingerprint)
        return partial

    def finish(self, stage: Stage) -> Stage:
        """Turn a stage's working directory into the finished stage; return it with its time."""
        partial = self._partial(stage.name)
        final = self._final(stage.name)
        done = attrs.evolve(
            stage, path=final, finished=datetime.now(UTC).isoformat(timespec="seconds")
        )
        (partial / PARTIAL_MARK).unlink(missing_ok=True)
        _write_atomically(
            partial / "stage.json", json.dumps(done.to_dict(), indent=2, ensure_ascii=False)
        )
        partial.rename(final)
        return done

    def supersede(self, keep: Mapping[str, str]) -> list[tuple[str, Path]]:
        """Move finished stages that no longer belong out of the way; return (name, where to).

        `keep` maps the names of the present recipe's stages to their fingerprints.
        """
        moved: list[tuple[str, Path]] = []
        for stage in read_stages(self.path):
            if keep.get(stage.name) == stage.fingerprint:
                continue
            moved.append((stage.name, self._put_aside(stage)))
        return moved

    def _put_aside(self, stage: Stage) -> Path:
        shelf = self.path / "superseded"
        _refuse_link(shelf)
        shelf.mkdir(exist_ok=True)
        first = f"{stage.name}-{stage.fingerprint[:8]}"
        target = shelf / first
        number = 1
        while os.path.lexists(target):  # the very same stage, moved here before: both are kept
            number += 1
            target = shelf / f"{first}-{number}"
        stage.path.rename(target)
        return target

    def _final(self, name: str) -> Path:
        return self._stages() / _checked(name)

    def _partial(self, name: str) -> Path:
        return self._stages() / f".{_checked(name)}.partial"

    def _stages(self) -> Path:
        stages = self.path / "stages"
        _refuse_link(stages)
        return stages


def _checked(name: str) -> str:
    if not STAGE_NAME.fullmatch(name):
        raise RunError(
            f"stage name {name!r}: expected a number and a label of letters, digits, '.', '_' and "
            "'-', such as 03-sft; a plugin's name becomes the label"
        )
    return name


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise RunError(
            f"{path}: is a link to {os.readlink(path)}, and nothing outside of the run directory "
            "is touched; remove the link, or choose another directory"
        )


def read_stages(path: Path) -> list[Stage]:
    """Return a run directory's finished stages in order."""
    directory = path / "stages"
    if not directory.is_dir():
        return []
    _refuse_link(directory)
    found = (
        _read_stage(entry)
        for entry in sorted(directory.iterdir())
        if STAGE_NAME.fullmatch(entry.name)
    )
    return [stage for stage in found if stage is not None]


def _read_stage(directory: Path) -> Stage | None:
    """Return the stage in a directory; its name and fingerprint are never taken on trust."""
    _refuse_link(directory)
    file = directory / "stage.json"
    if not file.is_file():
        return None
    try:
        row = json.loads(file.read_text(encoding="utf-8"))
        stage = Stage(path=directory, **row)
        if stage.name != directory.name:
            raise ValueError(f"it names the stage {stage.name!r}")
        if not FINGERPRINT.fullmatch(stage.fingerprint):
            raise ValueError(f"its fingerprint is {stage.fingerprint!r}")
    except (ValueError, TypeError) as error:
        raise RunError(
            f"{file}: is damaged ({error}); delete the directory {directory} to run that stage anew"
        ) from error
    return stage


def _write_atomically(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with draft.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)


def _lock_file(path: Path) -> Any:
    """Return an open file whose advisory lock keeps a second run out."""
    stream = path.open("a+", encoding="utf-8")
    try:
        import fcntl
    except ImportError:  # not a POSIX system: no lock to be had
        return stream
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        holder = stream.read().strip() or "unknown"
        stream.close()
        raise RunError(
            f"run directory {path.parent}: in use by process {holder}; wait for it, or choose "
            "another directory"
        ) from None
    stream.seek(0)
    stream.truncate()
    stream.write(str(os.getpid()))
    stream.flush()
    return stream
