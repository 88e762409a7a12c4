"""How often the model finds the chosen answer likelier than the rejected one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tunesmith.data.examples import Preference
from tunesmith.errors import DataError
from tunesmith.plugin.metrics import Measured, Metric, MetricConfig

if TYPE_CHECKING:
    from tunesmith.plugin.session import Session

__all__ = ["PreferenceAccuracy"]


class PreferenceAccuracy(Metric[MetricConfig]):
    """`accuracy` in 0..1 and `margin` in nats, by the summed log-probability of each answer.

    `pairs_cut` counts pairs measured without the end of an answer, `pairs_dropped` those with no
    answer token within max_length.
    """

    def measure(self, session: Session, examples: Sequence[Preference]) -> Measured:
        """Return accuracy, mean margin, and numbers of pairs; a tie is no success."""
        from tunesmith.data.pack import PreferenceCollator, padding_id
        from tunesmith.data.render import Renderer
        from tunesmith.nn.logps import completion_logps

        renderer = Renderer(session.tokenizer, self.config.max_length)
        rendered = [renderer.preference(example) for example in examples]
        pairs = [
            {"chosen": chosen, "rejected": rejected}
            for chosen, rejected in rendered
            if chosen.trained and rejected.trained
        ]
        if not pairs:
            raise DataError(
                f"preference_accuracy: none of {len(examples)} pairs has answer tokens within "
                f"max_length={self.config.max_length}"
            )
        collator = PreferenceCollator(padding_id(session.tokenizer))
        margins: list[float] = []
        for start in range(0, len(pairs), self.config.batch_size):
            batch = collator(pairs[start : start + self.config.batch_size])
            moved = {name: value.to(session.device) for name, value in batch.items()}
            logps, _ = completion_logps(session.model, **moved)
            chosen_logps, rejected_logps = logps.chunk(2)
            margins.extend((chosen_logps - rejected_logps).tolist())
        values = {
            "accuracy": sum(margin > 0 for margin in margins) / len(margins),
            "margin": sum(margins) / len(margins),
            "pairs": float(len(margins)),
            "pairs_cut": float(
                sum(pair["chosen"].truncated or pair["rejected"].truncated for pair in pairs)
            ),
            "pairs_dropped": float(len(rendered) - len(pairs)),
        }
        return Measured(values)
