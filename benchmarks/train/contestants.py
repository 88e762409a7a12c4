"""The contestants, each called as its users call it. Imported in a worker only."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from benchmarks.train.cases import (
    BF16,
    OURS,
    OURS_FP32,
    PEFT_BNB,
    TRANSFORMERS_BNB,
    TRL_BNB,
    TRL_BNB_EAGER,
    Job,
)

__all__ = ["SEED", "Training", "import_libraries", "load_base", "load_to_decode", "make_trainer"]

SEED = 0
RANK = ALPHA = 16
LEARNING_RATE = 2e-4

_IN_4_BITS = frozenset({TRL_BNB, TRL_BNB_EAGER, TRANSFORMERS_BNB, PEFT_BNB})


@attrs.frozen(eq=False)
class Training:
    """A trainer that is ready, and what is to be known about its steps."""

    trainer: Any
    """A transformers.Trainer."""
    tokens: list[int]
    """Filled while it trains: the tokens of each batch it has collated, padding left out."""
    reference: Callable[[int], object] | None = None
    """Does the reference's pass over the pairs of so many steps, where the trainer does it before
    the first step; None where each step has its own."""


def import_libraries(contestant: str) -> None:
    """Import whatever the contestant will use, so that memory can be measured without it."""
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    if contestant == OURS:
        import tunesmith_plugins.trainers.dpo
        import tunesmith_plugins.trainers.sft  # noqa: F401
    else:
        import bitsandbytes  # noqa: F401
        import datasets  # noqa: F401
        from trl import DPOTrainer, SFTTrainer  # noqa: F401


def load_base(job: Job) -> Any:
    """Return the base model, quantized if the contestant does that, without an adapter."""
    if job.contestant == OURS:
        return attrs.evolve(_session(job), method=None).model
    from transformers import AutoModelForCausalLM

    options = _loading(job)
    if job.device != "cpu":
        options["device_map"] = job.device
    return AutoModelForCausalLM.from_pretrained(job.model, **options)


def load_to_decode(job: Job) -> Callable[..., Any]:
    """Return what generates with the model, as the options of transformers' generate() say.

    The model has a LoRA adapter, except for transformers in bf16.
    """
    if job.contestant == OURS:
        from tunesmith.nn import decoder, fused_layers

        model = _session(job).model.eval()
        fused_layers.use(model)  # as the runs' generate() does it
        return functools.partial(decoder.generate, model)
    model = load_base(job)
    if job.contestant != BF16:
        from peft import get_peft_model

        model = get_peft_model(model, _lora())
    generate: Callable[..., Any] = model.eval().generate
    return generate


def make_trainer(
    job: Job, rows: Sequence[tuple[str, ...]], steps: int, *, packing: bool
) -> Training:
    """Return the contestant's trainer, ready to take so many steps.

    It is one of SFT for rows (prompt, completion), one of DPO for rows (prompt, chosen, rejected).
    All take the rows in one shuffled order.
    """
    make = _ours if job.contestant in (OURS, OURS_FP32) else _trl
    training = make(job, rows, steps, packing)
    trainer = training.trainer
    order = list(range(len(trainer.train_dataset)))
    random.Random(SEED).shuffle(order)
    # not a RandomSampler, which accelerate would seed again
    trainer._get_train_sampler = lambda *_: order
    return training


# tunesmith


def _session(job: Job) -> Any:
    from tunesmith.engine.session import open_session
    from tunesmith.recipe import Recipe
    from tunesmith_plugins.methods.lora import Lora, LoraConfig
    from tunesmith_plugins.quantizers.nf4 import NF4, NF4Config

    recipe = Recipe(model=job.model, seed=SEED)
    precision = "fp32" if job.contestant == OURS_FP32 else job.precision
    session = open_session(recipe, Path(job.model), job.device, precision)
    if job.quantized:
        session = session.with_quantizer(NF4(NF4Config()))
    return session.with_method(Lora(LoraConfig(r=RANK, alpha=ALPHA)))


def _ours(job: Job, rows: Sequence[tuple[str, ...]], steps: int, packing: bool) -> Training:
    from tunesmith.data.examples import Conversation, Message, Preference, Sourced
    from tunesmith.plugin.trainers import TrainingData
    from tunesmith_plugins.trainers.dpo import DPO, DPOConfig
    from tunesmith_plugins.trainers.sft import SFT, SFTConfig

    sft = len(rows[0]) == 2
    options: dict[str, Any] = {
        "batch_size": job.batch,
        "gradient_accumulation": 1,
        "max_steps": steps,
        "max_length": job.max_length,
        "learning_rate": LEARNING_RATE,
        "scheduler": "constant",
        "warmup": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": job.checkpointing,
    }
    session = _session(job).at_work(trains=True)
    made: list[Any]
    trainer: Any
    if sft:
        made = [
            Conversation([Message("user", prompt), Message("assistant", answer)])
            for prompt, answer in rows
        ]
        trainer = SFT(SFTConfig(packing=packing, **options))
    else:
        made = [
            Preference(
                [Message("user", prompt)],
                [Message("assistant", chosen)],
                [Message("assistant", rejected)],
            )
            for prompt, chosen, rejected in rows
        ]
        trainer = DPO(DPOConfig(**options))
    data = [Sourced(example, f"row {number}") for number, example in enumerate(made, 1)]
    built = trainer.build(session, TrainingData(data, [], _no_drop), Path(job.work))
    if sft:
        return Training(built, _count(built, _our_tokens))

    def reference(passes: int) -> None:
        pairs = built.train_dataset[: job.batch * passes]
        built.add_reference([dict(pair) for pair in pairs])  # of copies: this one does not count

    return Training(built, _count(built, _our_pair_tokens), reference)


def _no_drop(where: str, reason: str) -> None:
    raise ValueError(f"{where} was dropped: {reason}")


def _our_tokens(row: Any) -> int:
    return sum(map(len, row)) if isinstance(row, list) else len(row)


def _our_pair_tokens(row: Any) -> int:
    return len(row["chosen"]) + len(row["rejected"])


# TRL, PEFT, bitsandbytes, transformers


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def _loading(job: Job) -> dict[str, Any]:
    """Return what from_pretrained is given."""
    dtype = torch.float32 if job.precision == "fp32" else torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype}
    if job.contestant == TRL_BNB_EAGER:
        options["attn_implementation"] = "eager"
    if job.contestant in _IN_4_BITS:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return options


def _trl(job: Job, rows: Sequence[tuple[str, ...]], steps: int, packing: bool) -> Training:
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    sft = len(rows[0]) == 2
    loading = _loading(job)
    quantization = loading.pop("quantization_config", None)
    options: dict[str, Any] = {
        "output_dir": job.work,
        "per_device_train_batch_size": job.batch,
        "max_steps": steps,
        "max_length": job.max_length,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "gradient_checkpointing": job.checkpointing,
        "model_init_kwargs": loading,
        "bf16": job.precision == "bf16",
        "use_cpu": job.device == "cpu",
        "seed": SEED,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    if sft:
        made = [
            {"prompt": _turn("user", prompt), "completion": _turn("assistant", answer)}
            for prompt, answer in rows
        ]
        trainer_class, arguments = trl.SFTTrainer, trl.SFTConfig(packing=packing, **options)
    else:
        made = [
            {
                "prompt": _turn("user", prompt),
                "chosen": _turn("assistant", chosen),
                "rejected": _turn("assistant", rejected),
            }
            for prompt, chosen, rejected in rows
        ]
        trainer_class, arguments = trl.DPOTrainer, trl.DPOConfig(**options)
    trainer = trainer_class(
        model=job.model,
        args=arguments,
        train_dataset=Dataset.from_list(made),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=_lora(),
        quantization_config=quantization,
    )
    if sft:
        return Training(trainer, _count(trainer, lambda row: len(row["input_ids"])))
    limit = job.max_length
    return Training(trainer, _count(trainer, lambda row: _trl_pair_tokens(row, limit)))


def _turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def _trl_pair_tokens(row: dict[str, Sequence[int]], limit: int) -> int:
    prompt = len(row["prompt_ids"])
    return sum(min(limit, prompt + len(row[name])) for name in ("chosen_ids", "rejected_ids"))


def _count(trainer: Any, tokens_of: Callable[[Any], int]) -> list[int]:
    """Let the trainer's collator note the tokens of each batch."""
    collate = trainer.data_collator
    noted: list[int] = []

    def counting(rows: Sequence[Any]) -> Any:
        noted.append(sum(map(tokens_of, rows)))
        return collate(rows)

    trainer.data_collator = counting
    return noted
