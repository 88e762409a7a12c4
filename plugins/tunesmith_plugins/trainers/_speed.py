"""What makes a training step faster, each piece where the model at hand lets it be used."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import transformers

    from tunesmith.nn.head_logps import Headless
    from tunesmith.nn.own_loss import OwnLoss
    from tunesmith.plugin.session import Session
    from tunesmith.plugin.trainers import FastTrainerConfig

__all__ = ["loss_of_model", "prepare", "trainer_class"]


def trainer_class() -> Any:
    """Return `transformers.Trainer`, but that it does some of what it does each step faster.

    It is a function so that listing trainers imports no torch.
    """
    import transformers

    from tunesmith.nn.clipping import clipped_by_kernels
    from tunesmith.nn.walks import remembered

    class FastTrainer(transformers.Trainer):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._operations_of_token: float | None = None

        def train(self, *args: Any, **kwargs: Any) -> Any:
            with (
                remembered(self.model),
                clipped_by_kernels(self.accelerator),
                self.in_training_mode(),
            ):
                return super().train(*args, **kwargs)

        def in_training_mode(self) -> AbstractContextManager[None]:
            """Return what holds while it trains; nothing more than usual, here."""
            return nullcontext()

        def floating_point_ops(self, inputs: dict[str, Any]) -> float:
            tokens = inputs["input_ids"].numel() if "input_ids" in inputs else 0
            if tokens == 0:
                return float(super().floating_point_ops(inputs))
            if self._operations_of_token is None:  # it counts all parameters
                self._operations_of_token = super().floating_point_ops(inputs) / tokens
            return self._operations_of_token * tokens

    return FastTrainer


def loss_of_model(
    session: Session, config: FastTrainerConfig, arguments: transformers.TrainingArguments
) -> tuple[Headless | None, OwnLoss]:
    """Return the model in two parts, or None where the loss is not taken so, and its own loss.

    Which it is, and why, is logged. Raises ModelError for a model whose tokens see later ones.
    """
    from tunesmith.nn.causality import check_causal
    from tunesmith.nn.head_logps import split_head
    from tunesmith.nn.own_loss import own_loss

    log = logging.getLogger("tunesmith")
    check_causal(session.model)
    own = own_loss(session.model)
    if not config.chunked_loss:
        found: Headless | str = "chunked_loss is off"
    elif arguments.bf16 or arguments.fp16:
        found = "in mixed precision the model is wrapped as a whole"
    elif arguments.world_size > 1:
        found = "with several processes the model is wrapped as a whole"
    else:
        found = split_head(session.model, own)
    if isinstance(found, str):
        log.info("loss: from the logits of all tokens at once (%s)", found)
        headless = None
    else:
        log.info("loss: from hidden states, without holding the logits")
        headless = found
    if own.text and own.text != found:
        log.info("loss: %s", own.text)
    return headless, own


def prepare(session: Session, config: FastTrainerConfig) -> None:
    """Let the model's attention, its norms and blocks and whole layers run faster; log which do."""
    from tunesmith.nn import compiled, fused_decoder, fused_layers, varlen_attention

    log = logging.getLogger("tunesmith")
    stock = config.why_not("varlen_attention") or varlen_attention.use(session.model)
    log.info("%s", varlen_attention.described(stock))

    why = config.why_not("fused_layers")
    log.info("%s", fused_layers.described(why or fused_layers.use(session.model)))
    log.info("%s", fused_decoder.described(why or stock or fused_decoder.use(session.model)))

    if config.compile:
        compiled.compile_layers(session.model)
        log.info("%s", compiled.described(compiled.repeated(session.model)))
