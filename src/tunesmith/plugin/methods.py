"""Interface of a PEFT method: which few weights are trained, and how they are kept and merged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from tunesmith.plugin.conditions import Resolved

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from tunesmith.nn.merging import Merging
    from tunesmith.plugin.quantizers import Quantizer

__all__ = ["Method", "PeftMethod"]

C = TypeVar("C")


class Method(Resolved, ABC, Generic[C]):
    """Makes a base model one of which only little is trained, and keeps that.

    It never asks how the base is quantized: a base layer is an `nn.Linear` to it. What it is like
    is said once, by its flags; plan, packing, decoding, merging and memory estimate obey them. For
    one that PEFT has, or that is registered with PEFT, see `PeftMethod`.
    """

    mergeable: ClassVar[bool] = True
    """Whether what it trains can be added into the base's weights."""
    mixable: ClassVar[bool] = False
    """Whether several adapters of it can be added up to one: see `mix`."""
    adds_tokens: ClassVar[bool] = False
    """Whether it puts tokens, or keys and values, of its own before those of a row: rows that are
    packed into one would all but the first be without them."""
    trains_base: ClassVar[bool] = False
    """Whether it trains weights of the base itself, which are in fp32 for that."""
    saves_model: ClassVar[bool] = False
    """Whether a training keeps the whole model, and no adapter: `save` and `load` are not asked."""

    def __init__(self, config: C) -> None:
        self.config = config

    def check(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Return what would go wrong on wrapping this model, a line each; asked by a plan.

        `model` is on the meta device and unquantized.
        """
        return ()

    def describe(self, model: PreTrainedModel) -> str:
        """Return in a line what of a model is adapted and what is not; "" says nothing.

        `model` is as for `check`, which has found nothing wrong with it.
        """
        return ""

    @abstractmethod
    def wrap(self, model: PreTrainedModel) -> Any:
        """Return the model with a fresh adapter; what is trained requires gradients, alone.

        A plan wraps a skeleton on the meta device, to count what is trained.
        """

    def unwrap(self, model: Any) -> None:
        """Undo `wrap` on a skeleton, whose weights may be anything then."""
        if hasattr(model, "unload"):
            model.unload()

    @abstractmethod
    def load(self, model: PreTrainedModel, directory: Path, *, trainable: bool) -> Any:
        """Return the model with what `save` wrote into `directory`, all of it.

        With `trainable` the same weights require gradients as of a fresh one, else none does.
        Errors: `ModelError` naming what is missing, unknown or of another shape.
        """

    @abstractmethod
    def save(self, model: Any, directory: Path) -> None:
        """Write what was trained, all of it, into a directory that need not exist.

        Errors: `ModelError` naming what was trained and would not be kept.
        """

    def merge(self, model: Any, quantizer: Quantizer[Any]) -> Merging:
        """Return the dense weights of a model with all that was trained added in.

        Asked of a method that is `mergeable`. Errors: `ModelError` for a tensor of the adapter that
        would be left out.
        """
        from tunesmith.nn.merging import merging

        return merging(model, quantizer)

    def mix(
        self, adapters: Sequence[tuple[Path, float]], directory: Path, *, rank: int | None
    ) -> None:
        """Write an adapter whose update is the sum of those in other directories, times a weight.

        Asked of a method that is `mixable`. `rank` is the largest that the sum may have; None is
        all that it takes. Errors: `ModelError` for what no sum holds.
        """
        raise NotImplementedError


class PeftMethod(Method[C]):
    """A method that PEFT has, or one registered by `peft.utils.register_peft_method`.

    It says by `peft_config` what it is in PEFT's terms; wrapping, saving, loading and merging
    follow from that, and what it saves opens in stock PEFT.
    """

    @abstractmethod
    def peft_config(self, model: PreTrainedModel) -> PeftConfig:
        """Return PEFT's config for this model, which may be on the meta device."""

    def registered(self, config: PeftConfig) -> PeftConfig:
        """Return a config, made just now or read from a file, with layers of one's own put in.

        Unless overridden a LoRA gets the house's, over which base product and adapter are one pass,
        and which know experts in 4 bits; to PEFT, and in its files, it stays a LoRA.
        """
        from peft import LoraConfig

        if isinstance(config, LoraConfig):
            from tunesmith.nn.lora_linear import register

            return register(config)
        return config

    def check(self, model: PreTrainedModel) -> tuple[str, ...]:
        """Try to wrap the model, and hand on what is said of it."""
        from tunesmith.errors import TunesmithError

        try:
            wrapped = self.wrap(model)
            unmatched = _unmatched(wrapped)
            self.unwrap(wrapped)
        except TunesmithError as error:
            return tuple(str(error).splitlines())
        except Exception as error:
            return (f"PEFT refuses this model: {type(error).__name__}: {error}",)
        return tuple(f"targets: '{name}' matches no layer of this model" for name in unmatched)

    def wrap(self, model: PreTrainedModel) -> PeftModel:
        """Return the model with a fresh adapter; every other parameter is frozen."""
        from peft import get_peft_model

        from tunesmith.nn.tasks import task_of

        config = self.registered(self.peft_config(model))
        config.task_type = task_of(model).peft_type
        wrapped: PeftModel = get_peft_model(model, config)
        return wrapped

    def unwrap(self, model: Any) -> None:
        """Take PEFT's layers out again, where it has put some in."""
        if hasattr(model.base_model, "unload"):
            model.unload()
        else:  # it wraps the model whole, and freezes it
            model.get_base_model().requires_grad_(True)

    def load(self, model: PreTrainedModel, directory: Path, *, trainable: bool) -> PeftModel:
        """Return the model with the adapter saved in `directory`, every tensor of it counted."""
        from peft import PeftConfig

        from tunesmith.nn.adapters import check_loaded, open_adapter

        config = PeftConfig.from_pretrained(directory, local_files_only=True)
        wrapped = open_adapter(model, directory, self.registered(config), trainable=trainable)
        check_loaded(wrapped, directory)
        return wrapped

    def mix(
        self, adapters: Sequence[tuple[Path, float]], directory: Path, *, rank: int | None
    ) -> None:
        """Write the LoRA that is the sum of others; for a method whose adapters are LoRAs."""
        from tunesmith.nn.mixing import mix_loras

        mix_loras(adapters, directory, rank=rank)

    def save(self, model: Any, directory: Path) -> None:
        """Write the adapter in PEFT's own format, open it again and compare."""
        from tunesmith.nn.adapters import check_saved

        # PEFT adds a whole embedding where one is adapted, which is the base's and would replace it
        kept = [model.active_adapter]  # others may have been put beside it to be compared with
        model.save_pretrained(directory, save_embedding_layers=False, selected_adapters=kept)
        check_saved(model, directory)


def _unmatched(model: Any) -> list[str]:
    """Return the names among a method's targets that PEFT has silently found nothing for."""
    found = [
        *getattr(model.base_model, "targeted_module_names", ()),
        *getattr(model.base_model, "targeted_parameter_names", ()),
    ]
    wanted: set[str] = set()
    for config in model.peft_config.values():
        for names in ("target_modules", "target_parameters"):
            given = getattr(config, names, None)
            wanted.update(given if isinstance(given, (list, set, tuple)) else ())
    return sorted(
        name
        for name in wanted
        if not any(each == name or each.endswith(f".{name}") for each in found)
    )
