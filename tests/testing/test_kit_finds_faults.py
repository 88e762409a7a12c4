"""The kit fails on plugins that are wrong about padding, evaluation and what they may change.

Each trainer here is the sound one but for a line, as people write it who know one tokenizer.
"""

from __future__ import annotations

import attrs
import pytest
import torch
import transformers

from tunesmith.data.pack import PaddingCollator, padding_id
from tunesmith.data.render import Renderer
from tunesmith.plugin import Spec
from tunesmith.plugin.metrics import Measured, Metric, MetricConfig
from tunesmith.plugin.trainers import Trainer, TrainerConfig, rendered, training_arguments
from tunesmith.testing import tiny_examples
from tunesmith.testing.conformance import MetricConformance, TrainerConformance

pytestmark = pytest.mark.filterwarnings("ignore")


@attrs.frozen(kw_only=True)
class Config(TrainerConfig):
    """Options of the trainers below."""


class Sound(Trainer[Config]):
    """Pads as the guide says."""

    def build(self, session, data, directory):
        renderer = Renderer(session.tokenizer, self.config.max_length)
        train, held_out = (
            [made for _, made in rendered(rows, renderer.conversation)]
            for rows in (data.train, data.evaluation)
        )
        return transformers.Trainer(
            model=session.model,
            args=training_arguments(self, session, data, directory),
            train_dataset=train,
            eval_dataset=held_out or None,
            data_collator=self.collator(session.tokenizer),
        )

    def collator(self, tokenizer):
        return PaddingCollator(padding_id(tokenizer))


class ByPadToken(Sound):
    """Fails on a tokenizer that has none."""

    def collator(self, tokenizer):
        return PaddingCollator(tokenizer.pad_token_id)


class MasksById:
    """What many a collator does: hides whatever looks like padding."""

    def __init__(self, pad, labels):
        self.padded = PaddingCollator(pad)
        self.pad, self.labels = pad, labels

    def __call__(self, rows):
        batch = self.padded(rows)
        hidden = batch["input_ids"] == self.pad
        batch["labels" if self.labels else "attention_mask"][hidden] = -100 if self.labels else 0
        return batch


class ByZero(Sound):
    """Hides token 0 wherever it stands, where there is no pad token."""

    def collator(self, tokenizer):
        return MasksById(tokenizer.pad_token_id or 0, labels=False)


class ByEnd(Sound):
    """Never learns to stop: whatever looks like the end token is taken for padding."""

    def collator(self, tokenizer):
        return MasksById(padding_id(tokenizer), labels=True)


class ByOwnPad(Sound):
    """Never learns to stop with the tokenizers whose pad token is the end token."""

    def collator(self, tokenizer):
        pad = tokenizer.pad_token_id
        return PaddingCollator(0) if pad is None else MasksById(pad, labels=True)


class Changes(Sound):
    """Gives a pad token to everyone's tokenizer."""

    def collator(self, tokenizer):
        tokenizer.pad_token = tokenizer.eos_token
        return super().collator(tokenizer)


class Blind(Sound):
    """Does not look at held-out rows."""

    def build(self, session, data, directory):
        return super().build(session, attrs.evolve(data, evaluation=[]), directory)


class SumsPasses(Sound):
    """Returns the mean of a batch, which transformers takes for one that is divided already."""

    def build(self, session, data, directory):
        built = super().build(session, data, directory)

        class OwnLoss(transformers.Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
                output = model(**inputs)
                return (output.loss, output) if return_outputs else output.loss

        return OwnLoss(
            model=built.model,
            args=built.args,
            train_dataset=built.train_dataset,
            data_collator=built.data_collator,
        )


class Kit(TrainerConformance):
    """The kit, to be called by hand."""

    __test__ = False
    name = "under_test"

    def __init__(self, cls, place):
        self.spec_of = Spec(
            "under_test", Config, f"{__name__}:{cls.__name__}", example="conversation", summary="x"
        )
        self.place = place

    def builder(self):
        make = TrainerConformance.build.__wrapped__
        return make(self, self.spec_of, list(tiny_examples("conversation")), self.place)

    def padding(self):
        self.test_what_the_tokenizer_pads_with_changes_nothing(self.builder())

    def end(self):
        self.test_the_token_that_ends_an_answer_is_learned(self.builder()())

    def accumulation(self):
        examples = list(tiny_examples("conversation"))
        self.test_accumulated_batches_count_as_one(self.spec_of, examples, self.builder())

    def evaluation(self):
        self.test_held_out_rows_are_evaluated(self.spec_of, self.builder())


def test_a_sound_trainer_passes(tmp_path):
    kit = Kit(Sound, tmp_path)
    kit.padding()
    kit.end()
    kit.accumulation()
    kit.evaluation()


@pytest.mark.parametrize("wrong", [ByPadToken, ByZero, ByOwnPad, Changes])
def test_a_trainer_that_is_wrong_about_padding_does_not(wrong, tmp_path):
    with pytest.raises((AssertionError, TypeError)) as found:
        Kit(wrong, tmp_path).padding()
    told = " ".join([str(found.value), *getattr(found.value, "__notes__", ())])
    assert "pads by" in told or "changed the session's tokenizer" in told, told


def test_a_trainer_that_never_learns_to_stop_does_not(tmp_path):
    with pytest.raises(AssertionError, match="2 have no label for the end token"):
        Kit(ByEnd, tmp_path).end()


def test_a_trainer_that_sums_its_forward_passes_does_not(tmp_path):
    with pytest.raises(AssertionError, match="are summed and not averaged"):
        Kit(SumsPasses, tmp_path).accumulation()


def test_a_trainer_that_leaves_held_out_rows_does_not(tmp_path):
    with pytest.raises(AssertionError, match="would never be looked at"):
        Kit(Blind, tmp_path).evaluation()


class PadsByZero(Metric[MetricConfig]):
    """Mean loss with padding told by its id."""

    def measure(self, session, examples):
        from tunesmith.nn.logps import completion_logps

        renderer = Renderer(session.tokenizer, self.config.max_length)
        pad = session.tokenizer.pad_token_id or 0
        batch = MasksById(pad, labels=False)([renderer.conversation(each) for each in examples])
        logps, counts = completion_logps(session.model, **batch)
        return Measured({"loss": float(-logps.sum() / counts.sum())})


def test_a_metric_that_is_wrong_about_padding_does_not_pass(tmp_path):
    metric = PadsByZero(MetricConfig())
    with pytest.raises(AssertionError, match="pads by no token loss is "):
        MetricConformance.test_what_the_tokenizer_pads_with_changes_nothing(
            MetricConformance(), metric, list(tiny_examples("conversation")), tmp_path
        )


def test_token_0_stands_in_what_the_kit_tries():
    from tunesmith.testing import tiny_tokenizer

    ids = tiny_tokenizer(pad_token=None)("!")["input_ids"]
    assert ids == [0]
    assert torch.tensor(ids).eq(0).all()
