"""What a plugin author tests with: a conformance kit to subclass, and a tiny model."""

from __future__ import annotations

from tunesmith.testing.tiny import tiny_examples, tiny_llama, tiny_session, tiny_tokenizer

__all__ = ["tiny_examples", "tiny_llama", "tiny_session", "tiny_tokenizer"]
