"""SimPO: preferences without a reference model (Meng et al. 2024, arXiv:2405.14734)."""

import attrs

from tunesmith.errors import DataError
from tunesmith.plugin import Spec, hookimpl
from tunesmith.plugin.options import at_least, more_than
from tunesmith.plugin.trainers import Trainer, TrainerConfig, rendered, training_arguments


@attrs.frozen(kw_only=True)
class NewNameConfig(TrainerConfig):
    """Options of `.train("newname", ...)`: every trainer's, and two more.

    The learning rate, unless given, is 1e-5 with an adapter and 1e-6 without, as in the paper.
    """

    beta: float = attrs.field(default=2.0, validator=more_than(0))
    """What the difference of the mean log-probabilities is multiplied by."""
    gamma: float = attrs.field(default=1.0, validator=at_least(0))
    """Margin by which the chosen answer is to be likelier, on the scale of beta."""


class NewName(Trainer[NewNameConfig]):
    """Minimises -log sigmoid(beta (c - r) - gamma), c and r the mean log-probabilities a token."""

    def learning_rate(self, *, peft):
        """Return the option, or this trainer's own default."""
        if self.config.learning_rate is not None:
            return self.config.learning_rate
        return 1e-5 if peft else 1e-6

    def build(self, session, data, directory):
        """Render the pairs, drop and tell of those that say nothing, and return the training."""
        from tunesmith.data.pack import PreferenceCollator, padding_id
        from tunesmith.data.render import Renderer
        from tunesmith.plugin.counted import RowNames

        renderer = Renderer(session.tokenizer, self.config.max_length)

        def pairs(rows):
            kept = []
            for row, (chosen, rejected) in rendered(rows, renderer.preference):
                if not chosen.trained or not rejected.trained:
                    data.drop(row.where, "no answer token left within max_length")
                    continue
                if chosen.truncated or rejected.truncated:
                    data.cut(row.where, f"the answer is cut at max_length={renderer.max_length}")
                kept.append(({"chosen": chosen, "rejected": rejected}, row.where))
            return kept

        train, held_out = pairs(data.train), pairs(data.evaluation)
        if not train or (data.evaluation and not held_out):
            raise DataError("newname: no pair fits max_length; raise it, or see the dropped rows")
        return _training_class()(
            config=self.config,
            model=session.model,
            args=training_arguments(self, session, data, directory),
            train_dataset=[pair for pair, _ in train],
            eval_dataset=[pair for pair, _ in held_out] or None,
            data_collator=RowNames(
                PreferenceCollator(padding_id(session.tokenizer)), [*train, *held_out]
            ),
        )


def _training_class():
    import torch
    import torch.nn.functional as F

    from tunesmith.nn.logps import completion_logps
    from tunesmith.plugin.counted import Sums, counted

    class NewNameTrainer(counted()):
        """Its steps and figures are means over pairs, however they were batched."""

        def __init__(self, *, config, **kwargs):
            super().__init__(**kwargs)
            self.config = config

        def items_in(self, batch):
            return len(batch["input_ids"]) // 2

        def measure(self, model, inputs, *, training):
            logps, counts = completion_logps(  # [2 x pairs] each: chosen first, then rejected
                model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
            )
            chosen, rejected = (logps / counts).chunk(2)  # [pairs] each
            margin = self.config.beta * (chosen - rejected)
            values = {
                "loss": -F.logsigmoid(margin - self.config.gamma),
                "rewards/margins": margin,
                "rewards/accuracies": (margin > 0).float(),
            }
            sums = {name: value.sum() for name, value in values.items()}
            return Sums(sums, torch.tensor(len(margin), device=logps.device))

    return NewNameTrainer


@hookimpl
def tunesmith_trainers():
    """Register the trainer."""
    return [
        Spec(
            "newname",
            NewNameConfig,
            f"{__name__}:NewName",
            example="preference",
            summary="preferences without a reference model",
        )
    ]
