"""Disk space that a run will take, known before it begins: what it makes, and its checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.engine.durable import MARGIN, require_room
from tunesmith.engine.plan import PlannedStep
from tunesmith.plugin.optimizers import optimizer_called
from tunesmith.units import byte_size

__all__ = ["paced_by_room", "require_room_for_run"]

ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


def require_room_for_run(
    directory: Path, steps: Sequence[PlannedStep], base: Path, precision: str
) -> None:
    """Refuse a run whose full models do not fit where it is kept: trained ones and merged ones.

    `steps` are those that are not finished, the method's among them. What an adapter takes is known
    when it is on the model: see `paced_by_room`.
    """
    parameters = _parameters(base)
    adapts = False
    kept = peak = 0
    for step in steps:
        if step.verb.kind == "methods":
            adapts = not step.flag("saves_model")
        elif step.verb.kind == "exporters" and step.flag("merges"):
            dtype = getattr(step.config, "dtype", "auto")
            kept += parameters * ITEMSIZE.get(dtype, ITEMSIZE[precision])
        elif step.verb.kind == "trainers" and not adapts:
            whole = parameters * ITEMSIZE["fp32"]
            each = whole + _states(step.config, parameters)
            asked = _held(step.config) * each if _asks(step.config) else 0
            # the last checkpoint stays until the model is written whole
            peak = max(peak, kept + 2 * whole + asked)
            kept += whole
        if step.flag("makes_model"):
            adapts = False
        peak = max(peak, kept)
    if peak:
        require_room(directory, peak, "what the run makes")


def paced_by_room(directory: Path, model: Any, config: Any) -> str | None:
    """Refuse a training whose weights do not fit; say why there is no room for more checkpoints.

    Returns None where there is room for those that are taken by time, too.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    count = sum(weight.numel() for weight in trained)
    weights = sum(weight.numel() * weight.element_size() for weight in trained)
    kept = _held(config)
    checkpoints = kept * (weights + _states(config, count))
    need = 2 * weights + (checkpoints if _asks(config) else 0)
    require_room(directory, need, "what the training keeps")
    free = shutil.disk_usage(directory).free
    if free >= 2 * weights + checkpoints + MARGIN:
        return None
    return (
        f"no checkpoint is taken before the end: {kept} need {byte_size(checkpoints)} beside what "
        f"is kept, and {byte_size(free)} are free in {directory}"
    )


def _held(config: Any) -> int:
    """Return how many checkpoints there are at a time: one goes when the next is complete."""
    return max(2, int(config.checkpoints_kept))


def _asks(config: Any) -> bool:
    """Return whether the options ask for checkpoints, as early stopping does for the best one."""
    return config.saving != "no" or config.early_stopping is not None


def _states(config: Any, parameters: int) -> int:
    return math.ceil(optimizer_called(config.optimizer).state_bytes * parameters)


def _parameters(base: Path) -> int:
    """Return how many numbers the files of a model directory hold; 0 where that is not told."""
    from safetensors import SafetensorError, safe_open

    count = 0
    for file in base.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # no mapping
                    count += math.prod(tensors.get_slice(name).get_shape())
        except (OSError, SafetensorError):
            return 0  # loading says better what is wrong with it
    return count
