"""DPO: direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import attrs

from tunesmith.errors import DataError
from tunesmith.plugin.options import between, more_than
from tunesmith.plugin.trainers import (
    Trainer,
    TrainerConfig,
    TrainingData,
    reading,
    training_arguments,
)
from tunesmith_plugins.trainers._speed import headless_model, prepare, trainer_class

if TYPE_CHECKING:
    import torch
    import transformers

    from tunesmith.data.examples import Preference, Sourced
    from tunesmith.nn.head_logps import Headless
    from tunesmith.plugin.session import Session

__all__ = ["DPO", "DPOConfig"]


@attrs.frozen(kw_only=True)
class DPOConfig(TrainerConfig):
    """Options of `.dpo()`.

    The learning rate, unless given, is 5e-6 with an adapter (TRL's and the alignment handbook's
    value for LoRA DPO) and 5e-7 without (Zephyr, arXiv:2310.16944).
    """

    beta: float = attrs.field(default=0.1, validator=more_than(0))
    """Strength of the pull towards the reference; 0.1 as the paper."""
    label_smoothing: float = attrs.field(default=0.0, validator=between(0.0, 0.5))
    """Probability that a label is the wrong way round (conservative DPO)."""


class DPO(Trainer[DPOConfig]):
    """Raises the log-probability margin of chosen over rejected answers against a reference.

    The reference is the model as it stands when the step begins (the SFT model, after `.sft()`).
    Its log-probabilities of every pair are computed once, before the first update, by that very
    model; so the reference is exactly frozen and takes no memory during training.
    """

    def build(self, session: Session, data: TrainingData, directory: Path) -> transformers.Trainer:
        """Render the pairs, take the reference's log-probabilities, and return the trainer."""
        from tunesmith.data.pack import PreferenceCollator, padding_id

        collator = PreferenceCollator(padding_id(session.tokenizer))
        train = self._seen(self._render(session, data.train, data), session.seed)
        evaluation = self._render(session, data.evaluation, data)
        if not train:
            raise DataError(
                f"dpo: none of {len(data.train)} pairs fits max_length={self.config.max_length} "
                "with an answer token left; raise max_length, or see the list of dropped rows"
            )
        prepare(session, self.config)
        arguments = training_arguments(self, session, data, directory, label_names=["labels"])
        trainer = _trainer_class()(
            headless=headless_model(session, self.config, arguments),
            beta=self.config.beta,
            label_smoothing=self.config.label_smoothing,
            model=session.model,
            args=arguments,
            train_dataset=train,
            eval_dataset=evaluation or None,
            data_collator=collator,
            processing_class=session.tokenizer,
        )
        trainer.add_reference([*train, *evaluation])
        built: transformers.Trainer = trainer
        return built

    def learning_rate(self, *, peft: bool) -> float:
        """Return the option, or DPO's own default, some forty times below SFT's."""
        if self.config.learning_rate is not None:
            return self.config.learning_rate
        return 5e-6 if peft else 5e-7

    def _seen(self, pairs: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
        """Return the pairs that max_steps lets the training see, drawn at random.

        The reference of a pair that no step comes to would be computed for nothing.
        """
        config = self.config
        if config.max_steps is None:
            return pairs
        count = config.max_steps * config.batch_size * config.gradient_accumulation
        if count >= len(pairs):
            return pairs
        return random.Random(seed if config.seed is None else config.seed).sample(pairs, count)

    def _render(
        self, session: Session, rows: Sequence[Sourced], data: TrainingData
    ) -> list[dict[str, Any]]:
        from tunesmith.data.render import Renderer

        renderer = Renderer(session.tokenizer, self.config.max_length)
        pairs: list[dict[str, Any]] = []
        for row in rows:
            with reading(row):
                chosen, rejected = renderer.preference(cast("Preference", row.example))
            if chosen.trained == 0 or rejected.trained == 0:
                data.drop(row.where, "no answer token left within max_length")
                continue
            pairs.append({"chosen": chosen, "rejected": rejected})
        return pairs


def _trainer_class() -> Any:
    """Return the `transformers.Trainer` subclass; a function, so that listing imports no torch."""
    import torch
    import torch.nn.functional as F

    from tunesmith.nn.logps import completion_logps

    class DPOTrainer(trainer_class()):  # type: ignore[misc]
        """Computes the DPO loss and logs rewards as TRL names them."""

        def __init__(
            self, *, headless: Headless | None, beta: float, label_smoothing: float, **kwargs: Any
        ) -> None:
            super().__init__(**kwargs)
            self._headless = headless
            self.beta = beta
            self.label_smoothing = label_smoothing
            # the loss below is a mean over pairs: let the loop divide by the accumulation steps
            self.model_accepts_loss_kwargs = False
            self._measured: dict[str, dict[str, list[float]]] = {
                "train": defaultdict(list),
                "eval": defaultdict(list),
            }

        def add_reference(self, pairs: list[dict[str, Any]]) -> None:
            """Write the present model's log-probabilities into each pair."""
            model = self.model
            was_training = model.training
            model.eval()
            size = self.args.per_device_eval_batch_size
            # like lengths together: less padding
            ordered = sorted(pairs, key=lambda pair: len(pair["chosen"].input_ids))
            with torch.no_grad():
                for start in range(0, len(ordered), size):
                    batch_pairs = ordered[start : start + size]
                    batch = self._prepare_inputs(self.data_collator(batch_pairs))
                    with self.compute_loss_context_manager():
                        logps, _ = self._logps(model, batch)
                    chosen, rejected = logps.cpu().chunk(2)
                    for pair, good, bad in zip(batch_pairs, chosen, rejected, strict=True):
                        pair["reference_chosen_logps"] = float(good)
                        pair["reference_rejected_logps"] = float(bad)
            model.train(was_training)

        def train(self, *args: Any, **kwargs: Any) -> Any:
            # dropout would make the policy differ from its reference at step 0
            with _without_dropout(self.model):
                return super().train(*args, **kwargs)

        def compute_loss(
            self,
            model: torch.nn.Module,
            inputs: dict[str, torch.Tensor],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            logps, counts = self._logps(model, inputs)
            chosen, rejected = logps.chunk(2)  # [pairs] each
            chosen_ratio = chosen - inputs["reference_chosen_logps"]
            rejected_ratio = rejected - inputs["reference_rejected_logps"]
            margin = self.beta * (chosen_ratio - rejected_ratio)
            smoothing = self.label_smoothing
            losses = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
            values = {
                "rewards/chosen": self.beta * chosen_ratio,
                "rewards/rejected": self.beta * rejected_ratio,
                "rewards/margins": margin,
                "rewards/accuracies": (margin > 0).float(),
                "logps/chosen": chosen,
                "logps/rejected": rejected,
            }
            store = self._measured["train" if model.training else "eval"]
            for name, value in values.items():
                store[name].append(float(value.detach().mean()))
            loss = losses.mean()
            return (loss, {"logps": logps, "counts": counts}) if return_outputs else loss

        def prediction_step(
            self,
            model: torch.nn.Module,
            inputs: dict[str, torch.Tensor],
            prediction_loss_only: bool,
            ignore_keys: list[str] | None = None,
        ) -> tuple[torch.Tensor, None, None]:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs)
            return loss.detach(), None, None

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            part = "eval" if any(key.startswith("eval_") for key in logs) else "train"
            prefix = "eval_" if part == "eval" else ""
            for name, values in self._measured[part].items():
                logs[prefix + name] = sum(values) / len(values)
            self._measured[part].clear()
            super().log(logs, *args, **kwargs)

        def _logps(
            self, model: Any, inputs: dict[str, torch.Tensor]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return completion_logps(
                self._headless or model,
                inputs["input_ids"],
                inputs["attention_mask"],
                inputs["labels"],
            )

    return DPOTrainer


@contextmanager
def _without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Set every dropout to 0 and put it back afterwards."""
    import torch

    held = [
        (module, module.p) for module in model.modules() if isinstance(module, torch.nn.Dropout)
    ]
    for module, _ in held:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in held:
            module.p = p
