"""SFT: supervised fine-tuning on conversations, by default on the answers only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from tunesmith.errors import DataError, ModelError
from tunesmith.plugin.counted import RowNames, Sums, counted
from tunesmith.plugin.fast import FastTrainer, FastTrainerConfig, loss_of_model, prepare
from tunesmith.plugin.options import more_than
from tunesmith.plugin.trainers import (
    Training,
    TrainingData,
    rendered,
    training_arguments,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunesmith.data.examples import Sourced
    from tunesmith.data.render import Rendered, Renderer
    from tunesmith.nn.head_logps import Headless
    from tunesmith.nn.own_loss import OwnLoss
    from tunesmith.plugin.session import Session

__all__ = ["SFT", "SFTConfig"]


@attrs.frozen(kw_only=True)
class SFTConfig(FastTrainerConfig):
    """Options of `.sft()`.

    The learning rate, unless given, is 2e-4 with an adapter (QLoRA, arXiv:2305.14314, table 9, for
    models up to 13B) and 2e-5 without (Stanford Alpaca).
    """

    epochs: float = attrs.field(default=3.0, validator=more_than(0))
    """Passes over the training data; 3 as Stanford Alpaca and TRL. max_steps overrides it."""
    max_grad_norm: float = attrs.field(default=0.3, validator=more_than(0))
    """Gradients are scaled down to this norm; 0.3 as QLoRA."""
    packing: bool = False
    """Fill sequences of max_length with several examples, which do not see each other."""
    completion_only_loss: bool = True
    """Learn the assistant's turns only; false learns every token."""

    @property
    def packs(self) -> bool:
        """Whether several rows are put into one sequence."""
        return self.packing


class SFT(FastTrainer[SFTConfig]):
    """Minimises the mean negative log-likelihood of the trained tokens of a batch."""

    def build(self, session: Session, data: TrainingData, directory: Path) -> Training:
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
        for kept, given, what in (
            (train, data.train, "rows"),
            (evaluation, data.evaluation, "held-out rows"),
        ):
            if not kept and (given or kept is train):
                raise DataError(
                    f"sft: none of {len(given)} {what} leaves a token to learn within max_length="
                    f"{config.max_length}; raise max_length, or see the list of dropped rows"
                )
        model = session.model
        prepare(model, config)
        pad = padding_id(session.tokenizer)
        collator: Any = PaddingCollator(pad)
        train_rows: list[Any] = [row for row, _ in train]
        evaluation_rows: list[Any] = [row for row, _ in evaluation]
        if config.packing:
            reason = packing_supported(model)
            if reason is not None:
                raise ModelError(f"sft: packing=True does not work with this model: {reason}")
            collator = PackingCollator(pad)
            train_rows = pack(train_rows, config.max_length)
            evaluation_rows = pack(evaluation_rows, config.max_length)
        arguments = training_arguments(self, session, data, directory)
        headless, own = loss_of_model(model, config, arguments)
        trainer: Training = _trainer_class()(
            headless=headless,
            own=own,
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=evaluation_rows or None,
            data_collator=RowNames(collator, [*train, *evaluation]),
            processing_class=session.tokenizer,
        )
        return trainer


def _trainer_class() -> Any:
    """Return the `transformers.Trainer` subclass; a function, so that listing imports no torch."""
    import torch

    from tunesmith.nn.head_logps import shifted
    from tunesmith.nn.logps import logps_of_logits

    class SFTTrainer(counted()):  # type: ignore[misc]
        """Takes the loss from hidden states where the model has been taken apart for that.

        Where it has not, it is the model's own, with whatever terms that has. An evaluation is the
        mean negative log-likelihood of the trained tokens in any case, as the metric `loss` is.
        """

        def __init__(self, *, headless: Headless | None, own: OwnLoss, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self._headless = headless
            self._own = own

        def items_in(self, batch: Mapping[str, Any]) -> torch.Tensor:
            return shifted(batch["labels"])[1].sum()

        def measure(self, model: Any, inputs: dict[str, Any], *, training: bool) -> Sums:
            labels = inputs["labels"]
            if training and self._headless is None and self._own.usable:
                count = self.items_in(inputs)
                # a mean over the batch's tokens; by their number it is weighed among the others
                return Sums({"loss": model(**inputs).loss * count}, count)
            others = {name: value for name, value in inputs.items() if name != "labels"}
            if self._headless is not None:
                logps, wanted = self._headless.token_logps(others, labels)
            else:
                logits = model(**{"use_cache": False, **others}).logits
                logps, wanted = logps_of_logits(logits, labels)
            return Sums({"loss": -logps.sum()}, wanted.sum())

    return SFTTrainer


def _render(
    renderer: Renderer, rows: Sequence[Sourced], data: TrainingData
) -> list[tuple[Rendered, str]]:
    """Return each row that leaves something to learn, rendered, and where it stands."""
    used: list[tuple[Rendered, str]] = []
    for row, every in rendered(rows, renderer.sequences):
        kept = [tokens for tokens in every if tokens.trained > 0]
        if not kept:
            data.drop(row.where, "no token to learn within max_length")
        elif len(kept) < len(every) or any(tokens.truncated for tokens in kept):
            data.cut(row.where, f"the answer is cut at max_length={renderer.max_length}")
        used += [(tokens, row.where) for tokens in kept]
    return used
