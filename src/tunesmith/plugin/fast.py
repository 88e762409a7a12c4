"""What makes a training step faster, for any trainer: each piece where the model lets it be used.

A trainer takes `FastTrainerConfig` for its options and `FastTrainer` for its base, calls `prepare`
before it builds, and puts `fast(...)` over a `transformers.Trainer`, TRL's or its own. Where its
loss is one of log-probabilities, `loss_of_model` says whether they can be had without logits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from tunesmith.plugin.conditions import Conditions, Piece
from tunesmith.plugin.optimizers import described_optimizer
from tunesmith.plugin.trainers import Trainer, TrainerConfig

if TYPE_CHECKING:
    import transformers

    from tunesmith.nn.head_logps import Headless
    from tunesmith.nn.own_loss import OwnLoss

__all__ = [
    "FastTrainer",
    "FastTrainerConfig",
    "fast",
    "fuses_layers",
    "loss_of_model",
    "prepare",
    "why_all_logits",
]


@attrs.frozen(kw_only=True)
class FastTrainerConfig(TrainerConfig):
    """Options of a trainer that has the pieces which make a training step faster.

    What a trainer does not have, its config class does not offer: the option is then refused, and
    `explain()` claims nothing of the kind.
    """

    chunked_loss: bool = True
    """Compute the loss some tokens at a time, so that the logits of all are never held; where the
    model cannot be taken apart for that, and if false, all are. The loss is the same."""
    varlen_attention: bool = True
    """Attend to each sample of a batch on its own, not to a whole row under a mask: on the CPU, and
    where the model takes its attention from transformers' registry. The numbers are the same."""
    fused_layers: bool = True
    """Run norms, gated feed-forward blocks and rotary embeddings in one pass each where the model's
    own do the same, and on the CPU whole decoder layers. Less time and memory; the numbers are the
    same."""
    compile: bool = False
    """Compile the model's layers with torch.compile, which takes a minute or more at first;
    attention and what stands between the linear layers are then torch's to fuse."""

    def why_not(self, piece: str) -> str | None:
        """Return why the options leave a piece out that the option of that name switches."""
        if self.compile:
            return "compile is on"
        if not getattr(self, piece):
            return f"{piece} is off"
        return None


C = TypeVar("C", bound=FastTrainerConfig)


class FastTrainer(Trainer[C]):
    """A trainer that has the pieces whose options its config offers, and says which will be used.

    Its `build` calls `prepare`, and takes its loss as `loss_of_model` says.
    """

    def explain(self, conditions: Conditions) -> tuple[Piece, ...]:
        """Return each piece: loss, attention, layers, decoder layers, optimizer, compiler.

        What can only be found out by trying is said to be so.
        """
        config = self.config
        pieces = (
            _loss(config, conditions),
            _attention(config, conditions),
            _layers(config, conditions),
            _decoder_layers(config, conditions),
            described_optimizer(config.optimizer, conditions),
        )
        if not config.compile:
            return pieces
        from tunesmith.nn import compiled

        return (*pieces, Piece(compiled.described(compiled.repeated(conditions.model))))

    def effective(self, conditions: Conditions) -> Mapping[str, Any]:
        """Return the options as they will act: those for pieces that are known to be left out."""
        config = self.config
        off = {
            piece: False
            for piece in ("varlen_attention", "fused_layers")
            if config.why_not(piece) is not None
        }
        if why_all_logits(config, conditions) is not None:
            off["chunked_loss"] = False
        return {**super().effective(conditions), **off}


def fast(cls: Any = None) -> Any:
    """Return a subclass of a `transformers.Trainer` that does some of each step's work faster.

    `cls` is a class of one's own or a library's; unset, transformers' own. What it computes is the
    same. A function, so that listing trainers imports no torch.
    """
    import transformers

    from tunesmith.nn.clipping import clipped_by_kernels
    from tunesmith.nn.walks import remembered

    base: Any = transformers.Trainer if cls is None else cls

    class Faster(base):  # type: ignore[misc]
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

    Faster.__name__ = Faster.__qualname__ = f"Fast{base.__name__}"
    return Faster


def loss_of_model(
    model: Any, config: FastTrainerConfig, arguments: transformers.TrainingArguments
) -> tuple[Headless | None, OwnLoss]:
    """Return the model in two parts, or None where the loss is not taken so, and its own loss.

    Which it is, and why, is logged. Raises ModelError for a model whose tokens see later ones.
    """
    from tunesmith.nn.causality import check_causal
    from tunesmith.nn.head_logps import split_head
    from tunesmith.nn.own_loss import own_loss

    log = logging.getLogger("tunesmith")
    check_causal(model)
    own = own_loss(model)
    if not config.chunked_loss:
        found: Headless | str = "chunked_loss is off"
    elif arguments.bf16 or arguments.fp16:
        found = "in mixed precision the model is wrapped as a whole"
    elif arguments.world_size > 1:
        found = "with several processes the model is wrapped as a whole"
    else:
        found = split_head(model, own)
    if isinstance(found, str):
        log.info("loss: from the logits of all tokens at once (%s)", found)
        headless = None
    else:
        log.info("loss: %s", _HIDDEN)
        headless = found
    if own.text and own.text != found:
        log.info("loss: %s", own.text)
    return headless, own


