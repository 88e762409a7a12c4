"""Interface of a reward: scores for completions; and rewards as options of a trainer or metric.

A reward is a plugin, by name, or a function, by "package.module:function" or as it is::

    rewards="exact_match"
    rewards=[("exact_match", 1.0), ("my_package.scores:short", 0.2)]

A config class takes them by an option `rewards: Rewards`; `scorer(config.rewards)` scores by them.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import attrs

from tunesmith.data.examples import Prompt
from tunesmith.errors import (
    DataError,
    OptionError,
    PluginError,
    RecipeError,
    TunesmithError,
    UnknownPluginError,
    listed,
)
from tunesmith.plugin.registry import Registry, registry
from tunesmith.recipe import plain
from tunesmith.recipe_values import dotted_name, frozen_options

__all__ = [
    "FunctionReward",
    "Reward",
    "RewardChoice",
    "Rewards",
    "Scorer",
    "Scores",
    "identities",
    "scorer",
]

C = TypeVar("C")


class Reward(ABC, Generic[C]):
    """Scores completions, many at once."""

    def __init__(self, config: C) -> None:
        self.config = config

    @abstractmethod
    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        ids: Sequence[Sequence[int]],
    ) -> Sequence[float | None]:
        """Return a number for each completion, higher for better; None for one it cannot score.

        `prompts[i]` is what `completions[i]` answers, with the other columns of its row in `extra`;
        `ids[i]` are the completion's token ids. Numbers are finite. Errors: `DataError` for a
        column that is missing.
        """


@attrs.frozen
class RewardChoice:
    """A reward as an option names it."""

    reward: str | Callable[..., Any]
    """Name of a plugin, "package.module:function", or a function."""
    weight: float = 1.0
    """What its scores are multiplied by in the sum."""
    options: Mapping[str, Any] = attrs.field(factory=dict, converter=frozen_options)
    """Options of the plugin."""

    expected: ClassVar[str] = (
        "rewards: each a name, 'package.module:function', a function, [reward, weight], or a "
        "mapping with 'reward', 'weight' and its options"
    )

    @classmethod
    def from_option(cls, value: Any) -> RewardChoice:
        """Read one from any of its short forms; `TypeError` or `ValueError` if it is none."""
        if isinstance(value, cls):
            return value
        options: dict[str, Any] = {}
        weight: Any = 1.0
        if isinstance(value, Mapping):
            options = dict(value)
            reward = options.pop("reward")
            weight = options.pop("weight", 1.0)
        elif isinstance(value, (list, tuple)):
            reward, weight = value
        else:
            reward = value
        if not isinstance(reward, str) and not callable(reward):
            raise TypeError("neither a name nor a function")
        if isinstance(weight, bool) or not isinstance(weight, (int, float, str)):
            raise TypeError("the weight is no number")
        weight = float(weight)
        if not math.isfinite(weight):
            raise ValueError("the weight is no finite number")
        return cls(reward, weight, options)

    def to_option(self) -> Any:
        """Return its short form, as a recipe holds it."""
        if self.weight == 1 and not self.options:
            return self.reward
        return {"reward": self.reward, "weight": self.weight, **self.options}

    @property
    def label(self) -> str:
        """What its scores are called, such as "exact_match"."""
        if isinstance(self.reward, str):
            return self.reward.rpartition(":")[2]
        return str(getattr(self.reward, "__name__", type(self.reward).__name__))

    def build(self, found: Registry | None = None) -> Reward[Any]:
        """Return the reward, ready to score.

        Errors: `UnknownPluginError`, `PluginError` and `OptionError`.
        """
        if not isinstance(self.reward, str):
            return self._of(self.reward, self.label)
        known = found if found is not None else registry()
        try:
            item = known.find("rewards", self.reward)
        except UnknownPluginError as error:
            if ":" not in self.reward:
                raise UnknownPluginError(
                    f"{error}; or name a function: 'package.module:function'"
                ) from error
            return self._of(_imported(self.reward), self.reward)
        made: Reward[Any] = item.load()(item.structure(self.options))
        return made

    def identity(self, found: Registry | None = None) -> Any:
        """Return what decides its scores, as plain values: what a fingerprint is made of.

        Of a plugin its version and options, of a function the content of its module's file. What
        cannot be told is never equal to anything: such a stage is made anew in each run.
        """
        known = found if found is not None else registry()
        if isinstance(self.reward, str):
            try:
                item = known.find("rewards", self.reward)
            except UnknownPluginError:
                return [self.weight, self.reward, _file_hash(_imported(self.reward))]
            options = plain(attrs.asdict(item.structure(self.options)))
            return [self.weight, item.key, item.version, options]
        try:
            name = dotted_name(self.reward)
        except RecipeError:
            name = str(getattr(self.reward, "__qualname__", "<"))
            if "<" in name or self.reward.__module__ != "__main__":
                name = secrets.token_hex(16)
        return [self.weight, name, _file_hash(self.reward)]

    def _of(self, function: Any, name: str) -> FunctionReward:
        if self.options:
            raise OptionError(
                [f"the reward {name} is a function and takes no options: {listed(self.options)}"]
            )
        return FunctionReward(function, name)


Rewards: TypeAlias = tuple[RewardChoice, ...]
"""Type of an option that takes rewards."""


class FunctionReward(Reward[None]):
    """A function as a reward, called by keywords as TRL's trainers call one.

    Of `prompts` (lists of messages), `completions` (texts), `completion_ids` and one argument for
    each other column of the rows it is given those that it takes; `completions` it has to take.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        super().__init__(None)
        if not callable(function):
            raise PluginError(
                f"the reward {name} is a {type(function).__name__}; expected a function"
            )
        self.function = function
        self.name = name
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):
            parameters = {}  # type: ignore[assignment]
        kinds = inspect.Parameter
        named = {
            key: each
            for key, each in parameters.items()
            if each.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
        }
        if "completions" not in named:
            raise PluginError(
                f"the reward {name} has no argument 'completions'; expected a function such as "
                "def score(completions, **columns), which returns a number for each"
            )
        self._named = named
        self._takes_all = any(each.kind is kinds.VAR_KEYWORD for each in parameters.values())

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        ids: Sequence[Sequence[int]],
    ) -> Sequence[float | None]:
        """Return what the function says; `DataError` for a column it needs and no row has."""
        columns = dict.fromkeys(key for prompt in prompts for key in prompt.extra)
        given: dict[str, Any] = {
            **{name: [prompt.extra.get(name) for prompt in prompts] for name in columns},
            "prompts": [[turn.to_dict() for turn in prompt.prompt] for prompt in prompts],
            "completions": list(completions),
            "completion_ids": [list(each) for each in ids],
        }
        missing = [
            key
            for key, each in self._named.items()
            if key not in given and each.default is inspect.Parameter.empty
        ]
        if missing:
            raise DataError(
                f"the reward {self.name} needs {listed(missing)}, which the rows do not have; they "
                f"have: {listed(columns)}"
            )
        if not self._takes_all:
            given = {key: value for key, value in given.items() if key in self._named}
        scores: Sequence[float | None] = self.function(**given)
        return scores


