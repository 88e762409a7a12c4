"""SFT and DPO: exact references, exact losses, and TRL as the oracle."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

from tunesmith.data.examples import Conversation, Message, Preference, Sourced
from tunesmith.nn.logps import completion_logps
from tunesmith.nn.nf4_linear import NF4Linear
from tunesmith.plugin.session import Session
from tunesmith.plugin.trainers import TrainingData
from tunesmith.testing.tiny import tiny_session
from tunesmith_plugins.methods.lora import Lora, LoraConfig
from tunesmith_plugins.quantizers.nf4 import NF4, NF4Config
from tunesmith_plugins.trainers.dpo import DPO, DPOConfig
from tunesmith_plugins.trainers.sft import SFT, SFTConfig

# a template that ends with the end-of-turn token: TRL also learns whatever white space follows it
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# TRL's own use of names that transformers has renamed is no concern of these tests
oracle = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

PAIRS = [(f"say {n}", f"the number is {n}", f"no, not {n}, I am sorry to say") for n in range(6)]


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def preferences() -> list[Sourced]:
    return [
        Sourced(Preference([user(p)], [assistant(c)], [assistant(r)]), f"row {n}")
        for n, (p, c, r) in enumerate(PAIRS, 1)
    ]


def conversations() -> list[Sourced]:
    return [
        Sourced(Conversation([user(p), assistant(c)]), f"row {n}")
        for n, (p, c, _) in enumerate(PAIRS, 1)
    ]


def no_drop(where: str, reason: str) -> None:
    raise AssertionError(f"{where} was dropped: {reason}")


def session_with_adapter(
    directory: Path, *, quantized: bool = True, dropout: float = 0.0
) -> Session:
    """A session whose adapter is not the identity, as after SFT."""
    session = tiny_session(
        directory,
        quantizer=NF4(NF4Config()) if quantized else None,
        method=Lora(LoraConfig(r=4, dropout=dropout)),
    )
    session.tokenizer.chat_template = CHATML
    torch.manual_seed(7)
    for name, parameter in session.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return session


def dpo_trainer(session: Session, directory: Path, **options):
    settings = {
        "batch_size": len(PAIRS),
        "gradient_accumulation": 1,
        "learning_rate": 1e-2,
        "scheduler": "constant",
        "warmup": 0.0,
        "max_steps": 4,
    }
    config = DPOConfig(**{**settings, **options})
    return DPO(config).build(session, TrainingData(preferences(), [], no_drop), directory)


def reference_logps(trainer) -> torch.Tensor:
    chosen = [pair["reference_chosen_logps"] for pair in trainer.train_dataset]
    rejected = [pair["reference_rejected_logps"] for pair in trainer.train_dataset]
    return torch.tensor(chosen + rejected)


def logps_under(model, trainer) -> torch.Tensor:
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        sums, _ = completion_logps(
            model.eval(), batch["input_ids"], batch["attention_mask"], batch["labels"]
        )
    return sums


def test_the_reference_is_the_sft_model_frozen_before_and_after_steps(tmp_path):
    session = session_with_adapter(tmp_path / "model")
    frozen = copy.deepcopy(session.model)
    trainer = dpo_trainer(session, tmp_path / "out")
    expected = logps_under(frozen, trainer)
    assert torch.allclose(reference_logps(trainer), expected, atol=1e-4)
    trainer.train()
    assert torch.allclose(reference_logps(trainer), expected, atol=1e-4)
    # and the policy did move, so the equality above says something
    assert not torch.allclose(logps_under(session.model, trainer), expected, atol=1e-1)


def test_the_loss_of_the_first_step_is_ln_2_even_with_dropout(tmp_path):
    session = session_with_adapter(tmp_path / "model", dropout=0.5)
    trainer = dpo_trainer(session, tmp_path / "out")
    trainer.train()
    first = next(row for row in trainer.state.log_history if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)


def test_dropout_is_put_back_after_dpo(tmp_path):
    session = session_with_adapter(tmp_path / "model", dropout=0.5)
    dpo_trainer(session, tmp_path / "out", max_steps=1).train()
    rates = {m.p for m in session.model.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.5}


def test_no_second_copy_of_the_base_is_held(tmp_path):
    import gc

    def layers_in_memory() -> int:
        gc.collect()
        return sum(type(thing) is NF4Linear for thing in gc.get_objects())

    session = session_with_adapter(tmp_path / "model")
    assert session.loaded
    before = layers_in_memory()
    trainer = dpo_trainer(session, tmp_path / "out")
    trainer.train()
    assert layers_in_memory() == before
    assert trainer.model is session.model


def test_gradient_accumulation_changes_the_dpo_loss_by_nothing(tmp_path):
    one = dpo_trainer(session_with_adapter(tmp_path / "model"), tmp_path / "a")
    split = dpo_trainer(
        session_with_adapter(tmp_path / "model"),
        tmp_path / "b",
        batch_size=2,
        gradient_accumulation=3,
    )
    one.train()
    split.train()
    left = [row["loss"] for row in one.state.log_history if "loss" in row]
    right = [row["loss"] for row in split.state.log_history if "loss" in row]
    assert left == pytest.approx(right, abs=1e-4)


LIKE_OURS = {
    "per_device_train_batch_size": len(PAIRS),
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 4,
    "logging_steps": 1,
    "max_length": 1024,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
}
"""TRL's names for the settings that the trainers here are built with."""


