"""DPO: direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

from tunesmith.errors import DataError, RunError
from tunesmith.plugin.counted import RowNames, Sums, counted
from tunesmith.plugin.fast import FastTrainer, FastTrainerConfig, loss_of_model, prepare
from tunesmith.plugin.options import between, more_than
from tunesmith.plugin.trainers import (
    Training,
    TrainingData,
    rendered,
    training_arguments,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    import torch

    from tunesmith.data.examples import Sourced
    from tunesmith.nn.head_logps import Headless
    from tunesmith.nn.own_loss import OwnLoss
    from tunesmith.plugin.session import Session

__all__ = ["DPO", "DPOConfig"]

Pair: TypeAlias = tuple[dict[str, Any], str]
"""A rendered pair, {"chosen", "rejected"}, and where it stands."""


@attrs.frozen(kw_only=True)
class DPOConfig(FastTrainerConfig):
    """Options of `.dpo()`.

    The learning rate, unless given, is 5e-6 with an adapter (TRL's and the alignment handbook's
    value for LoRA DPO) and 5e-7 without (Zephyr, arXiv:2310.16944).
    """

    beta: float = attrs.field(default=0.1, validator=more_than(0))
    """Strength of the pull towards the reference; 0.1 as the paper."""
    label_smoothing: float = attrs.field(default=0.0, validator=between(0.0, 0.5))
    """Probability that a label is the wrong way round (conservative DPO)."""


class DPO(FastTrainer[DPOConfig]):
    """Raises the log-probability margin of chosen over rejected answers against a reference.

    The reference is the model as it stands when the step begins (the SFT model, after `.sft()`).
    Its log-probabilities of every pair are computed once, before the first update, by that very
    model; so the reference is exactly frozen and takes no memory during training.
    """

    def build(self, session: Session, data: TrainingData, directory: Path) -> Training:
        """Render the pairs, take the reference's log-probabilities, and return the trainer."""
        from tunesmith.data.pack import PreferenceCollator, padding_id

        collator = PreferenceCollator(padding_id(session.tokenizer))
        arguments = training_arguments(self, session, data, directory, label_names=["labels"])
        rows = self._render(session, data.train, data)
        named = self._seen(rows, session.seed, arguments.world_size)
        held_out = self._render(session, data.evaluation, data)
        train, evaluation = ([pair for pair, _ in pairs] for pairs in (named, held_out))
        for kept, given, what in (
            (train, data.train, "pairs"),
            (evaluation, data.evaluation, "held-out pairs"),
        ):
            if not kept and (given or kept is train):
                raise DataError(
                    f"dpo: none of {len(given)} {what} fits max_length={self.config.max_length} "
                    "with an answer token left; raise max_length, or see the list of dropped rows"
                )
        model = session.model
        prepare(model, self.config)
        headless, own = loss_of_model(model, self.config, arguments)
        trainer = _trainer_class()(
            headless=headless,
            own=own,
            beta=self.config.beta,
            label_smoothing=self.config.label_smoothing,
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=evaluation or None,
            data_collator=RowNames(collator, [*named, *held_out]),
            processing_class=session.tokenizer,
        )
        trainer.add_reference([*train, *evaluation])
        built: Training = trainer
        return built

    def learning_rate(self, *, peft: bool) -> float:
        """Return the option, or DPO's own default, some forty times below SFT's."""
        if self.config.learning_rate is not None:
            return self.config.learning_rate
        return 5e-6 if peft else 5e-7

    def _seen(self, pairs: list[Pair], seed: int, processes: int) -> list[Pair]:
        """Return the pairs that max_steps lets the training see, drawn at random.

        The reference of a pair that no step comes to would be computed for nothing.
        """
        config = self.config
        if config.max_steps is None:
            return pairs
        count = config.max_steps * config.batch_size * config.gradient_accumulation * processes
        if count >= len(pairs):
            return pairs
        return random.Random(seed if config.seed is None else config.seed).sample(pairs, count)

    def _render(self, session: Session, rows: Sequence[Sourced], data: TrainingData) -> list[Pair]:
        from tunesmith.data.render import Renderer

        renderer = Renderer(session.tokenizer, self.config.max_length)
        pairs: list[Pair] = []
        for row, (chosen, rejected) in rendered(rows, renderer.preference):
            if chosen.trained == 0 or rejected.trained == 0:
                data.drop(row.where, "no answer token left within max_length")
                continue
            if chosen.truncated or rejected.truncated:
                data.cut(row.where, f"the answer is cut at max_length={renderer.max_length}")
            pairs.append(({"chosen": chosen, "rejected": rejected}, row.where))
        return pairs