@attrs.frozen
class Scores:
    """Scores of completions, in their order."""

    total: tuple[float | None, ...]
    """Weighted sum of those that are there; None where no reward gave one."""
    each: Mapping[str, tuple[float | None, ...]]
    """Each reward's own by its label, before it is weighed."""


class Scorer:
    """Several rewards as one: their weighted sum (as TRL, without those that gave none)."""

    def __init__(self, choices: Sequence[RewardChoice], found: Registry | None = None) -> None:
        """Build each reward; `PluginError` or `OptionError` for one that cannot be."""
        if not choices:
            raise OptionError(["there is no reward; give at least one"])
        self._rewards: dict[str, tuple[float, Reward[Any]]] = {}
        for choice in choices:
            label, number = choice.label, 2
            while label in self._rewards:
                label, number = f"{choice.label}-{number}", number + 1
            self._rewards[label] = (choice.weight, choice.build(found))

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str],
        ids: Sequence[Sequence[int]],
    ) -> Scores:
        """Return the scores of completions, `prompts[i]` being what `completions[i]` answers.

        Errors: `PluginError` for a reward that fails, or that returns something else than a finite
        number or None for each.
        """
        if not len(prompts) == len(completions) == len(ids):
            raise ValueError(
                f"got {len(prompts)} prompts, {len(completions)} completions and {len(ids)} lists "
                "of ids; expected as many of each"
            )
        each: dict[str, tuple[float | None, ...]] = {}
        totals: list[float | None] = [None] * len(completions)
        for label, (weight, reward) in self._rewards.items():
            try:
                found = reward.score(prompts, completions, ids)
            except TunesmithError:
                raise
            except MemoryError:
                raise
            except Exception as error:  # a plugin's or a user's own fault
                raise PluginError(
                    f"the reward {label} failed with {type(error).__name__}: {error}"
                ) from error
            each[label] = _checked(label, found, len(completions))
            for index, value in enumerate(each[label]):
                if value is not None:
                    totals[index] = (totals[index] or 0.0) + weight * value
        return Scores(tuple(totals), each)


def scorer(choices: Sequence[RewardChoice], found: Registry | None = None) -> Scorer:
    """Return what scores by an option's rewards; `found` is the process's registry if not given."""
    return Scorer(choices, found)


def identities(config: Any, found: Registry) -> tuple[Any, ...]:
    """Return the identity of each reward in a config's options, having built it once.

    Errors: those of `RewardChoice.build`.
    """
    told = []
    for field in attrs.fields(type(config)):
        value = getattr(config, field.name)
        for choice in value if isinstance(value, tuple) else (value,):
            if isinstance(choice, RewardChoice):
                choice.build(found)
                told.append([field.name, choice.identity(found)])
    return tuple(told)


def _checked(label: str, found: Any, count: int) -> tuple[float | None, ...]:
    try:
        values = [None if value is None else float(value) for value in found]
    except (TypeError, ValueError) as error:
        raise PluginError(
            f"the reward {label} returned {type(found).__name__}; expected a number or None for "
            f"each of {count} completions ({error})"
        ) from error
    if len(values) != count:
        raise PluginError(
            f"the reward {label} returned {len(values)} scores for {count} completions; expected "
            "one for each, None for one it cannot score"
        )
    for number, value in enumerate(values, 1):
        if value is not None and not math.isfinite(value):
            raise PluginError(
                f"the reward {label} gave completion {number} of {count} the score {value}; "
                "expected a finite number, or None for one it cannot score"
            )
    return tuple(values)


def _imported(name: str) -> Any:
    """Return what "package.module:function" names."""
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the module does at its top
        raise PluginError(
            f"the reward '{name}': {module_name} cannot be imported: {type(error).__name__}: "
            f"{error}; expected the name of an installed reward, or 'package.module:function' of a "
            "module that is installed or whose directory is on PYTHONPATH"
        ) from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise PluginError(f"the reward '{name}': {module_name} has no '{attribute}'")
    return found


def _file_hash(function: Any) -> str:
    """Return the SHA-256 of the file a function stands in; what has none gets one of its own."""
    owner = sys.modules.get(getattr(function, "__module__", None) or "")
    file = getattr(owner, "__file__", None)
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()  # type: ignore[arg-type]
    except (OSError, TypeError):
        return secrets.token_hex(32)
