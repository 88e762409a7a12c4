"""Models that were given as objects, kept: each written once, to a directory named by its content.

A run has to outlive its process, and an object does not. So its weights are written under
tunesmith's cache before the run begins, and the run's recipe names that directory. The object is
read and not touched. See docs/adr/0025-a-model-in-memory.md.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.engine.checks import ModelFindings, Use, examine
from tunesmith.engine.durable import (
    DRAFT,
    draft_of,
    free_name,
    publish,
    remove,
    require_room,
    sync_tree,
    told,
    write_text,
)
from tunesmith.engine.seals import (
    check_listing,
    first_difference,
    listed_files,
    marks,
    read_object,
    sealed,
    unsealed,
)
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.recipe_model import ModelObject
from tunesmith.units import byte_size

if TYPE_CHECKING:
    from tunesmith.nn.given import Given

__all__ = ["VERSION", "examine_object", "kept_model"]

VERSION = 1
"""Raised when what is written of a model changes, so that old directories are left alone."""
_LISTING, _MARKS = ".kept", ".checked"
_ABANDONED = 24 * 3600.0
"""Seconds after which a half-written directory is one of a process that was killed."""


def kept_model(model: ModelObject, root: Path) -> Path:
    """Return the directory below `root` that holds a model, written now if it is not there.

    One that is there is compared with what was written; a damaged one is put aside and written
    anew. Errors: `ModelError` for a model that no directory can hold; `RunError` for one that
    cannot be written.
    """
    with told(root):
        root.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(root)
    draft = draft_of(root / "model")
    remove(draft, root)
    with told(draft, within=draft):
        draft.mkdir()
    try:
        found = _described(model, draft)
        directory = root / f"{found.base.config.model_type}-{_digest(draft, found)}"
        if directory.is_dir():
            if (problem := _problem(directory)) is None:
                return directory
            aside = free_name(root, f"{directory.name}-damaged")
            directory.rename(aside)
            logging.getLogger("tunesmith").warning(
                "%s: %s; it is kept in %s, and written anew", directory, problem, aside
            )
        require_room(root, found.nbytes, f"keeping the {model}")
        with told(directory, need=found.nbytes, within=draft):
            _write_weights(found, draft)
            files = listed_files(draft)
            write_text(draft / _LISTING, sealed({"files": files}))
            sync_tree(draft)
            try:
                publish(draft, directory)
            except OSError:
                if not directory.is_dir():  # another process may have been first
                    raise
        _note_marks(directory, files)
        return directory
    finally:
        with suppress(OSError, TunesmithError):
            remove(draft, root)


def examine_object(
    model: ModelObject, *, chat_template: str | None, uses: Sequence[Use], root: Path
) -> tuple[ModelFindings, dict[str, Any] | None]:
    """Look at a model in memory as at a directory; return what was found, and its quantization.

    No weight is read or written.
    """
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as place:
        try:
            given = _described(model, Path(place))
        except ModelError as error:
            return ModelFindings(problems=[_named(str(error), model, place)]), None
        found = examine(
            Path(place),
            chat_template=chat_template,
            uses=uses,
            stored=given.stored,
            weights=False,
        )
        found.problems = [_named(text, model, place) for text in found.problems]
        found.notes = [_named(text, model, place) for text in found.notes]
    if not found.problems:
        found.notes.append(
            f"the model that was given stays as it is, and in memory ({byte_size(given.nbytes)}); "
            f"the run writes a copy to {root}, which its recipe names, and loads that"
        )
    return found, given.stored


def _named(text: str, model: ModelObject, place: str) -> str:
    return text.replace(f"model {place}", f"model {model}").replace(place, f"{model}")


def _described(model: ModelObject, directory: Path) -> Given:
    """Write what belongs to a model besides its weights; return what they are."""
    from tunesmith.nn.given import given
    from tunesmith.nn.saving import save_description
    from tunesmith.plugin.quantizers import Quantizer

    base = model.model.get_base_model() if model.is_peft else model.model
    file = directory / "config.json"

    def describe(dtype: Any, tied: bool, stored: dict[str, Any] | None) -> None:
        try:
            save_description(base, model.tokenizer, directory, dtype=dtype, tied=tied)
        except ModelError as error:
            cause = error.__cause__ or error
            raise ModelError(
                f"the {model} cannot be kept: what belongs to it besides its weights cannot be "
                f"written: {type(cause).__name__}: {cause}; save it and its tokenizer by "
                "save_pretrained(), and give the directory"
            ) from error
        if stored is not None:
            row = json.loads(file.read_text(encoding="utf-8"))
            text = json.dumps({**row, "quantization_config": stored}, indent=2, default=str)
            file.write_text(text + "\n", encoding="utf-8")

    describe(base.dtype, True, None)
    found = given(model.model, Quantizer[None](None), directory)
    describe(found.dtype, found.tied, found.stored)
    return found


def _digest(directory: Path, found: Given) -> str:
    """Return a hash of a model: of its small files, and of each weight as it will be written."""
    import torch

    digest = hashlib.sha256(f"version {VERSION}".encode())
    for file in sorted(directory.iterdir()):
        digest.update(f"{file.name}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    for name in sorted(found.weights):
        tensor = found.weights[name]().detach().to("cpu").contiguous()
        digest.update(f"{name}\0{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()[:32]


def _write_weights(found: Given, directory: Path) -> None:
    from tunesmith.nn.checkpoint import ShardWriter
    from tunesmith.nn.saving import checkpoint_names, not_opened

    writer = ShardWriter(directory)
    try:
        for name, tensor in checkpoint_names(found.base, found.weights):
            writer.add(name, tensor)
    except ModelError:
        # the model's own names open as well
        writer.discard()
        writer = ShardWriter(directory)
        for name, make in found.weights.items():
            writer.add(name, make())
    writer.close()
    problem = not_opened(type(found.base), directory) if found.stored is None else ""
    if problem:
        raise ModelError(
            f"the {type(found.base).__name__} that was given cannot be kept: written as a "
            f"directory it does not open: {problem}; save it by its own save_pretrained(), and "
            "give the directory"
        )


def _problem(directory: Path) -> str | None:
    """Return why a directory is not as it was written, or None."""
    try:
        files = check_listing(unsealed(read_object(directory / _LISTING)).get("files"))
    except ValueError as error:
        return f"its list of files: {error}"
    try:
        known = read_object(directory / _MARKS)
    except ValueError:
        known = {}
    problem = first_difference(directory, files, known)
    if problem is None and known != marks(directory, files):
        _note_marks(directory, files)
    return problem


def _note_marks(directory: Path, files: Any) -> None:
    with suppress(OSError, TunesmithError):  # where it may only be read, it is hashed each time
        write_text(directory / _MARKS, json.dumps(marks(directory, files)))


def _clear_abandoned(root: Path) -> None:
    """Remove what a killed process was writing; its age tells, for it may be another machine's."""
    for entry in list(root.iterdir()):
        if DRAFT.fullmatch(entry.name) and _age(entry) > _ABANDONED:
            with suppress(OSError, TunesmithError):
                remove(entry, root)


def _age(entry: Path) -> float:
    try:
        inner = [each.stat().st_mtime for each in entry.iterdir()] if entry.is_dir() else []
        return time.time() - max([entry.stat().st_mtime, *inner])
    except OSError:  # it was finished in the meantime
        return 0.0
