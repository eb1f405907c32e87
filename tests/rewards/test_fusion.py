"""Learned fusions: they start as the sum, stay positive, and do not collapse to a constant."""

from __future__ import annotations

import pytest
import torch

from gflowgr.rewards import RewardFusion

SIGNALS = torch.tensor([[[10.0, 2.0, 4.0], [0.0, 1.5, 1.0], [0.0, 0.1, 0.0], [1.0, 0.0, 2.0]]])


@pytest.mark.parametrize("mode", ["sum", "weighted", "mlp"])
def test_every_fusion_starts_as_the_sum(mode: str) -> None:
    torch.manual_seed(0)
    fusion = RewardFusion(3, mode)
    log_reward = fusion(SIGNALS)
    torch.testing.assert_close(log_reward, SIGNALS.sum(-1).log(), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(fusion.weights(), torch.ones(3))
    assert fusion.learned == (mode != "sum")
    assert bool(list(fusion.parameters())) == fusion.learned


@pytest.mark.parametrize("mode", ["weighted", "mlp"])
@pytest.mark.parametrize("seed", range(3))
def test_rewards_are_positive_for_any_parameters(mode: str, seed: int) -> None:
    torch.manual_seed(seed)
    fusion = RewardFusion(3, mode)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=5.0)
    extremes = torch.cat([SIGNALS, torch.zeros(1, 1, 3), torch.full((1, 1, 3), 1e6)], dim=1)
    assert torch.isfinite(fusion(extremes)).all()
    weights = fusion.weights()
    assert (weights >= 0).all()
    assert weights.mean().item() == pytest.approx(1.0)


def spread_after_training(mode: str, anchor: float) -> float:
    """Spread of log R after training a fusion jointly with a policy that prefers constants.

    The policy is one logit per item with a pull towards uniform, as a backbone that cannot follow
    the reward has; the loss is trajectory balance with the anchor, as in GFlowModel.
    """
    torch.manual_seed(1)
    rows = torch.rand(16, 6, 3) * torch.tensor([10.0, 2.0, 4.0])
    fusion = RewardFusion(3, mode)
    logits = torch.zeros(16, 6, requires_grad=True)
    log_z = torch.full((16, 1), 4.0, requires_grad=True)
    optimizer = torch.optim.Adam([*fusion.parameters(), logits, log_z], lr=0.05)
    for _ in range(400):
        log_reward = fusion(rows)
        residual = log_z + logits.log_softmax(-1) - log_reward
        loss = residual.square() + anchor * fusion.departure(rows, log_reward)
        optimizer.zero_grad()
        (loss.mean() + 10.0 * logits.square().mean()).backward()
        optimizer.step()
    with torch.no_grad():
        ratio = fusion(rows).std(1).mean() / rows.sum(-1).log().std(1).mean()
    return float(ratio)


def test_the_anchor_prevents_collapse_of_the_network() -> None:
    """Without it a network makes the reward constant, which any policy can follow."""
    assert spread_after_training("mlp", anchor=0.0) < 0.3
    assert spread_after_training("mlp", anchor=1.0) > 0.4


def test_normalised_weights_do_not_collapse() -> None:
    """Their mean is 1: at worst another signal decides, and with the anchor none vanishes."""
    assert spread_after_training("weighted", anchor=1.0) > 0.7


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"fusion must be one of .*; got .max."):
        RewardFusion(3, "max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_signals must be >= 1; got 0"):
        RewardFusion(0)
    with pytest.raises(ValueError, match="signals must have 2 components; got 3"):
        RewardFusion(2)(SIGNALS)
