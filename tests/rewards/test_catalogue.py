"""Rewards of the whole catalogue, against the formula in float64, and the softmax's temperature."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gflowgr.rewards import CatalogueReward
from gflowgr.rewards.temperature import (
    mean_entropy,
    mean_nll,
    temperature_of_entropy,
    temperature_of_nll,
)

SCORES = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) * 3
HISTORIES = torch.tensor([[1, 2, 3], [4, -1, -1], [-1, -1, -1], [-1, 7, 39], [0, 0, 5]])
TARGETS = torch.tensor([9, 10, -1, 7, 12])
VALUES = torch.tensor([1.0, 0.5, 1.0, 0.3, 0.0])


class Even:
    """Items of even ids count three times as much, items from 30 on not at all."""

    def log_reward(self, scores: Tensor, histories: Tensor) -> Tensor:
        ids = torch.arange(scores.shape[1])
        factor = torch.where(ids % 2 == 0, math.log(3.0), 0.0).masked_fill(ids >= 30, -math.inf)
        return factor.expand_as(scores)


class Short(Even):
    def log_reward(self, scores: Tensor, histories: Tensor) -> Tensor:
        return super().log_reward(scores, histories)[:, :3]


EVEN = f"{__name__}:Even"


def reference(signals: list[str], alpha: float, temperature: float, seen: str) -> Tensor:
    """R, item by item, in float64."""
    rewards = torch.zeros(SCORES.shape, dtype=torch.float64)
    for row, (scores, past) in enumerate(zip(SCORES.tolist(), HISTORIES.tolist(), strict=True)):
        for item, score in enumerate(scores):
            value = math.exp(score / temperature) if "r_cm" in signals else 1.0
            if EVEN in signals:
                value *= 0.0 if item >= 30 else 3.0 if item % 2 == 0 else 1.0
            if seen == "zero" and item in past:
                value = 0.0
            rewards[row, item] = value
        rewards[row] *= (1 - alpha) / rewards[row].sum()
        if TARGETS[row] >= 0:
            rewards[row, TARGETS[row]] += alpha * VALUES[row]
    return rewards


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 1.3])
@pytest.mark.parametrize("seen", ["zero", "keep"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("signals", [["r_cm"], ["r_cm", EVEN], [EVEN]])
def test_the_reward_is_its_formula(
    signals: list[str], alpha: float, seen: Any, temperature: float, overwrite: bool
) -> None:
    made = CatalogueReward(signals, alpha, temperature, seen)
    scores = SCORES.clone()
    found = made(scores, HISTORIES, TARGETS, VALUES, overwrite=overwrite)
    assert found.dtype == torch.float32
    expected = reference(signals, alpha, temperature, seen)
    torch.testing.assert_close(found.double(), expected.log(), rtol=1e-5, atol=1e-5)
    assert overwrite or torch.equal(scores, SCORES)


def test_an_unnormalised_reward_differs_by_a_constant_of_each_prompt() -> None:
    made = CatalogueReward(["r_cm", EVEN], temperature=1.3)
    found = made(SCORES, HISTORIES, normalized=False)
    torch.testing.assert_close(found.log_softmax(1), made(SCORES, HISTORIES))
    assert not torch.allclose(found.logsumexp(1), torch.zeros(len(found)))
    # What is added to p needs its normalisation.
    mixed = CatalogueReward(alpha=0.3)
    given = (SCORES, HISTORIES, TARGETS, VALUES)
    assert torch.equal(mixed(*given, normalized=False), mixed(*given))


def test_a_pool_of_every_item_has_the_catalogues_rewards_in_its_own_order() -> None:
    made = CatalogueReward(alpha=0.2, temperature=0.7)
    order = torch.rand(5, 40, generator=torch.Generator().manual_seed(2)).argsort(1)
    pool = torch.nn.functional.pad(order, (0, 2), value=-1)
    scores = torch.nn.functional.pad(SCORES.gather(1, order), (0, 2), value=99.0)
    found = made(scores, HISTORIES, TARGETS, VALUES, items=pool)
    expected = made(SCORES, HISTORIES, TARGETS, VALUES).gather(1, order)
    torch.testing.assert_close(found[:, :40], expected)
    assert (found[:, 40:] == -math.inf).all()
    with pytest.raises(ValueError, match="must hold the observed item"):
        made(scores[:, :1], HISTORIES, TARGETS, VALUES, items=torch.full((5, 1), 20))


def test_values_of_behaviours_are_relative_to_the_highest() -> None:
    made = CatalogueReward(
        behaviour_values={"click": 1.0, "buy": 4.0}, behaviour_names=("click", "buy")
    )
    assert made.target_values(torch.tensor([0, 1, -1])).tolist() == [0.25, 1.0, 1.0]
    assert CatalogueReward().target_values(torch.tensor([-1])).tolist() == [1.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.0}, "alpha must be in"),
        ({"temperature": 0.0}, "temperature must be finite and > 0"),
        ({"seen": "drop"}, "seen must be one of"),
        ({"signals": []}, "signals must be a list of different names"),
        ({"signals": ["r_sim"]}, "signals must be 'r_cm' or 'module:Class'"),
        ({"signals": ["math:pi"]}, "cannot make 'math:pi'"),
    ],
)
def test_bad_settings_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CatalogueReward(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": SCORES[0]}, r"scores must be a floating-point tensor"),
        ({"scores": SCORES.index_fill(1, torch.tensor([3]), math.nan)}, "scores must be finite"),
        ({"scores": SCORES.index_fill(1, torch.tensor([3]), math.inf)}, "scores must be finite"),
        ({"scores": torch.full((5, 40), -math.inf)}, "an item of positive reward"),
        ({"histories": HISTORIES[:3]}, r"histories must be of shape \(5, 3\)"),
        ({"histories": HISTORIES + 1000}, "histories must be item ids .* below 40; got 1039"),
        ({"targets": TARGETS - 5}, "targets must be item ids .*; got -6"),
        ({"target_values": VALUES * 2}, r"target_values must be in \[0, 1\]"),
    ],
)
def test_bad_inputs_are_named(changes: dict[str, Any], message: str) -> None:
    inputs = {"scores": SCORES, "histories": HISTORIES, "targets": TARGETS, "target_values": VALUES}
    with pytest.raises(ValueError, match=message):
        CatalogueReward(seen="keep", alpha=0.1)(**{**inputs, **changes})


def test_a_signal_of_a_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"Short' must be \[B, items\] = \(5, 40\)"):
        CatalogueReward([f"{__name__}:Short"])(SCORES, HISTORIES)


# ---- temperature ----


def test_the_temperature_that_made_the_targets_is_found() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(4000, 50, generator=generator) * 4
    targets = torch.multinomial((scores / 1.7).softmax(1), 1, generator=generator)[:, 0]
    found = temperature_of_nll(scores, targets)
    assert found == pytest.approx(1.7, rel=0.04)
    grid = [mean_nll(scores, targets, value) for value in torch.linspace(0.3, 3.0, 28).tolist()]
    assert mean_nll(scores, targets, found) <= min(grid)


def test_the_temperature_of_an_entropy_is_found() -> None:
    entropy = mean_entropy(SCORES, 1.3)
    log_p = (SCORES.double() / 1.3).log_softmax(1)
    assert entropy == pytest.approx(float(-(log_p.exp() * log_p).sum(1).mean()), abs=1e-5)
    assert temperature_of_entropy(SCORES, entropy) == pytest.approx(1.3, rel=2e-3)
    with pytest.raises(ValueError, match=r"entropy must be between .* nats .*; got 9.0"):
        temperature_of_entropy(SCORES, 9.0)


def test_items_at_zero_have_no_entropy_and_may_not_be_targets() -> None:
    scores = SCORES.index_fill(1, torch.arange(38), -math.inf)
    assert mean_entropy(scores, 1e3) == pytest.approx(math.log(2), abs=1e-3)
    with pytest.raises(ValueError, match="targets must be items with finite scores"):
        temperature_of_nll(scores, torch.zeros(5, dtype=torch.int64))
