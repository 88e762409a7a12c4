"""A reward model: a head of one number, by pairs (Bradley and Terry 1952; arXiv:2203.02155)."""

from __future__ import annotations

import attrs

from tunesmith.nn.tasks import sequence_classification
from tunesmith.plugin.trainers import Trainer, TrainerConfig, rendered, training_arguments


@attrs.frozen(kw_only=True)
class RewardHeadConfig(TrainerConfig):
    """Options of `.train("reward_head")`."""


class RewardHead(Trainer[RewardHeadConfig]):
    """Minimises -log sigmoid(r(chosen) - r(rejected))."""

    task = sequence_classification(1)

    def build(self, session, data, directory):
        """Render the pairs, and return a trainer that compares their last tokens' scores."""
        import torch.nn.functional as F
        import transformers

        from tunesmith.data.pack import PreferenceCollator, padding_id
        from tunesmith.data.render import Renderer

        renderer = Renderer(session.tokenizer, self.config.max_length)

        def pairs(rows):
            kept = []
            for row, (chosen, rejected) in rendered(rows, renderer.preference):
                if chosen.truncated or rejected.truncated:
                    data.drop(row.where, "the answer's end is beyond max_length")
                else:
                    kept.append({"chosen": chosen, "rejected": rejected})
            return kept

        train, held_out = pairs(data.train), pairs(data.evaluation)
        model = session.model
        model.config.pad_token_id = padding_id(session.tokenizer)

        class RewardTrainer(transformers.Trainer):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.model_accepts_loss_kwargs = False  # compute_loss returns the mean of a batch

            def compute_loss(self, model, inputs, return_outputs=False, **_):
                asked = {name: inputs[name] for name in ("input_ids", "attention_mask")}
                chosen, rejected = model(**asked).logits.float().squeeze(-1).chunk(2)
                loss = -F.logsigmoid(chosen - rejected).mean()
                return (loss, {}) if return_outputs else loss

        collate = PreferenceCollator(padding_id(session.tokenizer))
        return RewardTrainer(
            model=model,
            args=training_arguments(self, session, data, directory, label_names=["labels"]),
            train_dataset=train,
            eval_dataset=held_out or None,
            data_collator=lambda pairs: {
                name: value for name, value in collate(pairs).items() if "logps" not in name
            },
        )