def _trainer_class() -> Any:
    """Return the `transformers.Trainer` subclass; a function, so that listing imports no torch."""
    import torch
    import torch.nn.functional as F

    from tunesmith.nn.eval_mode import held_in_eval
    from tunesmith.nn.logps import by_row, completion_logps, logps_of_logits

    class DPOTrainer(counted()):  # type: ignore[misc]
        """Computes the DPO loss and logs rewards as TRL names them.

        What a model's own loss adds to the likelihood of its labels (the routers of a mixture of
        experts) is added to this one as well, and logged as `aux_loss`; an evaluation is without.
        """

        def __init__(
            self,
            *,
            headless: Headless | None,
            own: OwnLoss,
            beta: float,
            label_smoothing: float,
            **kwargs: Any,
        ) -> None:
            super().__init__(**kwargs)
            self._headless = headless
            self._own = own
            self.beta = beta
            self.label_smoothing = label_smoothing
            self._compared = False

        def add_reference(self, pairs: list[dict[str, Any]]) -> None:
            """Write the present model's log-probabilities into each pair.

            Of several processes each computes a share, and tells the others.
            """
            from accelerate.utils import gather_object

            model = self.model
            was_training = model.training
            model.eval()
            size = self.args.per_device_eval_batch_size
            # like lengths together: less padding
            order = sorted(range(len(pairs)), key=lambda at: len(pairs[at]["chosen"].input_ids))
            batches = [order[start : start + size] for start in range(0, len(order), size)]
            found: list[tuple[int, float, float]] = []
            with torch.no_grad():
                for places in batches[self.args.process_index :: self.args.world_size]:
                    batch_pairs = [pairs[at] for at in places]
                    batch = self._prepare_inputs(self.data_collator(batch_pairs))
                    # in mixed precision the trainer wraps the model once it trains, and not before
                    with self.accelerator.autocast():
                        logps, _ = self._logps(model, batch)
                    chosen, rejected = logps.cpu().chunk(2)
                    found += zip(places, chosen.tolist(), rejected.tolist(), strict=True)
            if self.args.world_size > 1:
                found = gather_object(found)
            for at, good, bad in found:
                pairs[at]["reference_chosen_logps"] = good
                pairs[at]["reference_rejected_logps"] = bad
            model.train(was_training)

        def in_training_mode(self) -> AbstractContextManager[None]:
            # the reference was asked in eval mode: whatever is random in training would make the
            # policy another model than that at step 0
            held: AbstractContextManager[None] = held_in_eval(self.model)
            return held

        def items_in(self, batch: Mapping[str, Any]) -> int:
            return len(batch["reference_chosen_logps"])

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kw: Any) -> Any:
            # kept for the comparison below, which names rows
            self._rows = self.rows_of(inputs) if not self._compared else []
            return super().compute_loss(model, inputs, *args, **kw)

        def measure(self, model: Any, inputs: dict[str, Any], *, training: bool) -> Sums:
            if training and self._own.further:
                (logps, counts), aux = self._logps_and_aux(model, inputs)
            else:
                (logps, counts), aux = self._logps(model, inputs), None
            chosen, rejected = logps.chunk(2)  # [pairs] each
            if training and not self._compared:
                self._compared = True
                if self.state.global_step == 0:
                    self._compare(logps, counts, inputs)
            chosen_ratio = chosen - inputs["reference_chosen_logps"]
            rejected_ratio = rejected - inputs["reference_rejected_logps"]
            margin = self.beta * (chosen_ratio - rejected_ratio)
            smoothing = self.label_smoothing
            losses = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
            values = {
                "loss": losses,
                "rewards/chosen": self.beta * chosen_ratio,
                "rewards/rejected": self.beta * rejected_ratio,
                "rewards/margins": margin,
                "rewards/accuracies": (margin > 0).float(),
                "logps/chosen": chosen,
                "logps/rejected": rejected,
            }
            sums = {name: value.sum() for name, value in values.items()}
            if aux is not None:
                sums["aux_loss"] = aux * len(chosen)
                sums["loss"] = sums["loss"] + sums["aux_loss"]
            return Sums(sums, torch.tensor(len(chosen), device=logps.device))

        def _compare(
            self, logps: torch.Tensor, counts: torch.Tensor, inputs: dict[str, Any]
        ) -> None:
            """Raise if the policy is not the reference, which it is before the first update."""
            chosen = inputs["reference_chosen_logps"]
            reference = torch.cat([chosen, inputs["reference_rejected_logps"]])
            logps = logps.detach()
            off = (logps - reference).abs()
            # sums over tokens whose errors of rounding have nothing to do with each other; a 16-bit
            # model is off by some hundredths a token where rows are batched or padded otherwise
            mixed = self.accelerator.mixed_precision != "no"
            exact = self.model.dtype == torch.float32 and not mixed
            each, share = (1e-3, 1e-4) if exact else (0.15, 5e-3)
            allowed = each * counts.to(off).sqrt() + share * reference.abs()
            # not the other way round: what is no number is told where the loss is looked at
            if not bool((off > allowed).any()):
                return
            worst = int((off - allowed).argmax())
            names = self._rows
            where = f"{names[worst % len(names)]}: " if names else ""
            side = "chosen" if worst < len(chosen) else "rejected"
            raise RunError(
                f"dpo: {where}before the first update the model gives the {side} answer a "
                f"log-probability of {float(logps[worst]):.4f} and gave it, as its own reference, "
                f"{float(reference[worst]):.4f}; they have to be equal: something in this model is "
                "random, or depends on what else is in the batch; set its dropout rates to 0 in "
                "config.json, or try batch_size=1"
            )

        def _logps(
            self, model: Any, inputs: dict[str, torch.Tensor]
        ) -> tuple[torch.Tensor, torch.Tensor]:
            return completion_logps(
                self._headless or model,
                inputs["input_ids"],
                inputs["attention_mask"],
                inputs["labels"],
            )

        def _logps_and_aux(
            self, model: Any, inputs: dict[str, torch.Tensor]
        ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
            """Return log-probabilities and counts, and what the own loss has beside them."""
            names = ("input_ids", "attention_mask", "labels")
            output = model(**{name: inputs[name] for name in names}, use_cache=False)
            token_logps, wanted = logps_of_logits(output.logits, inputs["labels"])
            return by_row(token_logps, wanted), output.loss + token_logps.mean()

    return DPOTrainer
