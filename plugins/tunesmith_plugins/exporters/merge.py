"""merge: add the adapter into the dequantized base and save a plain model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunesmith.errors import ModelError
from tunesmith.plugin.conditions import Conditions
from tunesmith.plugin.exporters import Exporter
from tunesmith.plugin.options import more_than, one_of

if TYPE_CHECKING:
    import torch

    from tunesmith.nn.proof import Proof
    from tunesmith.plugin.session import Session

__all__ = ["Merge", "MergeConfig"]

_PROMPTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "Question: what is the capital of France?\nAnswer: Paris, on the river Seine.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144",
)
_ROWS, _TOKENS = 4, 64


@attrs.frozen(kw_only=True)
class MergeConfig:
    """Options of `.merge()`."""

    dtype: str = attrs.field(default="auto", validator=one_of("auto", "fp32", "bf16", "fp16"))
    """Dtype of the saved weights; auto takes the run's compute dtype."""
    shard_gb: float = attrs.field(default=2.0, validator=more_than(0))
    """Size of a .safetensors file in GiB; one shard and one tensor are in memory at a time."""
    verify: bool = True
    """Open what was written and compare it with the adapter on its base: weight by weight, and by
    the logits of a few rows. It takes about as long again; the two are not in memory at once."""


class Merge(Exporter[MergeConfig]):
    """Writes safetensors, config, generation config, tokenizer and chat template.

    Each weight is dequantized to fp32, the adapter's update added in fp32, and the sum rounded once
    to the saved dtype. The result opens with stock transformers and nothing else. A merge that
    would leave out a tensor of the adapter, or whose result computes something else, fails.
    """

    makes_model = True
    merges = True

    def export(self, session: Session, directory: Path) -> Mapping[str, Path]:
        """Write the merged model and return its directory."""
        from tunesmith.nn.checkpoint import ShardWriter
        from tunesmith.nn.merging import merging
        from tunesmith.nn.proof import Proof, row_logits
        from tunesmith.nn.saving import (
            checkpoint_names,
            in_fp32,
            not_opened,
            save_description,
        )

        model = session.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        dtype = self._dtype(session)
        rows = _rows(session) if self.config.verify else []
        expected = row_logits(model, rows)
        method = session.method
        merge = merging if method is None else method.merge
        merged = merge(model, session.quantizer)
        proof = Proof(merged, session.quantizer, dtype, in_fp32(base, dtype))
        writer = ShardWriter(directory, int(self.config.shard_gb * 1024**3))
        for name, weight in checkpoint_names(base, proof.weights()):
            writer.add(name, weight)
        writer.close()
        save_description(
            base, session.tokenizer, directory, dtype=dtype, tied=merged.tied, base=session.base
        )
        if problem := not_opened(type(base), directory):
            raise ModelError(f"stock transformers does not take the merged model: {problem}")
        if self.config.verify:
            held = model if session.method is not None and session.current is None else None
            del model, base, merged, proof.merging
            if held is None:  # what was trained is on the disk: make room
                session.unload()
            self._compare(session, directory, proof, rows, expected)
        return {"model": directory}

    def effective(self, conditions: Conditions) -> Mapping[str, Any]:
        """Return the options as they will act: the dtype that is written."""
        found = super().effective(conditions)
        dtype = conditions.precision if self.config.dtype == "auto" else self.config.dtype
        return {**found, "dtype": dtype}

    def _compare(
        self, session: Session, directory: Path, proof: Proof, rows: Any, expected: Any
    ) -> None:
        from tunesmith.nn.proof import compare_logits, row_logits, tolerance
        from tunesmith.plugin.quantizers import Quantizer

        opened = Quantizer[None](None).load(directory, dtype=proof.dtype, device=session.device)
        proof.compare_weights(opened)
        allowed = tolerance(proof.dtype, session.dtype) + session.quantizer.own_error
        compare_logits(expected, row_logits(opened, rows), allowed)

    def _dtype(self, session: Session) -> torch.dtype:
        import torch

        names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return names.get(self.config.dtype, session.dtype)


def _rows(session: Session) -> list[list[int]]:
    """Return a few rows of token ids: of the run's own data where there is any, else of our own."""
    texts = [*session.samples, *_PROMPTS][:_ROWS]
    rows = [session.tokenizer(text, add_special_tokens=True)["input_ids"] for text in texts]
    return [[int(token) for token in row[:_TOKENS]] for row in rows if row]
