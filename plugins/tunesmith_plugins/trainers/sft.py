"""SFT: supervised fine-tuning on conversations, by default on the answers only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs

from tunesmith.errors import DataError, ModelError
from tunesmith.plugin.options import more_than
from tunesmith.plugin.trainers import (
    Trainer,
    TrainerConfig,
    TrainingData,
    reading,
    training_arguments,
)
from tunesmith_plugins.trainers._speed import headless_model, prepare, trainer_class

if TYPE_CHECKING:
    from collections.abc import Sequence

    import transformers

    from tunesmith.data.examples import Conversation, Sourced
    from tunesmith.data.render import Rendered, Renderer
    from tunesmith.nn.head_logps import Headless
    from tunesmith.plugin.session import Session

__all__ = ["SFT", "SFTConfig"]


@attrs.frozen(kw_only=True)
class SFTConfig(TrainerConfig):
    """Options of `.sft()`.

    The learning rate, unless given, is 2e-4 with an adapter (QLoRA, arXiv:2305.14314, table 9, for
    models up to 13B) and 2e-5 without (Stanford Alpaca).
    """

    epochs: float = attrs.field(default=3.0, validator=more_than(0))
    """Passes over the training data; 3 as Stanford Alpaca and TRL. max_steps overrides it."""
    max_grad_norm: float = attrs.field(default=0.3, validator=more_than(0))
    """Gradients are scaled down to this norm; 0.3 as QLoRA."""
    completion_only_loss: bool = True
    """Learn the assistant's turns only; false learns every token."""


class SFT(Trainer[SFTConfig]):
    """Minimises the mean negative log-likelihood of the trained tokens of a batch."""

    def build(self, session: Session, data: TrainingData, directory: Path) -> transformers.Trainer:
        """Render, pack if asked, and return a `transformers.Trainer`, stock but for its loss.

        The loss of an optimizer step is normalised by the trained tokens of all its forward passes,
        so gradient accumulation changes nothing but memory.
        """
        from tunesmith.data.pack import (
            PackingCollator,
            PaddingCollator,
            pack,
            packing_supported,
            padding_id,
        )
        from tunesmith.data.render import Renderer

        config = self.config
        renderer = Renderer(session.tokenizer, config.max_length, config.completion_only_loss)
        train = _render(renderer, data.train, data)
        evaluation = _render(renderer, data.evaluation, data)
        if not train:
            raise DataError(
                f"sft: none of {len(data.train)} rows leaves a token to learn within max_length="
                f"{config.max_length}; raise max_length, or see the list of dropped rows"
            )
        model = session.model
        prepare(session, config)
        pad = padding_id(session.tokenizer)
        collator: Any = PaddingCollator(pad)
        train_rows: list[Any] = train
        evaluation_rows: list[Any] = evaluation
        if config.packing:
            reason = packing_supported(model)
            if reason is not None:
                raise ModelError(f"sft: packing=True does not work with this model: {reason}")
            collator = PackingCollator(pad)
            train_rows = pack(train, config.max_length)
            evaluation_rows = pack(evaluation, config.max_length)
        arguments = training_arguments(self, session, data, directory)
        trainer: transformers.Trainer = _trainer_class()(
            headless=headless_model(session, config, arguments),
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=evaluation_rows or None,
            data_collator=collator,
            processing_class=session.tokenizer,
        )
        return trainer


def _trainer_class() -> Any:
    """Return the `transformers.Trainer` subclass; a function, so that listing imports no torch."""
    import torch

    class SFTTrainer(trainer_class()):  # type: ignore[misc]
        """Takes the loss from hidden states where the model has been taken apart for that."""

        def __init__(self, *, headless: Headless | None, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self._headless = headless

        def compute_loss(
            self,
            model: torch.nn.Module,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            if self._headless is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            others = {name: value for name, value in inputs.items() if name != "labels"}
            logps, wanted = self._headless.token_logps(others, inputs["labels"])
            count = wanted.sum() if num_items_in_batch is None else num_items_in_batch
            loss = -logps.sum() / count
            return (loss, {}) if return_outputs else loss

    return SFTTrainer


def _render(renderer: Renderer, rows: Sequence[Sourced], data: TrainingData) -> list[Rendered]:
    rendered: list[Rendered] = []
    for row in rows:
        with reading(row):
            tokens = renderer.conversation(cast("Conversation", row.example))
        if tokens.trained == 0:
            data.drop(row.where, "no token to learn within max_length")
            continue
        rendered.append(tokens)
    return rendered
