"""Interface of a trainer, and the options that every trainer shares.

A trainer plugin hands back a `Training`: a `transformers.Trainer`, TRL's or its own. The loop,
gradient accumulation, distribution, logging and resuming come with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import attrs

from tunesmith.data.examples import Sourced
from tunesmith.errors import DataError, OptionError
from tunesmith.nn.tasks import CAUSAL_LM, Task
from tunesmith.plugin.conditions import Conditions, Piece, Resolved
from tunesmith.plugin.optimizers import (
    AUTO,
    OPTIMIZERS,
    described_optimizer,
    optimizer_called,
    optimizer_name,
)
from tunesmith.plugin.options import PATHS, at_least, more_than, one_of, part_of_rows
from tunesmith.recipe_data import ON_BAD_ROW

if TYPE_CHECKING:
    from tunesmith.plugin.session import Session

__all__ = [
    "Trainer",
    "TrainerConfig",
    "Training",
    "TrainingData",
    "rendered",
    "training_arguments",
]

SCHEDULERS = (
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
)
SCHEDULER_OPTIONS = {"cosine_with_min_lr": {"min_lr_rate": 0.1}}
"""What transformers wants to know of some: here the share of the peak that is left at the end."""
WARMUP = 0.03
"""Share of the steps that warm up unless said otherwise, as in QLoRA and Alpaca."""
LOGGERS = ("none", "tensorboard", "wandb")
SAVE_STRATEGIES = ("no", "steps", "epoch")
CHECKPOINTS_KEPT = 2
"""Complete checkpoints that stay at a time unless said otherwise."""


@attrs.frozen
class TrainingData:
    """What a trainer is given to learn from."""

    train: Sequence[Sourced]
    evaluation: Sequence[Sourced]
    """Held-out examples; empty if no evaluation was asked for."""
    drop: Callable[[str, str], None]
    """`drop(where, reason)` records a row that the trainer cannot use."""
    cut: Callable[[str, str], None] = attrs.field(default=lambda where, reason: None)
    """`cut(where, reason)` records a row that is used without the end of its answer."""


@attrs.frozen(kw_only=True)
class TrainerConfig:
    """Options that every trainer has."""

    epochs: float = attrs.field(default=1.0, validator=more_than(0))
    """Passes over the training data; ignored when max_steps is given."""
    max_steps: int | None = attrs.field(default=None, validator=at_least(1))
    """Optimizer steps to take, instead of epochs."""
    batch_size: int = attrs.field(default=4, validator=at_least(1))
    """Examples (or packed blocks) in one forward pass on one device."""
    gradient_accumulation: int = attrs.field(default=4, validator=at_least(1))
    """Forward passes summed into one optimizer step; 4 x 4 = 16 follows QLoRA (arXiv:2305.14314,
    table 9)."""
    learning_rate: float | None = attrs.field(default=None, validator=more_than(0))
    """Peak learning rate; unset takes the trainer's own for the method in use."""
    scheduler: str = attrs.field(default="cosine", validator=one_of(*SCHEDULERS))
    """Learning rate over time; cosine as Stanford Alpaca's and the alignment handbook's recipes."""
    warmup: float | None = attrs.field(default=None, validator=at_least(0))
    """Share of all steps (below 1) or number of steps that warm up; unset takes 0.03, as QLoRA and
    Alpaca, and none with the scheduler "constant", which has no warm-up."""
    max_length: int = attrs.field(default=1024, validator=at_least(8))
    """Tokens of a sequence, prompt included; longer ones are cut at the end. 1024 as TRL."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    optimizer: str = attrs.field(default=AUTO, validator=one_of(AUTO, *OPTIMIZERS))
    """auto takes torch's fused AdamW; bitsandbytes' 8-bit ones round its states."""
    weight_decay: float = attrs.field(default=0.0, validator=at_least(0))
    """AdamW's decoupled weight decay; 0 as QLoRA and Alpaca."""
    max_grad_norm: float = attrs.field(default=1.0, validator=more_than(0))
    """Gradients are scaled down to this norm; 1.0 is transformers' default, QLoRA uses 0.3."""
    seed: int | None = None
    """Seed of shuffling and dropout; unset takes the recipe's."""
    eval_data: str | tuple[str, ...] | None = attrs.field(default=None, metadata={PATHS: "data"})
    """Held-out data to evaluate on, read in the same format as the training data."""
    on_bad_row: str = attrs.field(default="error", validator=one_of(*ON_BAD_ROW))
    """What is done about a row that its format cannot read: "error" stops, naming it, and "drop"
    leaves it out and lists it."""
    eval_split: float | int = attrs.field(default=0, validator=part_of_rows(none=True))
    """Share (below 1) or number of rows held out of the training data to evaluate on."""
    eval_steps: int | None = attrs.field(default=None, validator=at_least(1))
    """Evaluate every so many optimizer steps; unset evaluates once an epoch."""
    early_stopping: int | None = attrs.field(default=None, validator=at_least(1))
    """Stop after so many evaluations without a better eval loss, and keep the best weights."""
    save_steps: int | None = attrs.field(default=None, validator=at_least(1))
    """Take a checkpoint every so many optimizer steps, and keep the last ones; unset, one is taken
    every ten minutes or tenth of the steps, and none is kept but the result."""
    save_strategy: str | None = attrs.field(
        default=None, validator=attrs.validators.optional(one_of(*SAVE_STRATEGIES))
    )
    """epoch takes a checkpoint at the end of each epoch, steps every save_steps, and the last ones
    are kept; no takes none on the way, not by time either. Unset is steps where save_steps is."""
    save_total_limit: int | None = attrs.field(default=None, validator=at_least(1))
    """Checkpoints that are kept of those which were asked for, beside the best one; unset keeps the
    last two."""
    logging_steps: int = attrs.field(default=1, validator=at_least(1))
    """Log every so many optimizer steps."""
    loggers: tuple[str, ...] = attrs.field(
        default=(), validator=attrs.validators.deep_iterable(one_of(*LOGGERS))
    )
    """tensorboard, wandb or none; nothing is ever sent anywhere unless named here."""
    deduplicate: bool = True
    """Drop rows that say exactly what an earlier row says; they are counted and listed."""

    @property
    def saving(self) -> str:
        """When checkpoints are taken that are kept: "no", "steps" or "epoch"."""
        return self.save_strategy or ("steps" if self.save_steps else "no")

    @property
    def checkpoints_kept(self) -> int:
        """How many complete checkpoints stay at a time, beside the best one."""
        return self.save_total_limit or CHECKPOINTS_KEPT

    @property
    def packs(self) -> bool:
        """Whether the options put several rows into one sequence."""
        return False

    @classmethod
    def problems_without_evaluation(cls, options: Mapping[str, Any]) -> list[str]:
        """Return which of the options given need rows to evaluate on, where they ask for none.

        Asked where the data holds none out by itself.
        """
        if options.get("eval_split") or options.get("eval_data") is not None:
            return []
        remedy = "; give eval_split or eval_data, or data with a split"
        found = []
        if options.get("early_stopping") is not None:
            found.append(f"early_stopping needs something to evaluate on{remedy}")
        if options.get("eval_steps") is not None:
            found.append(f"eval_steps needs something to evaluate on{remedy}; or leave it out")
        return found

    def __attrs_post_init__(self) -> None:
        problems = []
        if self.eval_data is not None and self.eval_split:
            problems.append("eval_data and eval_split exclude each other; give one of them")
        if self.warmup and self.scheduler == "constant":
            problems.append(
                f"warmup: got {self.warmup:g} with the scheduler 'constant', which has no warm-up; "
                "take 'constant_with_warmup', or leave warmup out"
            )
        elif self.warmup is not None and self.warmup > 1 and self.warmup != int(self.warmup):
            problems.append(
                f"warmup: got {self.warmup:g}; expected a share below 1 or a whole number of steps"
            )
        problems += _problems_of_saving(
            self.save_strategy, self.save_steps, self.save_total_limit, self.early_stopping
        )
        if "none" in self.loggers and len(set(self.loggers)) > 1:
            problems.append(
                f"loggers: got {', '.join(self.loggers)}; none stands alone: leave it out"
            )
        if problems:
            raise OptionError(problems)


