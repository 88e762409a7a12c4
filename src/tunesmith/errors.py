"""Every exception a user can meet: what was got, what is allowed, what to do next.

All of them derive from `TunesmithError`, so `except TunesmithError` catches what tunesmith itself
finds wrong and nothing else. Where a builtin says the same thing (`ValueError` for a bad value,
`FileNotFoundError` for a file that is not there) the class derives from it as well.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "DataError",
    "MissingExtraError",
    "ModelError",
    "OpError",
    "OptionError",
    "PlanError",
    "PluginError",
    "RecipeError",
    "RowError",
    "RunError",
    "TunesmithError",
    "UnknownPluginError",
    "UnknownVerbError",
    "close_matches",
    "listed",
]


class TunesmithError(Exception):
    """Base of every error that tunesmith raises on purpose."""


class RecipeError(TunesmithError, ValueError):
    """A recipe file or mapping that cannot be read as a recipe."""


class OptionError(TunesmithError, ValueError):
    """One or more options of a step are wrong; `problems` holds one line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class PluginError(TunesmithError):
    """A plugin that was asked for cannot be used: it failed to load, or its API is another."""


class UnknownPluginError(PluginError, LookupError):
    """No plugin of that kind bears the name that was asked for."""


class UnknownVerbError(TunesmithError, AttributeError):
    """A Tuner has no method of the name that was asked for; the message says what there is."""


class DataError(TunesmithError, ValueError):
    """Data that cannot be read: missing, empty, broken, or of a shape no format knows."""


class RowError(DataError):
    """One row that a format cannot turn into an example.

    A format raises it with the field and what stood there; the reader of the data adds which file
    and which row on the way up, by `at`.
    """

    def __init__(self, field: str, got: str, allowed: str, *, where: str = "") -> None:
        self.field = _within(field)
        self.got = _within(got)
        self.allowed = allowed
        self.where = where
        place = f"{where}: " if where else ""
        super().__init__(f"{place}field '{self.field}': got {self.got}; expected {allowed}")

    def at(self, where: str) -> RowError:
        """Return the same error, told where its row stands."""
        return type(self)(self.field, self.got, self.allowed, where=where)


def _within(text: str) -> str:
    """Return what stood in a row cut to what fits into a message: it may be of any length."""
    return text if len(text) <= 300 else f"{text[:200]}... ({len(text):,} characters)"


class ModelError(TunesmithError, ValueError):
    """A model that cannot be found, read, or used for what was asked."""


class OpError(TunesmithError, ValueError):
    """A numeric operation was given a tensor or a setting it cannot work with."""


class PlanError(TunesmithError, ValueError):
    """A recipe that cannot run here; `problems` holds every reason that was found."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem found" if count == 1 else f"{count} problems found"
        body = "\n".join(f"  {number}. {text}" for number, text in enumerate(self.problems, 1))
        super().__init__(f"{head} before any weight was read:\n{body}")


class RunError(TunesmithError, RuntimeError):
    """A run that cannot go on: its directory is in use, belongs to something else, or is broken."""


class MissingExtraError(TunesmithError, ImportError):
    """An optional package is needed and not installed; the message holds the exact command."""

    def __init__(self, package: str, purpose: str, command: str) -> None:
        self.package = package
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed; {command}"
        )


def close_matches(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the nearest known names, or nothing if none is near."""
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.5)
    if not near:
        return ""
    return "; did you mean " + " or ".join(f"'{match}'" for match in near) + "?"


def listed(names: Iterable[str]) -> str:
    """Return names as a sorted, comma-separated list, or "none" if there are none."""
    return ", ".join(sorted(names)) or "none"
