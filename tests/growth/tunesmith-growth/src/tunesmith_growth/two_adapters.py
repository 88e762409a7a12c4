"""Policy gradients with two adapters on one base: one learns, one holds it near (REINFORCE with a
penalty of KL; Williams 1992, arXiv:1909.08593).
"""

from __future__ import annotations

import attrs

from tunesmith.data.examples import Prompt
from tunesmith.errors import RunError
from tunesmith.plugin.options import at_least
from tunesmith.plugin.rewards import Rewards, scorer
from tunesmith.plugin.trainers import Trainer, TrainerConfig, training_arguments


@attrs.frozen(kw_only=True)
class TwoAdaptersConfig(TrainerConfig):
    """Options of `.train("two_adapters")`."""

    reward: Rewards
    """What scores answers."""
    reference: str = "sft"
    """The adapter that is held to, by its name."""
    kl: float = attrs.field(default=0.05, validator=at_least(0))
    """How much of the divergence from it is taken off the reward."""
    samples: int = attrs.field(default=4, validator=at_least(2))
    """Answers to a prompt; their mean reward is the baseline."""
    new_tokens: int = attrs.field(default=8, validator=at_least(1))
    """Tokens of an answer, at most."""


class TwoAdapters(Trainer[TwoAdaptersConfig]):
    """Raises the log-probability of answers that are scored above their prompt's mean."""

    objective = "reward"

    def build(self, session, data, directory):
        """Load the reference beside the adapter that goes on, and return the trainer."""
        import torch
        import transformers

        from tunesmith.data.pack import padding_id
        from tunesmith.nn.rollout import Sampling, roll_out, token_logps
        from tunesmith.plugin.rollouts import prompt_ids, stop_ids

        config, tokenizer = self.config, session.tokenizer
        held = session.adapters.get(config.reference)
        if held is None:
            raise RunError(f"two_adapters: there is no adapter '{config.reference}' to hold to")
        model = session.model
        model.load_adapter(held.directory, "reference", is_trainable=False)
        score = scorer(config.reward).score
        pad, stops = padding_id(tokenizer), stop_ids(tokenizer)
        sampling = Sampling(max_new_tokens=config.new_tokens)
        asked = [Prompt(row.example.messages[:-1]) for row in data.train]
        prompts = [(each, prompt_ids(tokenizer, each.prompt)) for each in asked]

        class PolicyTrainer(transformers.Trainer):
            rewards = ()

            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.model_accepts_loss_kwargs = False  # compute_loss returns the mean of a batch

            def compute_loss(self, model, inputs, return_outputs=False, **_):
                asked, ids = zip(*inputs["prompts"], strict=True)
                found = roll_out(
                    model,
                    ids,
                    sampling,
                    stop_ids=stops,
                    pad_id=pad,
                    samples=config.samples,
                    logps=False,
                )
                said = found.completions()
                texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in said]
                repeated = [each for each in asked for _ in range(config.samples)]
                rewards = torch.tensor(score(repeated, texts, said).total)
                with torch.no_grad():
                    model.base_model.set_adapter("reference", inference_mode=True)
                    reference = token_logps(model, found.prompts, said, pad_id=pad)
                    model.base_model.set_adapter("default")
                policy = token_logps(model, found.prompts, said, pad_id=pad)
                kl = (policy.detach() - reference).sum(1)
                shaped = (rewards - config.kl * kl).view(-1, config.samples)
                advantage = (shaped - shaped.mean(1, keepdim=True)).view(-1)
                self.rewards = (*self.rewards, float(rewards.mean()))
                loss = -(advantage * policy.sum(1)).mean()
                return (loss, {}) if return_outputs else loss

            def log(self, logs, *args, **kwargs):
                if "loss" in logs and self.rewards:
                    logs["reward"] = sum(self.rewards) / len(self.rewards)
                    self.rewards = ()
                super().log(logs, *args, **kwargs)

        return PolicyTrainer(
            model=model,
            args=training_arguments(self, session, data, directory),
            train_dataset=[{"prompts": each} for each in prompts],
            data_collator=lambda rows: {"prompts": [row["prompts"] for row in rows]},
        )
