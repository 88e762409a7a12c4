"""Resolving, running and keeping a recipe: plan, memory, session, runner, store, events."""
