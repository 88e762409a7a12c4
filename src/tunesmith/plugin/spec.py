"""Spec: what a plugin registers, light enough to list, validate and explain without torch."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from typing import Any

import attrs

from tunesmith.data.examples import EXAMPLE_TYPES
from tunesmith.errors import MissingExtraError, PluginError, TunesmithError, listed

__all__ = ["API_VERSION", "KINDS", "Spec"]

API_VERSION = 1
"""Version of the plugin interfaces; a Spec written for another one is listed but not used."""

KINDS = (
    "formats",
    "transforms",
    "quantizers",
    "methods",
    "trainers",
    "rewards",
    "metrics",
    "exporters",
)

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
"""What a plugin may be called: its name becomes part of a directory's."""


def _names(names: str | Iterable[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)  # one text is one name


@attrs.frozen
class Spec:
    """One thing a plugin can do: its name, its options and where its implementation lies.

    Errors: `PluginError` from `load` if the implementation cannot be imported or is not there;
    `MissingExtraError` if a package that the hint tells how to install is missing.
    """

    name: str
    """Name users write, of `a-z0-9._-`: "lora", "nf4", "alpaca"."""
    config: type
    """attrs class of the options; each field's docstring is its help text."""
    impl: str
    """Lazy path "package.module:Class"; the class is built with a config instance."""
    api: int = API_VERSION
    """`API_VERSION` the implementation was written against."""
    hint: str = ""
    """Command that installs what the implementation needs, such as "pip install trl"."""
    requires: tuple[str, ...] = attrs.field(default=(), converter=_names)
    """Import names of packages it needs; a missing one is a problem of the plan, with hint."""
    example: str | None = None
    """Trainers and metrics: the example shape they take, a key of `EXAMPLE_TYPES`."""
    summary: str = ""
    """One line for `tunesmith plugins`."""

    def __attrs_post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise PluginError(
                f"plugin name {self.name!r}: expected lower case without ':' or '/', such as "
                "'lora': letters, digits, '.', '_' and '-', the first a letter or a digit"
            )
        if not attrs.has(self.config):
            raise PluginError(
                f"plugin '{self.name}': config is {self.config!r}; expected an attrs class"
            )
        if ":" not in self.impl:
            raise PluginError(
                f"plugin '{self.name}': impl is {self.impl!r}; expected 'package.module:Class'"
            )
        if self.example is not None and self.example not in EXAMPLE_TYPES:
            raise PluginError(
                f"plugin '{self.name}': example is {self.example!r}; expected one of "
                f"{listed(EXAMPLE_TYPES)}"
            )

    def load(self) -> type[Any]:
        """Import and return the implementation class."""
        module_name, _, attribute = self.impl.partition(":")
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # "trl_extras.x" is not part of "trl": compare whole names, not letters
            own = f"{module_name}.".startswith(f"{error.name}.")
            if error.name and not own and self.hint:
                raise MissingExtraError(
                    error.name, f"'{self.name}'", f"install it with: {self.hint}"
                ) from error
            raise PluginError(
                f"plugin '{self.name}': {self.impl} cannot be imported: {error}"
            ) from error
        except TunesmithError:
            raise
        except Exception as error:
            raise PluginError(
                f"plugin '{self.name}': importing {self.impl} failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        implementation = getattr(module, attribute, None)
        if not isinstance(implementation, type):
            raise PluginError(
                f"plugin '{self.name}': {module_name} has no class '{attribute}'; "
                "mend the Spec's impl"
            )
        return implementation
