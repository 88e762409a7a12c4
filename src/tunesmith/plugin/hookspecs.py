"""The whole plugin contract: ten hooks, any of which a plugin may implement.

A plugin is a module (or object) that a distribution names in the entry-point group "tunesmith"::

    [project.entry-points.tunesmith]
    myplugin = "my_package.plugin"

and that implements hooks with `tunesmith.plugin.hookimpl`::

    from tunesmith.plugin import Spec, hookimpl

    @hookimpl
    def tunesmith_methods():
        return [Spec("zora", ZoraConfig, "my_package.zora:Zora")]

Hooks are called while plugins are being listed, so they must import nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import pluggy

from tunesmith.plugin.events import Event, RunView
from tunesmith.plugin.spec import Spec
from tunesmith.recipe import Recipe

__all__ = ["GROUP", "PlanView", "hookimpl", "hookspec"]

GROUP = "tunesmith"
"""Entry-point group and pluggy project name."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


class PlanView(Protocol):
    """What `tunesmith_check_plan` may read of a plan."""

    @property
    def recipe(self) -> Recipe:
        """The recipe that is being resolved."""

    @property
    def configs(self) -> Sequence[Any]:
        """One config instance a step, or None where its options are wrong."""


@hookspec
def tunesmith_formats() -> Sequence[Spec]:  # type: ignore[empty-body]
    """Return data formats; each implementation is a `tunesmith.plugin.formats.Format`."""


@hookspec
def tunesmith_transforms() -> Sequence[Spec]:  # type: ignore[empty-body]
    """Return transforms; each implementation is a `tunesmith.plugin.transforms.Transform`."""


@hookspec
def tunesmith_quantizers() -> Sequence[Spec]:  # type: ignore[empty-body]
    """Return quantizers; each implementation is a `tunesmith.plugin.quantizers.Quantizer`."""


@hookspec
def tunesmith_methods() -> Sequence[Spec]:  # type: ignore[empty-body]
    """Return PEFT methods; each implementation is a `tunesmith.plugin.methods.Method`."""


@hookspec
def tunesmith_trainers() -> Sequence[Spec]:  # type: ignore[empty-body]
    """Return trainers; each implementation is a `tunesmith.plugin.trainers.Trainer`."""


@hookspec
def tunesmith_rewards() -> Sequence[Spec]:  # type: ignore[empty-body]
    """Return rewards; each implementation is a `tunesmith.plugin.rewards.Reward`."""


@hookspec
def tunesmith_metrics() -> Sequence[Spec]:  # type: ignore[empty-body]
    """Return metrics; each implementation is a `tunesmith.plugin.metrics.Metric`."""


@hookspec
def tunesmith_exporters() -> Sequence[Spec]:  # type: ignore[empty-body]
    """Return exporters; each implementation is a `tunesmith.plugin.exporters.Exporter`."""


@hookspec
def tunesmith_check_plan(plan: PlanView) -> Sequence[str]:  # type: ignore[empty-body]
    """Return one line for each problem this plugin sees in a plan; an empty list if none."""


@hookspec
def tunesmith_on_event(run: RunView, event: Event) -> None:
    """Be told what a run is doing; an exception here is reported and never stops the run."""
