"""Interface of an exporter: from a session to files that other programs open."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from tunesmith.plugin.session import Session

__all__ = ["Exporter"]

C = TypeVar("C")


class Exporter(ABC, Generic[C]):
    """Writes the session's model; nothing is trained after an export."""

    def __init__(self, config: C) -> None:
        self.config = config

    @abstractmethod
    def export(self, session: Session, directory: Path) -> Path | None:
        """Write into `directory`, which exists and is empty.

        Return the path of a Hugging Face model directory that later steps (an evaluation, another
        export) shall load from now on, or None if the session goes on as it is.
        """
