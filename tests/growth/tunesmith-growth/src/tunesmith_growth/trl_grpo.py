"""GRPO by TRL's own trainer (arXiv:2402.03300): a library's class, handed back as it is."""

from __future__ import annotations

import copy
import importlib

import attrs

from tunesmith.plugin.options import at_least
from tunesmith.plugin.trainers import Trainer, TrainerConfig, training_arguments


@attrs.frozen(kw_only=True)
class TrlGrpoConfig(TrainerConfig):
    """Options of `.train("trl_grpo")`."""

    reward: str
    """What scores answers: "package.module:function", called as TRL calls one."""
    generations: int = attrs.field(default=4, validator=at_least(2))
    """Answers sampled for a prompt."""
    new_tokens: int = attrs.field(default=16, validator=at_least(1))
    """Tokens of an answer, at most."""


class TrlGrpo(Trainer[TrlGrpoConfig]):
    """Raises the rewards of answers above the mean of their prompt's."""

    objective = "reward"

    def build(self, session, data, directory):
        """Return TRL's trainer over the session's model; the prompt is all but the last turn."""
        import trl
        from datasets import Dataset

        config = self.config
        rows = [
            {"prompt": [{"role": m.role, "content": m.content} for m in row.example.messages[:-1]]}
            for row in data.train
        ]
        module, _, name = config.reward.partition(":")
        arguments = training_arguments(
            self,
            session,
            data,
            directory,
            cls=trl.GRPOConfig,
            num_generations=config.generations,
            max_completion_length=config.new_tokens,
            eval_strategy="no",
        )
        return trl.GRPOTrainer(
            model=session.model,
            reward_funcs=getattr(importlib.import_module(module), name),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=copy.deepcopy(session.tokenizer),  # it gives it a pad token
        )
