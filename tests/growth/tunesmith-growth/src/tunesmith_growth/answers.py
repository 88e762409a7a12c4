"""A metric of texts: how much of the reference an answer says, with the answers beside it."""

from __future__ import annotations

import attrs

from tunesmith.plugin.metrics import Measured, Metric, Sample
from tunesmith.plugin.options import at_least


@attrs.frozen(kw_only=True)
class AnswersConfig:
    """Options of `.evaluate("answers", …)`."""

    new_tokens: int = attrs.field(default=16, validator=at_least(1))
    """Tokens of an answer, at most."""
    kept: int = attrs.field(default=4, validator=at_least(0))
    """Answers that are kept for the report."""


class Answers(Metric[AnswersConfig]):
    """`recall`: the share of a reference's words that the answer says, in the mean."""

    def measure(self, session, examples):
        """Let the model answer all but the last turn, and compare with that one."""
        from tunesmith.nn.rollout import Sampling
        from tunesmith.plugin.rollouts import ask

        prompts = [example.messages[:-1] for example in examples]
        sampling = Sampling(max_new_tokens=self.config.new_tokens, temperature=0)
        texts = ask(session.model, session.tokenizer, prompts, sampling).texts
        references = [example.messages[-1].content for example in examples]
        scores = [
            len(set(text.split()) & set(wanted.split())) / len(set(wanted.split()))
            for text, wanted in zip(texts, references, strict=True)
        ]
        samples = [
            Sample(prompt[-1].content, text, wanted, {"recall": score})
            for prompt, text, wanted, score in zip(prompts, texts, references, scores, strict=True)
        ]
        return Measured({"recall": sum(scores) / len(scores)}, samples[: self.config.kept])
