"""R = r_a + r_yhat + r_sim, component by component."""

from __future__ import annotations

import math

import pytest
import torch

from gflowgr.rewards import BehaviourAwareReward, default_behaviour_values

TOKENS = torch.tensor([[[2, 5, 9], [2, 5, 8], [3, 6, 9], [0, 0, 0]]])
ITEMS = torch.tensor([[0, 1, 2, -1]])
MASK = torch.tensor([[[True] * 3, [True] * 3, [True] * 3, [False] * 3]])


def reward(scores: torch.Tensor | None, behaviour: int = 1) -> tuple[torch.Tensor, dict]:
    compute = BehaviourAwareReward({"click": 1.0, "purchase": 10.0}, ("click", "purchase"))
    out = compute(TOKENS, MASK, torch.tensor([behaviour]), ITEMS, scores)
    return out.log_reward, out.parts


def test_components_and_their_sum() -> None:
    scores = torch.tensor([[2.0, 0.0, -2.0, 0.0]])
    log_reward, parts = reward(scores)
    assert parts["r_a"].tolist() == [[10.0, 0.0, 0.0, 0.0]]
    assert parts["r_sim"].tolist() == [[3.0, 2.0, 1.0, 0.0]]
    z = math.sqrt(2)  # scores have mean 0 and standard deviation sqrt(2)
    softplus = [math.log1p(math.exp(value)) for value in (z, 0.0, -z)]
    expected = torch.tensor([softplus])
    torch.testing.assert_close(parts["r_yhat"][:, :3], expected)
    total = (torch.tensor([[13.0, 2.0, 1.0]]) + expected).log()
    torch.testing.assert_close(log_reward[:, :3], total)
    assert log_reward[0, 3] == 0


@pytest.mark.parametrize(("behaviour", "value"), [(0, 1.0), (1, 10.0), (-1, 10.0)])
def test_the_behaviour_decides_r_a(behaviour: int, value: float) -> None:
    _, parts = reward(None, behaviour)
    assert parts["r_a"][0, 0] == value


def test_rewards_are_positive_without_any_signal() -> None:
    compute = BehaviourAwareReward({}, default_value=0.0)
    tokens = torch.tensor([[[1], [2]]])
    out = compute(
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        torch.tensor([-1]),
        torch.tensor([[0, 1]]),
        torch.full((1, 2), 3.0),
    )
    assert torch.isfinite(out.log_reward).all()


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match=r"behaviour_values\['click'\].*got -1"):
        BehaviourAwareReward({"click": -1.0})
    with pytest.raises(ValueError, match=r"no value for \['cart'\]"):
        BehaviourAwareReward({"click": 1.0}, ("click", "cart"))
    with pytest.raises(ValueError, match=r"scores\[0\] .* not finite"):
        reward(torch.tensor([[1.0, torch.nan, 0.0, 0.0]]))


def test_default_values_of_behaviours_and_stars() -> None:
    assert default_behaviour_values(("click", "purchase")) == {"click": 1.0, "purchase": 10.0}
    assert default_behaviour_values(("0.5", "2.5", "5")) == {"0.5": 1.0, "2.5": 5.0, "5": 10.0}
    assert default_behaviour_values(()) == {}
    with pytest.raises(ValueError, match=r"\['wink'\]; give behaviour_values"):
        default_behaviour_values(("click", "wink"))
