"""A model that was asked something is as it was, module by module."""

from __future__ import annotations

import pytest
from torch import nn

from tunesmith.modes import in_mode


def mixed() -> nn.Sequential:
    """A model in training whose second part somebody has put into eval mode."""
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    model[1].eval()
    return model


@pytest.mark.parametrize("training", [True, False])
def test_every_module_is_in_the_mode_and_then_back_in_its_own(training: bool) -> None:
    model = mixed()
    before = [module.training for module in model.modules()]
    with in_mode(model, training=training):
        assert all(module.training is training for module in model.modules())
    assert [module.training for module in model.modules()] == before
    assert len(set(before)) == 2


def test_an_error_within_leaves_the_modes_as_they_were() -> None:
    model = mixed()
    with pytest.raises(KeyError), in_mode(model, training=False):
        raise KeyError
    assert model.training
    assert not model[1].training


def test_a_module_made_within_gets_the_mode_of_the_model() -> None:
    model = mixed()
    with in_mode(model, training=False):
        model.append(nn.Dropout().eval())
    assert model[-1].training
