"""Spares a training loop its walks through all modules of a model, several a step.

`transformers.Trainer` calls a model's train(), parameters() and zero_grad() at every step. In a
model of 2,500 modules (30 layers with adapters) that takes 18 ms, whatever the length of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules import module as registration

__all__ = ["remembered"]


@contextmanager
def remembered(model: nn.Module) -> Iterator[None]:
    """Let train(), eval(), parameters() and zero_grad() of a model look its modules up in a list.

    They do what they did. The list is made anew once a module or a parameter has been set anywhere
    in the process; a model with a module whose train() is its own is left as it is.
    """
    if any(type(module).train is not nn.Module.train for module in model.modules()) or (
        {"train", "parameters"} & vars(model).keys()
    ):
        yield
        return
    walks = _Walks(model)
    hooks = [
        register(walks.forget)
        for register in (
            registration.register_module_module_registration_hook,
            registration.register_module_parameter_registration_hook,
        )
    ]
    vars(model).update(train=walks.train, parameters=walks.parameters)
    try:
        yield
    finally:
        for name in ("train", "parameters"):
            del vars(model)[name]
        for hook in hooks:
            hook.remove()


class _Walks:
    """A model's modules and parameters, in the order of its own walks."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._stale = True
        self._modules: list[dict[str, Any]] = []
        self._parameters: list[nn.Parameter] = []
        self._train: Callable[..., nn.Module] = model.train
        self._stock: Callable[..., Iterator[nn.Parameter]] = model.parameters

    def forget(self, *_: Any) -> None:
        """Look at the model anew the next time: something is about to be set."""
        self._stale = True

    def train(self, mode: Any = True) -> nn.Module:
        """Do what nn.Module.train does."""
        self._refresh()
        if not isinstance(mode, bool):
            return self._train(mode)
        for attributes in self._modules:
            attributes["training"] = mode
        return self._model

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Do what nn.Module.parameters does."""
        self._refresh()
        return iter(self._parameters) if recurse else self._stock(recurse)

    def _refresh(self) -> None:
        if self._stale:
            self._modules = [vars(module) for module in self._model.modules()]
            self._parameters = list(self._stock())
            self._stale = False