@oracle
def test_dpo_takes_the_steps_that_trl_takes(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer as TRLTrainer

    ours = dpo_trainer(session_with_adapter(tmp_path / "model", quantized=False), tmp_path / "a")
    ours.train()
    other = session_with_adapter(tmp_path / "model", quantized=False)
    rows = [
        {
            "prompt": [{"role": "user", "content": p}],
            "chosen": [{"role": "assistant", "content": c}],
            "rejected": [{"role": "assistant", "content": r}],
        }
        for p, c, r in PAIRS
    ]
    arguments = TRLConfig(output_dir=str(tmp_path / "trl"), **LIKE_OURS)
    theirs = TRLTrainer(
        model=other.model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=other.tokenizer,
    )
    theirs.train()
    for name in ("loss", "rewards/margins"):
        left = [row[name] for row in ours.state.log_history if name in row]
        right = [float(row[name]) for row in theirs.state.log_history if name in row]
        assert len(left) == 4
        assert left == pytest.approx(right, abs=2e-4), name


def sft_trainer(session: Session, directory: Path, **options):
    settings = {
        "batch_size": len(PAIRS),
        "gradient_accumulation": 1,
        "learning_rate": 1e-2,
        "scheduler": "constant",
        "warmup": 0.0,
        "max_steps": 4,
        "max_grad_norm": 1.0,
    }
    config = SFTConfig(**{**settings, **options})
    return SFT(config).build(session, TrainingData(conversations(), [], no_drop), directory)


def losses_of(trainer) -> list[float]:
    return [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]


@oracle
def test_sft_takes_the_steps_that_trl_takes(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig as TRLConfig
    from trl import SFTTrainer as TRLTrainer

    ours = sft_trainer(session_with_adapter(tmp_path / "model", quantized=False), tmp_path / "a")
    ours.train()
    other = session_with_adapter(tmp_path / "model", quantized=False)
    rows = [
        {
            "prompt": [{"role": "user", "content": p}],
            "completion": [{"role": "assistant", "content": c}],
        }
        for p, c, _ in PAIRS
    ]
    arguments = TRLConfig(output_dir=str(tmp_path / "trl"), **LIKE_OURS)
    theirs = TRLTrainer(
        model=other.model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=other.tokenizer,
    )
    theirs.train()
    assert losses_of(ours) == pytest.approx(losses_of(theirs), abs=1e-4)


def test_the_sft_loss_is_the_mean_over_the_answers_tokens(tmp_path):
    session = session_with_adapter(tmp_path / "model")
    trainer = sft_trainer(session, tmp_path / "out", max_steps=1)
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        sums, counts = completion_logps(
            session.model.eval(), batch["input_ids"], batch["attention_mask"], batch["labels"]
        )
    expected = -float(sums.sum() / counts.sum())
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(expected, abs=1e-5)


def test_gradient_accumulation_changes_the_sft_loss_by_nothing(tmp_path):
    one = sft_trainer(session_with_adapter(tmp_path / "model"), tmp_path / "a")
    split = sft_trainer(
        session_with_adapter(tmp_path / "model"),
        tmp_path / "b",
        batch_size=2,
        gradient_accumulation=3,
    )
    one.train()
    split.train()
    assert losses_of(one) == pytest.approx(losses_of(split), abs=1e-4)


def test_gradient_checkpointing_changes_the_loss_by_nothing(tmp_path):
    plain = sft_trainer(session_with_adapter(tmp_path / "model"), tmp_path / "a")
    saving = sft_trainer(
        session_with_adapter(tmp_path / "model"), tmp_path / "b", gradient_checkpointing=True
    )
    plain.train()
    saving.train()
    assert losses_of(plain) == pytest.approx(losses_of(saving), abs=1e-5)


@pytest.mark.slow  # a minute of g++
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiling_changes_the_loss_by_nothing(checkpointing, tmp_path):
    torch._dynamo.reset()
    options = {"gradient_checkpointing": checkpointing}
    plain = sft_trainer(session_with_adapter(tmp_path / "model"), tmp_path / "a", **options)
    session = session_with_adapter(tmp_path / "model")
    compiled = sft_trainer(session, tmp_path / "b", compile=True, **options)
    plain.train()
    compiled.train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert losses_of(plain) == pytest.approx(losses_of(compiled), abs=1e-4)


def test_packing_changes_the_loss_by_nothing(tmp_path):
    plain = sft_trainer(session_with_adapter(tmp_path / "model"), tmp_path / "a")
    packed = sft_trainer(
        session_with_adapter(tmp_path / "model"), tmp_path / "b", packing=True, max_length=160
    )
    assert len(packed.train_dataset) < len(plain.train_dataset)
    plain.train()
    packed.train()
    assert losses_of(plain) == pytest.approx(losses_of(packed), abs=1e-4)


def test_learning_everything_is_another_loss_than_learning_answers(tmp_path):
    answers = sft_trainer(session_with_adapter(tmp_path / "model"), tmp_path / "a", max_steps=1)
    everything = sft_trainer(
        session_with_adapter(tmp_path / "model"),
        tmp_path / "b",
        max_steps=1,
        completion_only_loss=False,
    )
    count = [
        sum(label != -100 for row in trainer.train_dataset for label in row.labels)
        for trainer in (answers, everything)
    ]
    assert count[1] > 2 * count[0]


@pytest.mark.parametrize(
    ("trainer", "peft", "rate"),
    [
        (SFT(SFTConfig()), True, 2e-4),
        (SFT(SFTConfig()), False, 2e-5),
        (DPO(DPOConfig()), True, 5e-6),
        (DPO(DPOConfig()), False, 5e-7),
        (SFT(SFTConfig(learning_rate=1e-3)), True, 1e-3),
    ],
)
def test_the_learning_rate_follows_the_method(trainer, peft, rate):
    assert trainer.learning_rate(peft=peft) == rate


def test_only_the_adapter_is_trained_on_a_quantized_base(tmp_path):
    session = session_with_adapter(tmp_path / "model")
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    sft_trainer(session, tmp_path / "out").train()
    changed = {
        name
        for name, value in session.model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed
    assert all("lora_" in name for name in changed)