def _problems_of_saving(
    strategy: str | None, steps: int | None, limit: int | None, stopping: int | None
) -> list[str]:
    """Return what of the options about checkpoints would not be done."""
    found = []
    if strategy == "steps" and not steps:
        found.append("save_strategy: got 'steps' without save_steps; give that too")
    if strategy in ("no", "epoch") and steps:
        found.append(
            f"save_strategy: got {strategy!r} with save_steps={steps}, which is of 'steps'; leave "
            "one of them out"
        )
    if strategy is not None and stopping is not None:
        found.append(
            f"save_strategy: got {strategy!r} with early_stopping, which takes a checkpoint at "
            "each evaluation; leave save_strategy out"
        )
    if limit is not None and not steps and strategy in (None, "no"):
        found.append(
            f"save_total_limit: got {limit}, and no checkpoint is kept; give save_steps or "
            "save_strategy='epoch' as well, or leave it out"
        )
    return found


C = TypeVar("C", bound=TrainerConfig)


R = TypeVar("R")

SHOWN = 5
"""Rows that are named of those that cannot be rendered."""
LOOKED_AT = 100
"""Rows that cannot be rendered after which no further ones are looked for."""


def rendered(rows: Iterable[Sourced], render: Callable[[Any], R]) -> Iterator[tuple[Sourced, R]]:
    """Yield each row with what `render` makes of its example.

    Errors: `DataError`, after all rows were tried, that names those which cannot be rendered.
    """
    bad: list[str] = []
    for row in rows:
        try:
            made = render(row.example)
        except DataError as error:
            bad.append(f"{row.where}: {error}")
            if len(bad) == LOOKED_AT:
                break
            continue
        yield row, made
    if bad:
        least = "at least " if len(bad) == LOOKED_AT else ""
        more = [f"... and {least}{len(bad) - SHOWN} more rows"] if len(bad) > SHOWN else []
        raise DataError("\n".join([*bad[:SHOWN], *more]))


