"""The run directory and its one owner: nothing else writes into it.

    runs/a/
      recipe.yaml              what was asked
      lock.json                what it was resolved to: versions, hashes, plugins, fingerprints
      report.html
      run.lock                 held while a run goes: by which process
      stages/03-sft/           one directory a finished stage
        stage.json             fingerprint, options, metrics, seconds, hashes of the files; sealed
        checked.json           by which marks of the files they need not be hashed again
        adapter/ or model/     what it made
        log.jsonl              what the trainer logged
        dropped.jsonl          rows that were left out, and why
        cut.jsonl              rows that are used without the end of their answer
        checkpoints/           where options asked for them
      stages/.03-sft.partial/  a stage at work, or one that was interrupted
      superseded/              stages that a changed recipe has replaced
      damaged/                 what was found not to be as it was written

A stage appears under its name by one rename, when it is complete. What is read here may come from
anywhere: names are checked, no link is followed, and what this code did not write is not removed.
See docs/adr/0013-complete-or-not-there.md and docs/runs.md.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs

from tunesmith.engine.durable import (
    DRAFT,
    free_name,
    publish,
    remove,
    sync_directory,
    sync_tree,
    told,
    write_text,
)
from tunesmith.engine.locking import LOCK, DirectoryLock
from tunesmith.engine.seals import (
    Files,
    check_listing,
    first_difference,
    listed_files,
    marks,
    read_object,
    sealed,
    unsealed,
)
from tunesmith.errors import RunError
from tunesmith.recipe import VERBS, is_name

__all__ = [
    "SAMPLES",
    "RunStore",
    "Stage",
    "check_stage",
    "finished_stages",
    "partial_of",
    "problem_with",
    "read_lock",
    "read_stages",
]

MARKER = "recipe.yaml"
PARTIAL_MARK = "fingerprint"
CHECKED = "checked.json"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples.jsonl"
"""What a metric has kept of a model's answers, in its stage's directory."""
STAGE_NAME = re.compile(r"\d{2,}-[A-Za-z0-9][A-Za-z0-9._-]*")
FINGERPRINT = re.compile(r"[0-9a-f]{2,64}")
FILES = (MARKER, "lock.json", "report.html")
DIRECTORIES = ("stages", "superseded", "damaged")
UNHASHED = (
    "stage.json",
    CHECKED,
    PARTIAL_MARK,
    CHECKPOINTS,
    "log.jsonl",
    "dropped.jsonl",
    "cut.jsonl",
    "tensorboard",
)
"""What a stage may do without, or what is told from itself."""


@attrs.frozen
class Stage:
    """What a step has done, kept durably."""

    name: str
    """Number and label, such as "03-sft"; also that of its directory."""
    path: Path
    verb: str
    plugin: str
    fingerprint: str
    options: Mapping[str, Any] = attrs.field(factory=dict)
    """As they acted: what was left out is as it was decided to be."""
    setup: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)
    """What was said of the model before: plugin and options of such steps, by their name."""
    metrics: Mapping[str, float] = attrs.field(factory=dict)
    seconds: float = 0.0
    finished: str = ""
    """ISO 8601 time, UTC."""
    artefacts: Mapping[str, str] = attrs.field(factory=dict)
    """What others may find again, by name: paths in the stage's directory, with "/"."""
    adapter_name: str = ""
    """Name of the adapter among them that the run goes on with; empty where there is none."""
    files: Files = attrs.field(factory=dict)
    """Size and SHA-256 of everything that was made, by its path in the stage's directory."""

    @property
    def paths(self) -> Mapping[str, Path]:
        """Where each artefact lies."""
        return {name: self.path / place for name, place in self.artefacts.items()}

    @property
    def adapter(self) -> Path | None:
        """Directory of the adapter that the stage made, if it made one to go on with."""
        return self.paths.get("adapter") if self.adapter_name else None

    @property
    def model(self) -> Path | None:
        """Directory of the full model that the stage made, if it made one to go on from."""
        return self.paths.get("model")

    def to_dict(self) -> dict[str, Any]:
        """Return what stage.json holds."""
        return {
            field.name: getattr(self, field.name)
            for field in attrs.fields(Stage)
            if field.name != "path"
        }


