"""Mean negative log-likelihood of the answers: what SFT minimises, on data it has not seen."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunesmith.data.examples import Conversation
from tunesmith.errors import DataError
from tunesmith.plugin.metrics import Measured, Metric, MetricConfig

if TYPE_CHECKING:
    from tunesmith.plugin.session import Session

__all__ = ["Loss"]


class Loss(Metric[MetricConfig]):
    """`loss` in nats per trained token, averaged over tokens, and `perplexity` = exp(loss).

    `rows_cut` counts conversations measured without the end of an answer, `rows_dropped` those
    with no answer token within max_length.
    """

    def measure(self, session: Session, examples: Sequence[Conversation]) -> Measured:
        """Return loss, perplexity, the number of tokens they are over, and of rows left out."""
        from tunesmith.data.pack import PaddingCollator, padding_id
        from tunesmith.data.render import Renderer
        from tunesmith.nn.logps import completion_logps

        renderer = Renderer(session.tokenizer, self.config.max_length)
        rendered = [renderer.sequences(example) for example in examples]
        rows = [row for every in rendered for row in every if row.trained > 0]
        dropped = sum(not any(row.trained for row in every) for every in rendered)
        cut = sum(
            any(row.trained for row in every) and any(row.truncated for row in every)
            for every in rendered
        )
        if not rows:
            raise DataError(
                f"loss: none of {len(examples)} conversations has an answer token within "
                f"max_length={self.config.max_length}"
            )
        collator = PaddingCollator(padding_id(session.tokenizer))
        rows.sort(key=lambda row: len(row.input_ids))  # like lengths together: less padding
        total, tokens = 0.0, 0
        for start in range(0, len(rows), self.config.batch_size):
            batch = collator(rows[start : start + self.config.batch_size])
            moved = {name: value.to(session.device) for name, value in batch.items()}
            logps, counts = completion_logps(session.model, **moved)
            total -= float(logps.double().sum())
            tokens += int(counts.sum())
        loss = total / tokens
        # as much as a float holds where it is more: infinity would be told as a broken model's
        perplexity = math.exp(min(loss, math.log(sys.float_info.max)))
        values = {
            "loss": loss,
            "perplexity": perplexity,
            "tokens": float(tokens),
            "rows_cut": float(cut),
            "rows_dropped": float(dropped),
        }
        return Measured(values)