class Training(Protocol):
    """What a trainer builds: a `transformers.Trainer`, TRL's or a subclass of its own."""

    model: Any
    """What is trained, and kept when `train` has returned: of the session's method."""
    state: Any
    """A `transformers.TrainerState`."""

    def add_callback(self, callback: Any) -> None:
        """Have a `transformers.TrainerCallback` told of each step and log."""

    def train(self, resume_from_checkpoint: str | None = None) -> Any:
        """Train to the end, from a checkpoint if one is given."""


class Trainer(Resolved, ABC, Generic[C]):
    """Builds the training of one step.

    Its Spec says which example shape it takes (`example="conversation"`), so that data of another
    shape is refused before any weight is read.
    """

    task: ClassVar[Task] = CAUSAL_LM
    """What kind of model it trains; `session.model` is one."""
    objective: ClassVar[str | None] = "loss"
    """The logged value that it optimizes, which has to be a number in the end; None is for a
    trainer that logs no such value."""

    def __init__(self, config: C) -> None:
        self.config = config

    @abstractmethod
    def build(self, session: Session, data: TrainingData, directory: Path) -> Training:
        """Return a training that is ready for `train()`: mostly a `transformers.Trainer`.

        Its `model` is `session.model`, or one made by `session.model_for(…)`, and is what is kept.

        `directory` is the trainer's own, for checkpoints and logs. Rows that cannot be used are
        recorded with `data.drop`. Render the rows before `session.model` is first read, so that
        data which does not fit the chat template is found before any weight is loaded.

        The host takes checkpoints of it, whatever its class. What one sums up between two logs is
        kept if it lies in `_measured` (or TRL's `_metrics`) as numbers and tensors in dictionaries
        and lists, so that a training which goes on logs what an undisturbed one does.
        """

    def explain(self, conditions: Conditions) -> tuple[Piece, ...]:
        """Return each thing that decides how fast the training is; asked by a plan.

        `conditions.model` is there. Unless overridden it is the optimizer alone: no piece is
        claimed that a trainer does not say it has.
        """
        return (described_optimizer(self.config.optimizer, conditions),)

    def effective(self, conditions: Conditions) -> Mapping[str, Any]:
        """Return the options as they will act, and `effective_batch_size`: rows an update is over.

        That is batch_size x gradient_accumulation x processes.
        """
        config: TrainerConfig = self.config
        rows = config.batch_size * config.gradient_accumulation * conditions.processes
        return {
            **super().effective(conditions),
            "learning_rate": self.learning_rate(peft=not conditions.trains_base),
            "warmup": warmup_of(config),
            "optimizer": optimizer_name(config.optimizer),
            "seed": conditions.seed if config.seed is None else config.seed,
            "save_strategy": config.saving,
            "save_total_limit": None if config.saving == "no" else config.checkpoints_kept,
            "effective_batch_size": rows,
        }

    def learning_rate(self, *, peft: bool) -> float:
        """Return the peak learning rate: the option, or this trainer's default.

        `peft` is False for full fine-tuning, which wants about a tenth.
        """
        if self.config.learning_rate is not None:
            return self.config.learning_rate
        return 2e-4 if peft else 2e-5