def problem_with(directory: Path) -> str | None:
    """Return why a directory cannot be a run directory, or None; leaves no trace."""
    try:
        # asked in this order: another process may be making it at this moment
        if os.path.lexists(directory):
            if not directory.is_dir():
                return f"run directory {directory}: is a file; choose another path"
            # a run that has just begun, or was killed as it began, has left no more than this
            foreign = not (directory / MARKER).exists() and not (directory / MARKER).is_symlink()
            if foreign and (others := [e for e in directory.iterdir() if not _own(e.name)]):
                return (
                    f"run directory {directory}: is not empty and holds no run ({MARKER} is "
                    f"missing, {others[0].name} is there); choose another directory"
                )
        nearest = directory
        while not nearest.exists():
            nearest = nearest.parent
    except OSError as error:
        return _unwritable(directory, error.strerror or str(error))
    if not nearest.is_dir():
        return _unwritable(directory, f"{nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        return _unwritable(directory, f"{nearest} is read-only or not yours")
    return None


def _own(name: str) -> bool:
    draft = DRAFT.fullmatch(name)
    return name == LOCK or name in (*FILES, *DIRECTORIES) or bool(draft and draft["name"] in FILES)


def _unwritable(directory: Path, reason: str) -> str:
    return (
        f"run directory {directory}: cannot be written ({reason.lower()}); choose another "
        "directory or mend its permissions"
    )


class RunStore:
    """Owns a run directory while a run goes; a context manager that holds the directory's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.warn: Callable[[str], None] = lambda text: None
        """Told what was found broken and where it is kept."""
        self._lock = DirectoryLock(path)

    def __enter__(self) -> Self:
        problem = problem_with(self.path)
        # one that is being made by another run is in use, whatever it lacks yet
        if problem and not (self.path / LOCK).is_file():
            raise RunError(problem)
        with told(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock.__enter__()
        try:
            if problem := problem_with(self.path):
                raise RunError(problem)
            self._check_places()
            self._clear_drafts()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.__exit__(kind, error, trace)

    def write_recipe(self, text: str) -> None:
        """Keep the recipe as YAML."""
        write_text(self.path / MARKER, text)

    def write_lock(self, lock: Mapping[str, Any]) -> None:
        """Keep what the recipe was resolved to."""
        write_text(self.path / "lock.json", json.dumps(lock, indent=2, sort_keys=True))

    def find(self, name: str, fingerprint: str) -> Stage | None:
        """Return the finished stage of this name if its fingerprint is this one.

        One whose files are not as they were written is named, put aside, and not returned.
        """
        final = self._final(name)
        if not os.path.lexists(final):
            return None
        try:
            stage = _read_stage(final)
            check_stage(stage)
        except RunError as error:
            self.warn(
                f"{_first_clause(error)}; it is kept in {self.put_aside(final)}, and made anew"
            )
            return None
        if stage.fingerprint != fingerprint:
            return None
        self._tidy(stage)
        return stage

    def begin(self, name: str, fingerprint: str) -> Path:
        """Return the directory a stage shall work in.

        The checkpoints of an interrupted attempt with the same fingerprint are kept there, those of
        another are put aside; anything else is cleared.
        """
        partial = self._partial(name)
        if os.path.lexists(partial) and not _is_marked(partial, fingerprint):
            self._clear_partial(name, partial)
        with told(partial):
            partial.mkdir(parents=True, exist_ok=True)
        checkpoints = partial / CHECKPOINTS
        for entry in list(partial.iterdir()):
            if entry.name == PARTIAL_MARK or (entry == checkpoints and _is_directory(entry)):
                continue
            remove(entry, self.path)
        if not (partial / PARTIAL_MARK).exists():
            write_text(partial / PARTIAL_MARK, fingerprint)
        return partial

    def finish(self, stage: Stage) -> Stage:
        """Turn a stage's working directory into the finished stage; return it with its time.

        Its checkpoints stay until the stage has its name, and after that if they were asked for.
        """
        partial = self._partial(stage.name)
        final = self._final(stage.name)
        with told(partial, kept=lambda: f"the stage's work is kept in {partial}"):
            done = attrs.evolve(
                stage,
                path=final,
                finished=datetime.now(UTC).isoformat(timespec="seconds"),
                files=listed_files(partial, UNHASHED),
            )
            write_text(partial / "stage.json", sealed(done.to_dict()))
            write_text(partial / CHECKED, json.dumps(marks(partial, done.files)))
            sync_tree(partial, leave_out=CHECKPOINTS)  # synced as they were written
            publish(partial, final)
        self._tidy(done)
        return done

    def supersede(self, keep: Mapping[str, str]) -> list[tuple[str, Path]]:
        """Move finished stages that no longer belong out of the way; return (name, where to).

        `keep` maps the names of the present recipe's stages to their fingerprints. What is no
        stage as it was finished is put aside as damaged.
        """
        moved: list[tuple[str, Path]] = []
        for directory in _stage_directories(self.path):
            try:
                stage = _read_stage(directory)
            except RunError as error:
                where = self.put_aside(directory)
                self.warn(f"{_first_clause(error)}; it is kept in {where}, and made anew")
                continue
            if keep.get(stage.name) != stage.fingerprint:
                name = f"{stage.name}-{stage.fingerprint[:8]}"
                moved.append((stage.name, self._move(stage.path, "superseded", name)))
        return moved

    def put_aside(self, path: Path) -> Path:
        """Move what is not as it was written to `damaged/`; return where it is now."""
        within = path.relative_to(self.path / "stages")
        name = "-".join(part.strip(".").removesuffix(".partial") for part in within.parts)
        return self._move(path, "damaged", name.replace(f"-{CHECKPOINTS}-", "-"))

    def _move(self, path: Path, shelf: str, name: str) -> Path:
        directory = self.path / shelf
        _refuse_link(directory)
        with told(directory):
            directory.mkdir(exist_ok=True)
            target = free_name(directory, name)
            path.rename(target)
            sync_directory(path.parent)
            sync_directory(directory)
        return target

    def _tidy(self, stage: Stage) -> None:
        """Remove what only an unfinished stage needs."""
        asked = stage.options.get("save_strategy") in ("steps", "epoch")
        if not asked and os.path.lexists(stage.path / CHECKPOINTS):
            remove(stage.path / CHECKPOINTS, self.path)
        if os.path.lexists(stage.path / PARTIAL_MARK):
            remove(stage.path / PARTIAL_MARK, self.path)

    def _clear_partial(self, name: str, partial: Path) -> None:
        """Make room for a stage whose directory holds work of another recipe, or of none."""
        mark = _mark_of(partial)
        checkpoints = partial / CHECKPOINTS
        if mark and _is_directory(checkpoints) and any(checkpoints.glob("checkpoint-*")):
            target = self._move(partial, "superseded", f"{name}-{mark[:8]}-unfinished")
            self.warn(f"{name} was begun by another recipe; its checkpoints are kept in {target}")
        elif mark or (_is_directory(partial) and not any(map(_not_a_draft, partial.iterdir()))):
            remove(partial, self.path)
        else:
            self.warn(
                f"{partial.name} bears no fingerprint of a stage; it is kept in "
                f"{self.put_aside(partial)}"
            )

    def _check_places(self) -> None:
        """Refuse links, and directories where files are meant."""
        for name in (*FILES, *DIRECTORIES):
            place = self.path / name
            _refuse_link(place)
            if not os.path.lexists(place):
                continue
            if place.is_dir() != (name in DIRECTORIES):
                found, meant = "directory", "file"
                if name in DIRECTORIES:
                    found, meant = meant, found
                raise RunError(
                    f"{place}: is a {found} where a {meant} is meant; move it away, or choose "
                    "another directory"
                )

    def _clear_drafts(self) -> None:
        """Remove what a killed run was writing."""
        for directory in (self.path, self.path / "stages"):
            for entry in list(directory.iterdir()) if directory.is_dir() else []:
                draft = DRAFT.fullmatch(entry.name)
                if draft and draft["name"] in FILES:
                    remove(entry, self.path)

    def _final(self, name: str) -> Path:
        return self.path / "stages" / _checked(name)

    def _partial(self, name: str) -> Path:
        return partial_of(self.path, _checked(name))


def partial_of(path: Path, name: str) -> Path:
    """Return where in a run directory a stage is while it is not finished."""
    return path / "stages" / f".{name}.partial"


def read_stages(path: Path) -> list[Stage]:
    """Return a run directory's finished stages in order; each is as it was finished.

    Errors: `RunError` for the first that is not.
    """
    stages = finished_stages(path)
    for stage in stages:
        check_stage(stage)
    return stages


def finished_stages(path: Path) -> list[Stage]:
    """Return what the records of a run directory's stages tell; their files are not looked at."""
    return [_read_stage(directory) for directory in _stage_directories(path)]


def check_stage(stage: Stage) -> None:
    """Refuse a stage whose files are not those that were written.

    A file of the size and times it had is not read; after a copy each is hashed once. Errors:
    `RunError` with what is wrong and what to do.
    """
    memory = stage.path / CHECKED
    try:
        known: Mapping[str, Any] = read_object(memory)
    except ValueError:
        known = {}
    if wrong := first_difference(stage.path, stage.files, known):
        raise _damaged(stage.path, wrong)
    present = marks(stage.path, stage.files)
    if known != present:
        with suppress(OSError, RunError):  # where it may only be read, it is hashed each time
            write_text(memory, json.dumps(present))


def read_lock(path: Path) -> dict[str, Any]:
    """Return what a run was resolved to: lock.json, its fields of the types they have.

    Errors: `RunError` says what is wrong with it.
    """
    file = path / "lock.json"
    try:
        lock = read_object(file)
        for name in ("device", "precision"):
            if not isinstance(lock.get(name), str):
                raise ValueError(f"'{name}' is {lock.get(name)!r} and not a text")
        if lock["precision"] not in ("fp32", "bf16", "fp16"):
            raise ValueError(f"'precision' is {lock['precision']!r}")
    except ValueError as error:
        raise RunError(
            f"{file}: is damaged: {error}; run the recipe in this directory again, which writes "
            "it anew and reuses what is finished"
        ) from error
    return lock


def _stage_directories(path: Path) -> Sequence[Path]:
    directory = path / "stages"
    if not os.path.lexists(directory):
        return []
    _refuse_link(directory)
    if not directory.is_dir():
        raise RunError(
            f"{directory}: is a file where a directory is meant; this is no run directory, or "
            "a damaged one"
        )
    try:
        return sorted(e for e in directory.iterdir() if STAGE_NAME.fullmatch(e.name))
    except OSError as error:
        raise RunError(
            f"{directory}: cannot be read: {error.strerror}; mend its permissions"
        ) from error


def _read_stage(directory: Path) -> Stage:
    """Return the stage in a directory; nothing in its record is taken on trust."""
    if directory.is_symlink():
        raise _damaged(directory, "it is a link, and nothing outside of the run is touched")
    if not directory.is_dir():
        raise _damaged(directory, "it is a file where a directory is meant")
    try:
        row = unsealed(read_object(directory / "stage.json"))
        return _stage(directory, row)
    except ValueError as error:
        raise _damaged(directory, f"stage.json: {error}") from error


def _stage(directory: Path, row: dict[str, Any]) -> Stage:
    """Return the stage that a record tells of; `ValueError` names the first field that is wrong."""
    kinds: dict[str, Any] = {
        "name": str,
        "verb": str,
        "plugin": str,
        "fingerprint": str,
        "options": dict,
        "setup": dict,
        "metrics": dict,
        "seconds": (int, float),
        "finished": str,
        "artefacts": dict,
        "adapter_name": str,
        "files": dict,
    }
    for name in kinds.keys() - row.keys():
        raise ValueError(f"the field '{name}' is missing")
    for name in row.keys() - kinds.keys():
        raise ValueError(f"the field '{name}' is unknown")
    for name, kind in kinds.items():
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ValueError(f"'{name}' is {row[name]!r:.80}")
    if row["name"] != directory.name:
        raise ValueError(f"it names the stage {row['name']!r:.80}")
    if not FINGERPRINT.fullmatch(row["fingerprint"]):
        raise ValueError(f"its fingerprint is {row['fingerprint']!r:.80}")
    if row["verb"] not in VERBS or not VERBS[row["verb"]].leaves_stage:
        raise ValueError(f"its verb is {row['verb']!r:.80}")
    for name, value in row["metrics"].items():
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"the metric '{name}' is {value!r:.80}")
    check_listing(row["files"])
    if row["adapter_name"] and not is_name(row["adapter_name"]):
        raise ValueError(f"its adapter is called {row['adapter_name']!r:.80}")
    for name, place in row["artefacts"].items():
        # a listed file, or a directory of some: so it is within the stage
        if not any(f"{file}/".startswith(f"{place}/") for file in row["files"]):
            raise ValueError(f"the artefact '{name:.80}' is {place!r:.80}, which has no files")
    return Stage(path=directory, **row)


def _damaged(directory: Path, why: str) -> RunError:
    return RunError(
        f"stage {directory.name} in {directory}: is damaged: {why}; run the recipe in this "
        "directory again, which puts the stage aside and makes it anew"
    )


def _first_clause(error: RunError) -> str:
    return str(error).rpartition("; run the recipe")[0]


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


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _not_a_draft(path: Path) -> bool:
    return not DRAFT.fullmatch(path.name)


def _mark_of(partial: Path) -> str | None:
    """Return the fingerprint that a working directory was made for, if it is one."""
    mark = partial / PARTIAL_MARK
    if not _is_directory(partial) or mark.is_symlink() or not mark.is_file():
        return None
    try:
        text = mark.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return None
    return text if FINGERPRINT.fullmatch(text) else None


def _is_marked(partial: Path, fingerprint: str) -> bool:
    return _mark_of(partial) == fingerprint
