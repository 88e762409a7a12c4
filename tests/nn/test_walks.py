"""A model's walks through its modules, remembered, do what they did."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tunesmith.nn.walks import remembered


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) * self.scale
        return out


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    model.append(model[0])  # one module in two places
    return model


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_train_and_eval_reach_every_module(model: nn.Module) -> None:
    with remembered(model):
        assert model.eval() is model
        assert not any(modes(model))
        model[1].inner[1].train()
        assert model.train() is model
        assert all(modes(model))
        model.train(False)
        assert not any(modes(model))
        with pytest.raises(ValueError, match="boolean"):
            model.train("yes")  # type: ignore[arg-type]


def test_parameters_are_those_of_the_model_in_its_order(model: nn.Module) -> None:
    own, root = list(model.parameters()), list(model.parameters(recurse=False))
    with remembered(model):
        assert [id(p) for p in model.parameters()] == [id(p) for p in own]
        assert list(model.parameters(recurse=False)) == root
        model(torch.randn(4, 3)).sum().backward()
        assert all(p.grad is not None for p in own)
        model.zero_grad()
        assert all(p.grad is None for p in own)


def test_what_is_added_or_replaced_meanwhile_is_found(model: nn.Module) -> None:
    with remembered(model):
        model.train()
        list(model.parameters())
        model[1].added = nn.Linear(2, 2)
        model[1].scale = nn.Parameter(torch.zeros(3))
        model.eval()
        assert not model[1].added.training
        found = {id(p) for p in model.parameters()}
        assert {id(model[1].added.weight), id(model[1].scale)} <= found
        assert len(found) == len(list(nn.Module.parameters(model)))


def test_what_is_set_in_another_model_costs_no_walk(model: nn.Module) -> None:
    walked = 0

    class Counting(nn.Sequential):
        def named_modules(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal walked
            walked += 1
            return super().named_modules(*args, **kwargs)

    outer = Counting(model)
    with remembered(outer):
        list(outer.parameters())
        before = walked
        nn.ModuleList([*model]).extend([nn.Linear(2, 2)])
        list(outer.parameters())
        assert walked == before
        model[1].added = nn.Linear(2, 2)
        list(outer.parameters())
        assert walked > before


def test_the_model_is_as_it_was_afterwards(model: nn.Module) -> None:
    before = set(vars(model))
    with pytest.raises(RuntimeError, match="killed"), remembered(model):
        raise RuntimeError("killed")
    assert set(vars(model)) == before
    model[0].added = nn.Linear(2, 2)  # no hook is left that could fail
    assert not nn.Module.eval(model).training


def test_a_module_with_a_train_of_its_own_keeps_it(model: nn.Module) -> None:
    class Frozen(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> Frozen:
            super().train(False)
            return self

    model.append(Frozen(3))
    with remembered(model):
        for _ in range(2):
            model.train()
            assert not model[-1].training
            assert model.training
            model[-1].training = True


def test_a_second_train_in_a_row_walks_nowhere(model: nn.Module) -> None:
    class Counting(nn.Linear):
        calls = 0

        def train(self, mode: bool = True) -> Counting:
            Counting.calls += 1
            super().train(mode)
            return self

    model.append(Counting(3, 3))
    with remembered(model):
        for _ in range(5):
            model.train()
        assert Counting.calls == 1
        model.eval()
        model.train()
        assert Counting.calls == 3


def test_a_step_gives_what_it_gave(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    x = torch.randn(8, 3)

    def trained(of: nn.Module) -> list[Tensor]:
        optimizer = torch.optim.SGD(of.parameters(), lr=0.1)
        for seed in range(3):
            torch.manual_seed(seed)
            of.train()
            of(x).square().mean().backward()
            nn.utils.clip_grad_norm_(of.parameters(), 0.3)
            optimizer.step()
            of.zero_grad()
            of.eval()
        return [p.detach() for p in of.parameters()]

    stock = trained(twin)
    with remembered(model):
        ours = trained(model)
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))
