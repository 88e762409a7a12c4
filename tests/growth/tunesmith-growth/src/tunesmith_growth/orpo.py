"""ORPO: preferences and the answers themselves in one loss (Hong et al. 2024, arXiv:2403.07691)."""

from __future__ import annotations

import attrs

from tunesmith.errors import DataError
from tunesmith.plugin.options import more_than
from tunesmith.plugin.trainers import Trainer, TrainerConfig, rendered, training_arguments


@attrs.frozen(kw_only=True)
class OrpoConfig(TrainerConfig):
    """Options of `.train("orpo", ...)`: every trainer's, and one more."""

    weight: float = attrs.field(default=0.1, validator=more_than(0))
    """What the odds' part of the loss is multiplied by; lambda in the paper."""


class Orpo(Trainer[OrpoConfig]):
    """Minimises -c + weight * -log sigmoid(log odds(c) - log odds(r)), c and r mean logps."""

    def learning_rate(self, *, peft):
        """Return the option, or 8e-6, the paper's, whatever is trained."""
        if self.config.learning_rate is not None:
            return self.config.learning_rate
        return 8e-6

    def build(self, session, data, directory):
        """Return a plain `transformers.Trainer` with a loss and figures of its own."""
        import torch
        import torch.nn.functional as F
        import transformers

        from tunesmith.data.pack import PreferenceCollator, padding_id
        from tunesmith.data.render import Renderer
        from tunesmith.nn.logps import completion_logps

        weight = self.config.weight
        renderer = Renderer(session.tokenizer, self.config.max_length)

        def pairs(rows):
            kept = []
            for row, (chosen, rejected) in rendered(rows, renderer.preference):
                if chosen.truncated or rejected.truncated:
                    data.drop(row.where, "an answer does not fit max_length")
                else:
                    kept.append({"chosen": chosen, "rejected": rejected})
            return kept

        train, held_out = pairs(data.train), pairs(data.evaluation)
        if not train:
            raise DataError("orpo: no pair fits max_length; raise it")

        class OrpoTrainer(transformers.Trainer):
            """Logs `odds`, the share of pairs whose chosen answer is the likelier one."""

            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.model_accepts_loss_kwargs = False  # compute_loss returns the mean of a batch
                self._measured = {"train": [], "eval": []}

            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
                logps, counts = completion_logps(
                    model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
                )
                means = logps / counts
                chosen, rejected = (means - torch.log1p(-means.exp())).chunk(2)  # log odds
                ratio = chosen - rejected
                nll = -means.chunk(2)[0]
                loss = (nll - weight * F.logsigmoid(ratio)).mean()
                kept = self._measured["train" if model.training else "eval"]
                kept.append((ratio.detach() > 0).float().mean())
                return (loss, {}) if return_outputs else loss

            def log(self, logs, *args, **kwargs):
                for name, key in (("train", "loss"), ("eval", "eval_loss")):
                    if key in logs and self._measured[name]:
                        mean = torch.stack(self._measured[name]).mean()
                        logs["odds" if name == "train" else "eval_odds"] = float(mean)
                        self._measured[name].clear()
                super().log(logs, *args, **kwargs)

        return OrpoTrainer(
            model=session.model,
            args=training_arguments(self, session, data, directory, label_names=["labels"]),
            train_dataset=train,
            eval_dataset=held_out or None,
            data_collator=PreferenceCollator(padding_id(session.tokenizer)),
        )
