"""What every typed verb does: append the step that its signature describes, as it was given.

`tunesmith.verbs` is written by tools/write_verbs.py and holds signatures alone; this is the code
behind them.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, Self, TypeVar, cast, get_args, is_typeddict

from tunesmith.errors import OptionError
from tunesmith.other_names import unknown_option, unknown_setting
from tunesmith.recipe import VERBS

__all__ = ["SUGAR", "Chain", "settings", "sugar"]

P = ParamSpec("P")
R = TypeVar("R")

SUGAR: dict[tuple[str, str], str] = {}
"""(verb, plugin) to the method that stands for it."""


class Chain:
    """What verbs are methods of: something that a step can be appended to."""

    __slots__ = ()

    def _with(
        self,
        verb: str,
        plugin: str | Any,
        options: dict[str, Any],
        data: Any = None,
        format: str | None = None,
        name: str | None = None,
    ) -> Self:
        """Return it with one more step; `OptionError` for options that the plugin cannot take."""
        raise NotImplementedError


def sugar(verb: str, plugin: str, **defaults: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a method append the step that its signature describes, with only what was given.

    A method's `**options` are a TypedDict: the options that it shares with others. Their defaults,
    which stand in `Annotated`, are these `defaults` where it has another one. The signature and the
    docstring that the method has at run time tell of every option.
    """

    def decorate(declared: Callable[P, R]) -> Callable[P, R]:
        signature, shared = _whole_signature(declared, defaults)
        known = list(signature.parameters)[1:]
        takes_data = VERBS[verb].takes_data
        SUGAR[verb, plugin] = declared.__name__

        @functools.wraps(declared)
        def append(self: Chain, *args: Any, **options: Any) -> Any:
            config_alone = len(args) == 1 and options.keys() <= {"name"} & set(known)
            if config_alone and not takes_data and not isinstance(args[0], str):
                return self._with(verb, args[0], {}, **options)
            if len(args) > takes_data:
                raise OptionError([f".{plugin}() takes its options by name, such as {known[-1]}=…"])
            if args and "data" in options:
                raise OptionError([f".{plugin}() got its data twice; give it once"])
            data = args[0] if args else options.pop("data", None)
            if unknown := [unknown_option(key, plugin, known) for key in options.keys() - known]:
                raise OptionError(sorted(unknown))
            if takes_data and data is None:
                raise OptionError([f".{plugin}() needs data: a file, a hub id or rows"])
            own = {key: options.pop(key, None) for key in ("format", "name") if key in known}
            return self._with(verb, plugin, options, data, **own)

        append.__signature__ = signature  # type: ignore[attr-defined]
        if shared is not None:
            append.__doc__ = _whole_docstring(append.__doc__ or "", shared.__doc__ or "")
        return cast("Callable[P, R]", append)

    return decorate


def settings(declared: Callable[P, R]) -> Callable[P, R]:
    """Have a keyword that a function does not take answered with what it is called here."""
    known = list(inspect.signature(declared).parameters)[1:]

    @functools.wraps(declared)
    def checked(*args: P.args, **given: P.kwargs) -> R:
        if unknown := [name for name in given if name not in known]:
            raise OptionError([unknown_setting(name, known, "setting") for name in unknown])
        return declared(*args, **given)

    return checked


def _whole_signature(
    declared: Callable[..., Any], defaults: Mapping[str, Any]
) -> tuple[inspect.Signature, Any]:
    """Return a signature in which the shared options are written out, and their TypedDict."""
    signature = inspect.signature(declared)
    parameters = list(signature.parameters.values())
    if parameters[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        return signature, None
    (shared,) = get_args(parameters.pop().annotation)
    assert is_typeddict(shared)
    for name, annotated in shared.__annotations__.items():
        hint, default = get_args(annotated)
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=defaults.get(name, default),
                annotation=hint,
            )
        )
    return signature.replace(parameters=parameters), shared


def _whole_docstring(own: str, shared: str) -> str:
    """Return a docstring followed by what another one says of options that it does not tell of."""
    own, shared = inspect.cleandoc(own), inspect.cleandoc(shared)
    told = set(_TOLD.findall(own))
    title, *entries = _ENTRY.split(shared)
    more = [entry for entry in entries if entry.partition(":")[0] not in told]
    return "\n".join([own, "", title.rstrip(), "", *more])


_TOLD = re.compile(r"^(\w+): ", re.MULTILINE)
_ENTRY = re.compile(r"\n(?=\w+: )")
