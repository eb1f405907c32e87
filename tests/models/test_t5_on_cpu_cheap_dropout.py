"""Dropout in training on a CPU: what it draws, scales and passes back."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gflowgr.models.t5_on_cpu import cheap_dropout, use_cheap_dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_as_many_are_zero_as_asked_and_the_mean_stays(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    count = 400_000
    y = cheap_dropout(torch.ones(count, dtype=dtype), p)
    assert y.dtype == dtype
    share = (y == 0).double().mean().item()
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / count) ** 0.5 + 2**-16)
    kept = y[y != 0].double()
    assert kept.min() == kept.max() == pytest.approx(1 / (1 - p), rel=1e-2)
    deviation = (p / (1 - p) / count) ** 0.5
    rounding = 0.004 if dtype == torch.bfloat16 else 1e-4
    assert y.double().mean().item() == pytest.approx(1, abs=5 * deviation + rounding)


def test_neighbours_are_independent() -> None:
    """Four of them share one draw of 64 bits: their masks must not be alike."""
    torch.manual_seed(0)
    kept = (cheap_dropout(torch.ones(100_000, 4), 0.5) != 0).double()
    correlation = torch.corrcoef(kept.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / 100_000**0.5


@given(shape=st.lists(st.integers(0, 5), max_size=3), seed=st.integers(0, 2**31))
def test_backward_has_the_mask_of_forward(shape: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.rand(shape, dtype=torch.float64).add(1).requires_grad_()
    y = cheap_dropout(x, 0.3)
    assert y.shape == x.shape
    y.sum().backward()
    torch.testing.assert_close(x.grad, (y / x).detach())


def test_the_derivative_is_that_of_a_product() -> None:
    def once_more(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return cheap_dropout(x.T, 0.4).sin()

    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(once_more, x)
    assert torch.autograd.gradgradcheck(once_more, x)


def test_ends_of_the_range() -> None:
    x = torch.tensor([1.0, float("nan"), float("inf")])
    assert cheap_dropout(x, 0.0) is x
    assert cheap_dropout(torch.ones(3), 1.0).tolist() == [0, 0, 0]


def test_the_same_seed_gives_the_same_result() -> None:
    """A resumed training restores PyTorch's generator and must draw on."""
    x = torch.ones(1000)
    torch.manual_seed(5)
    first = [cheap_dropout(x, 0.5), cheap_dropout(x, 0.5)]
    torch.manual_seed(5)
    assert torch.equal(cheap_dropout(x, 0.5), first[0])
    assert torch.equal(cheap_dropout(x, 0.5), first[1])
    assert not torch.equal(*first)


def test_a_model_drops_in_training_only_and_keeps_its_state() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Dropout(0.5, inplace=True))
    names, text = list(model.state_dict()), repr(model)
    use_cheap_dropout(model)
    assert list(model.state_dict()) == names
    assert repr(model) == text.replace("Dropout(p=0.5, inplace=False)", repr(model[1]))
    assert type(model[2]) is nn.Dropout
    copied = copy.deepcopy(model)
    x = torch.ones(50, 8)
    assert (copied.train()[1](x) == 0).any()
    assert copied.eval()[1](x) is x