def prepare(model: Any, config: FastTrainerConfig) -> None:
    """Let a model's attention, its norms and blocks and whole layers run faster; log which do."""
    from tunesmith.nn import compiled, fused_decoder, fused_layers, varlen_attention

    log = logging.getLogger("tunesmith")
    stock = config.why_not("varlen_attention") or varlen_attention.use(model)
    log.info("%s", varlen_attention.described(stock))

    why = config.why_not("fused_layers")
    log.info("%s", fused_layers.described(why or fused_layers.use(model)))
    log.info("%s", fused_decoder.described(why or stock or fused_decoder.use(model)))

    if config.compile:
        compiled.compile_layers(model)
        log.info("%s", compiled.described(compiled.repeated(model)))


def fuses_layers(config: TrainerConfig, device: str, *, adapter: bool) -> bool:
    """Whether norms and gated MLPs will run in one pass if the model has such."""
    from tunesmith.ops import native_status

    if not isinstance(config, FastTrainerConfig):
        return False
    gains = native_status().why_slow_on(device) is None
    return config.why_not("fused_layers") is None and adapter and gains


def why_all_logits(config: TrainerConfig, conditions: Conditions) -> str | None:
    """Return why the loss will be taken from the logits of all tokens at once, if that is known.

    Whether a head can be taken off is found out by trying, and here taken to be so.
    """
    if not isinstance(config, FastTrainerConfig):
        return "the trainer has no other way"
    if not config.chunked_loss:
        return "chunked_loss is off"
    if conditions.trains_base and conditions.precision != "fp32":
        return "mixed precision wraps the whole model"
    if conditions.processes > 1:
        return "with several processes the model is wrapped as a whole"
    if conditions.model is not None and _routers_add_to_the_loss(conditions.model):
        return "its own loss has further terms"
    return None


def _loss(config: FastTrainerConfig, conditions: Conditions) -> Piece:
    why = why_all_logits(config, conditions)
    if why is not None:
        text = f"loss: from the logits of all tokens at once ({why})"
        return Piece(text, fast=False, remedy=_remedy(config, "chunked_loss"))
    return Piece(f"loss: {_HIDDEN}, if the head can be taken off")


_HIDDEN = "from hidden states, without holding the logits"


def _remedy(config: FastTrainerConfig, piece: str) -> str:
    """Return what switches a piece on, where it is its own option that switches it off."""
    return "" if getattr(config, piece) else f"{piece}=True"


def _piece(config: FastTrainerConfig, option: str, text: str, why: str | None) -> Piece:
    """Return a piece that is left to the model's own code for a reason, or is not."""
    # what torch.compile does instead is no slower way
    slow = why is not None and not config.compile
    return Piece(text, fast=not slow, remedy=_remedy(config, option) if slow else "")


def _routers_add_to_the_loss(model: Any) -> bool:
    """Whether a mixture of experts is configured to add what its routers cost."""
    config = model.config.get_text_config()
    share = getattr(config, "router_aux_loss_coef", getattr(config, "aux_loss_coef", 1.0))
    return bool(getattr(config, "output_router_logits", False)) and bool(share)


def _attention(config: FastTrainerConfig, conditions: Conditions) -> Piece:
    from tunesmith.nn import varlen_attention

    why = _stock_attention(config, conditions)
    return _piece(config, "varlen_attention", varlen_attention.described(why), why)


def _stock_attention(config: FastTrainerConfig, conditions: Conditions) -> str | None:
    from tunesmith.nn import varlen_attention

    return config.why_not("varlen_attention") or varlen_attention.why_not(
        conditions.model, conditions.device
    )


def _layers(config: FastTrainerConfig, conditions: Conditions) -> Piece:
    from tunesmith.nn import fused_layers

    found = config.why_not("fused_layers") or fused_layers.find(
        conditions.model, conditions.device, trained=conditions.trains_base
    )
    why = found if isinstance(found, str) else None
    return _piece(config, "fused_layers", fused_layers.described(found), why)


def _decoder_layers(config: FastTrainerConfig, conditions: Conditions) -> Piece:
    from tunesmith.nn import fused_decoder

    why = config.why_not("fused_layers") or _stock_attention(config, conditions)
    if why is None and conditions.trains_base:
        why = "their norms are trained"
    found = why or fused_decoder.find(conditions.model, conditions.device)
    if isinstance(found, str):
        return _piece(config, "fused_layers", fused_decoder.described(found), found)
    return Piece(
        f"decoder layers: up to {found} in one pass each, those with 4-bit projections and "
        "adapters without dropout that prove to be what they look like"
    )
