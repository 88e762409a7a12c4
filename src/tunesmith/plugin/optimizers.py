"""The optimizers that every trainer offers, and what each holds for a trained weight."""

from __future__ import annotations

import attrs

from tunesmith.plugin.conditions import Conditions, Piece

__all__ = [
    "AUTO",
    "OPTIMIZERS",
    "Optimizer",
    "described_optimizer",
    "optimizer_called",
    "optimizer_name",
    "optimizer_problem",
]

AUTO = "auto"


@attrs.frozen
class Optimizer:
    """One of them."""

    argument: str
    """The `optim` of transformers' TrainingArguments."""
    state_bytes: float
    """Bytes of state for each trained weight."""
    text: str
    """What explain() calls it."""
    package: str = ""
    """What has to be installed for it."""
    paged: bool = False
    """Whether its states leave a GPU's memory where that is short."""


OPTIMIZERS = {
    # two moments in fp32
    "adamw": Optimizer("adamw_torch_fused", 8.0, "torch's fused AdamW"),
    # two moments of a byte, and two fp32 scales for each block of 256 (arXiv:2110.02861)
    "adamw_8bit": Optimizer(
        "adamw_bnb_8bit", 2.03, "bitsandbytes' AdamW, states in 8 bits", "bitsandbytes"
    ),
    "paged_adamw_8bit": Optimizer(
        "paged_adamw_8bit",
        2.03,
        "bitsandbytes' AdamW, states in 8 bits, paged out where a GPU's memory is short",
        "bitsandbytes",
        paged=True,
    ),
    # what QLoRA was trained with (arXiv:2305.14314)
    "paged_adamw_32bit": Optimizer(
        "paged_adamw_32bit",
        8.0,
        "bitsandbytes' AdamW, paged out where a GPU's memory is short",
        "bitsandbytes",
        paged=True,
    ),
    # a row and a column of second moments for each matrix (arXiv:1804.04235), rounded up
    "adafactor": Optimizer("adafactor", 0.5, "Adafactor"),
    "sgd": Optimizer("sgd", 0.0, "plain SGD"),
}


def optimizer_name(option: str) -> str:
    """Return the key of `OPTIMIZERS` that an option `optimizer` stands for."""
    return "adamw" if option == AUTO else option


def optimizer_called(name: str) -> Optimizer:
    """Return the optimizer that an option `optimizer` stands for."""
    return OPTIMIZERS[optimizer_name(name)]


def described_optimizer(name: str, conditions: Conditions) -> Piece:
    """Return which optimizer a step takes, and why."""
    taken = optimizer_called(name)
    notes = []
    if name == AUTO and not conditions.trains_base:
        notes.append("auto: what is trained is small beside the model, and so are its states")
    elif name == AUTO:
        notes.append(
            f"auto: {taken.state_bytes:.0f} bytes of states for each weight; adamw_8bit would "
            f"round them to {OPTIMIZERS['adamw_8bit'].state_bytes:.0f}"
        )
    return Piece(f"optimizer: {taken.text}" + (f" ({'; '.join(notes)})" if notes else ""))


def optimizer_problem(option: str, device: str) -> str | None:
    """Return why an optimizer cannot be had on a device of this type, and what to take instead."""
    if option == AUTO or option not in OPTIMIZERS or not OPTIMIZERS[option].paged:
        return None
    if device == "cuda":
        return None
    return (
        f"optimizer: got '{option}', which moves its states out of a GPU's memory, and the run is "
        f"on {device}; take 'adamw'"
    )
