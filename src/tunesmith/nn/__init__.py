"""Layers that training puts into a model in place of its own."""
