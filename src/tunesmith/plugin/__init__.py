"""What a plugin author imports: the Spec, the hooks, and one interface for each kind of plugin."""

from __future__ import annotations

from tunesmith.plugin.hookspecs import hookimpl
from tunesmith.plugin.spec import API_VERSION, KINDS, Spec

__all__ = ["API_VERSION", "KINDS", "Spec", "hookimpl"]