def training_arguments(
    trainer: Trainer[Any],
    session: Session,
    data: TrainingData,
    directory: Path,
    *,
    cls: type[Any] | None = None,
    **overrides: Any,
) -> Any:
    """Return `transformers.TrainingArguments` for the shared options, or such a `cls`.

    `cls` is a subclass, such as one of TRL's configs. `overrides` go on top, in its own names.
    """
    import torch
    import transformers

    config: TrainerConfig = trainer.config
    evaluates = len(data.evaluation) > 0
    full = session.trains_base
    eval_strategy = "no" if not evaluates else ("steps" if config.eval_steps else "epoch")
    best = config.early_stopping is not None
    if best:  # the best weights can only be put back if each evaluation left a checkpoint
        save_strategy, save_steps = eval_strategy, config.eval_steps or 500
    else:
        save_strategy, save_steps = config.saving, config.save_steps or 500
    settings: dict[str, Any] = {
        "output_dir": str(directory),
        "run_name": directory.parent.name.strip(".").removesuffix(".partial"),
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "learning_rate": trainer.learning_rate(peft=not full),
        "lr_scheduler_type": config.scheduler,
        "lr_scheduler_kwargs": SCHEDULER_OPTIONS.get(config.scheduler, {}),
        "warmup_steps": warmup_of(config),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": optimizer_called(config.optimizer).argument,
        # an adapter trains in fp32 on a base held in the compute dtype; full fine-tuning holds
        # fp32 weights and computes in 16 bits by autocast
        "bf16": full and session.dtype == torch.bfloat16,
        "fp16": session.dtype == torch.float16,
        "use_cpu": session.device.type == "cpu",
        "seed": session.seed if config.seed is None else config.seed,
        "eval_strategy": eval_strategy,
        "eval_steps": config.eval_steps,
        "save_strategy": save_strategy,
        "save_steps": save_steps,
        "save_total_limit": config.checkpoints_kept,
        "load_best_model_at_end": best,
        "metric_for_best_model": "eval_loss" if best else None,
        "greater_is_better": False if best else None,
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        # the filter would log a mean in the place of a loss that is no number
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "report_to": [name for name in config.loggers if name != "none"] or "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": session.device.type == "cuda",
        # no buffer is trained, and those of a quantized base are the base: sent at every step
        "ddp_broadcast_buffers": False,
    }
    # transformers 5.20 renamed the option; the old name warns
    made: Any = transformers.TrainingArguments if cls is None else cls
    known = made.__dataclass_fields__
    prefix = "activation" if "activation_checkpointing" in known else "gradient"
    settings[f"{prefix}_checkpointing"] = config.gradient_checkpointing
    settings[f"{prefix}_checkpointing_kwargs"] = {"use_reentrant": False}
    return made(**{**settings, **overrides})


def warmup_of(config: TrainerConfig) -> float:
    """Return the share of the steps that warm up, or their number from 1 on."""
    if config.warmup is None:
        return 0.0 if config.scheduler == "constant" else WARMUP
    return config.warmup
