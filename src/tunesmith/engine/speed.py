"""What will run faster than the stock way in a training step, and what will not and why."""

from __future__ import annotations

from typing import Any

from tunesmith.engine.device import Device
from tunesmith.plugin.optimizers import AUTO, OPTIMIZERS, optimizer_called
from tunesmith.plugin.trainers import FastTrainerConfig, TrainerConfig

__all__ = ["fuses_layers", "speed_of_step"]


def speed_of_step(
    config: TrainerConfig, model: Any, device: Device, *, adapter: bool
) -> tuple[str, ...]:
    """Return a line for each piece that the step's trainer has: loss, attention, layers between
    products, decoder layers, optimizer, and what is compiled.

    `model` is the model or its skeleton on the meta device; `adapter` is false where all of it is
    trained. What can only be found out by trying is said to be so. A trainer has the pieces whose
    options its config class offers; of any other only the optimizer is known.
    """
    if not isinstance(config, FastTrainerConfig):
        return (_optimizer(config, device, adapter),)
    lines = (
        _loss(config, model, device, adapter),
        _attention(config, model, device),
        _layers(config, model, device, adapter),
        _decoder_layers(config, model, device, adapter),
        _optimizer(config, device, adapter),
    )
    if not config.compile:
        return lines
    from tunesmith.nn import compiled

    return (*lines, compiled.described(compiled.repeated(model)))


def fuses_layers(config: TrainerConfig, device: Device, adapter: bool) -> bool:
    """Whether norms and gated blocks will run in one pass if the model has such."""
    from tunesmith.ops import native_status

    gains = native_status().why_slow_on(device.name) is None
    if not isinstance(config, FastTrainerConfig):
        return False
    return config.why_not("fused_layers") is None and adapter and gains


def _loss(config: FastTrainerConfig, model: Any, device: Device, adapter: bool) -> str:
    if not config.chunked_loss:
        return "loss: from the logits of all tokens at once (chunked_loss is off)"
    if not adapter and device.precision != "fp32":
        return "loss: from the logits of all tokens at once (mixed precision wraps the whole model)"
    if _routers_add_to_the_loss(model):
        return "loss: from the logits of all tokens at once (its own loss has further terms)"
    return "loss: from hidden states, without holding the logits, if the head can be taken off"


def _routers_add_to_the_loss(model: Any) -> bool:
    """Whether a mixture of experts is configured to add what its routers cost."""
    config = model.config.get_text_config()
    share = getattr(config, "router_aux_loss_coef", getattr(config, "aux_loss_coef", 1.0))
    return bool(getattr(config, "output_router_logits", False)) and bool(share)


def _attention(config: FastTrainerConfig, model: Any, device: Device) -> str:
    from tunesmith.nn import varlen_attention

    return varlen_attention.described(_stock_attention(config, model, device))


def _stock_attention(config: FastTrainerConfig, model: Any, device: Device) -> str | None:
    from tunesmith.nn import varlen_attention

    return config.why_not("varlen_attention") or varlen_attention.why_not(model, device.name)


def _layers(config: FastTrainerConfig, model: Any, device: Device, adapter: bool) -> str:
    from tunesmith.nn import fused_layers

    why = config.why_not("fused_layers")
    found = why or fused_layers.find(model, device.name, trained=not adapter)
    return fused_layers.described(found)


def _decoder_layers(config: FastTrainerConfig, model: Any, device: Device, adapter: bool) -> str:
    from tunesmith.nn import fused_decoder

    why = config.why_not("fused_layers") or _stock_attention(config, model, device)
    if why is None and not adapter:
        why = "their norms are trained"
    found = why or fused_decoder.find(model, device.name)
    if isinstance(found, str):
        return fused_decoder.described(found)
    return (
        f"decoder layers: up to {found} in one pass each, those with 4-bit projections and "
        "adapters without dropout that prove to be what they look like"
    )


def _optimizer(config: TrainerConfig, device: Device, adapter: bool) -> str:
    taken = optimizer_called(config.optimizer)
    notes = []
    if config.optimizer == AUTO and adapter:
        notes.append("auto: what is trained is small beside the model, and so are its states")
    elif config.optimizer == AUTO:
        notes.append(
            f"auto: {taken.state_bytes:.0f} bytes of states for each weight; adamw_8bit would "
            f"round them to {OPTIMIZERS['adamw_8bit'].state_bytes:.0f}"
        )
    if taken.argument.startswith("paged") and device.name == "cpu":
        notes.append("on the CPU nothing is paged")
    return f"optimizer: {taken.text}" + (f" ({'; '.join(notes)})" if notes else "")
