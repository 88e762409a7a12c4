"""Interface of a data format: from a row to an example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from tunesmith.data.examples import Example

__all__ = ["Format"]

C = TypeVar("C")


class Format(ABC, Generic[C]):
    """Turns rows of one layout into examples.

    An implementation sees one row at a time and never a file, so it works the same for JSON, CSV,
    Parquet, a hub data set and a list of dicts.
    """

    def __init__(self, config: C) -> None:
        self.config = config

    @abstractmethod
    def recognise(self, row: Mapping[str, Any]) -> int:
        """Return how many of this row's fields the format accounts for; 0 if it is not its kind.

        Of all formats the one that accounts for most fields is taken; a tie is an error that asks
        the user to name one.
        """

    @abstractmethod
    def convert(self, row: Mapping[str, Any]) -> Example:
        """Return the example in a row.

        Errors: `RowError(field, got, allowed)` for a field that is missing or of another type.
        """
