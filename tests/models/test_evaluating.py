"""A model in evaluation mode for a while."""

from __future__ import annotations

import pytest
from torch import nn

from gflowgr.models.evaluating import evaluating


def _fail(model: nn.Module) -> None:
    assert not any(module.training for module in model.modules())
    raise ArithmeticError("on the way")


def test_every_module_gets_its_own_mode_back_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()  # kept out of training by its owner
    with pytest.raises(ArithmeticError), evaluating(model):
        _fail(model)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
