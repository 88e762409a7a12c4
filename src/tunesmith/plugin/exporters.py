"""Interface of an exporter: from a session to files that other programs open."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from tunesmith.plugin.conditions import Resolved

if TYPE_CHECKING:
    from tunesmith.plugin.session import Session

__all__ = ["Exporter"]

C = TypeVar("C")


class Exporter(Resolved, ABC, Generic[C]):
    """Writes the session's model, or something about it, for others."""

    makes_model: ClassVar[bool] = False
    """Whether it makes a plain model that the run goes on from: an artefact called "model"."""
    merges: ClassVar[bool] = False
    """Whether it adds what was trained into the base's weights, which not every method can."""
    makes_adapter: ClassVar[bool] = False
    """Whether it makes an adapter that the run goes on with: an artefact called "adapter"."""

    reads_run: ClassVar[bool] = False
    """Whether what it writes depends on the record of the run (`session.run`) or on the figures of
    earlier stages (`session.metrics`): its stage is then made anew where one of these has changed,
    an evaluation before it included."""

    def __init__(self, config: C) -> None:
        self.config = config

    @classmethod
    def reads(cls, config: C) -> tuple[str, ...]:
        """Return the names of the adapters that it reads beside the current one, for a plan."""
        return ()

    @abstractmethod
    def export(self, session: Session, directory: Path) -> Mapping[str, Path]:
        """Write into `directory`, which exists and is empty; return what was made, by name.

        Those are its artefacts, files or directories within `directory`; a later exporter finds
        one again by `session.artefact(name)`. A "model" is a Hugging Face model directory.
        """
