"""R = fuse(r_a, r_yhat, r_sim), signal by signal."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import pytest
import torch

from gflowgr.ops import validation
from gflowgr.rewards import (
    BehaviourAwareReward,
    SignalContext,
    default_behaviour_values,
    make_signals,
)
from gflowgr.rewards.fusion import FusionMode, RewardFusion
from gflowgr.samplers import AUGMENTED, SHOWN

ITEMS = torch.tensor([[0, 1, 2, -1]])
CONTEXT = SignalContext(
    tokens=torch.tensor([[[2, 5, 9], [2, 5, 8], [3, 6, 9], [0, 0, 0]]]),
    mask=torch.tensor([[[True] * 3, [True] * 3, [True] * 3, [False] * 3]]),
    items=ITEMS,
    behaviours=torch.tensor([[1, -2, -2, -2]]),
    scores=torch.tensor([[2.0, 0.0, -2.0, 0.0]]),
    log_probs=lambda: torch.tensor([[-3.0, -6.0, -9.0, 0.0]]),
)
NAMES = ("click", "purchase")


def reward(*signals: str, **changes: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    made = make_signals(
        signals or ["r_a", "r_yhat", "r_sim"],
        behaviour_values={"click": 1.0, "purchase": 10.0},
        behaviour_names=NAMES,
        default_value=7.0,
    )
    out = BehaviourAwareReward(made)(dataclasses.replace(CONTEXT, **changes))
    return out.log_reward, out.parts


def test_components_and_their_sum() -> None:
    log_reward, parts = reward()
    assert parts["r_a"].tolist() == [[10.0, 0.0, 0.0, 0.0]]
    assert parts["r_sim"].tolist() == [[3.0, 2.0, 1.0, 0.0]]
    z = math.sqrt(2)  # scores have mean 0 and standard deviation sqrt(2)
    softplus = [math.log1p(math.exp(value)) for value in (z, 0.0, -z)]
    expected = torch.tensor([softplus])
    torch.testing.assert_close(parts["r_yhat"][:, :3], expected)
    total = (torch.tensor([[13.0, 2.0, 1.0]]) + expected).log()
    torch.testing.assert_close(log_reward[:, :3], total)
    assert log_reward[0, 3] == 0


@pytest.mark.parametrize(
    ("behaviours", "values"),
    [
        ([0, -2, -2, -2], [1.0, 0.0, 0.0, 0.0]),  # augmented items are worth nothing
        ([1, 0, 1, -2], [10.0, 1.0, 10.0, 0.0]),  # others of the user's log have theirs
        ([-1, -2, -1, -2], [7.0, 0.0, 7.0, 0.0]),  # not recorded: the default value
    ],
)
def test_behaviours_decide_r_a(behaviours: list[int], values: list[float]) -> None:
    _, parts = reward("r_a", behaviours=torch.tensor([behaviours]))
    assert parts["r_a"].tolist() == [values]


@pytest.mark.parametrize(
    ("side", "given", "value"),
    [("cart", {}, 3.0), ("cart", {"cart": 2.0}, 2.0), ("wish", {"wish": 1.0}, 1.0)],
)
def test_a_side_behaviour_has_a_value(side: str, given: dict[str, float], value: float) -> None:
    values = {"click": 1.0, "purchase": 10.0, **given}
    made = make_signals(["r_a"], behaviour_values=values, behaviour_names=NAMES, side=side)
    context = dataclasses.replace(CONTEXT, behaviours=torch.tensor([[1, SHOWN, AUGMENTED, 0]]))
    assert BehaviourAwareReward(made)(context).parts["r_a"][0, 1] == value


def test_a_side_behaviour_without_a_value_is_refused() -> None:
    with pytest.raises(ValueError, match="no value for the side behaviour 'wish'"):
        make_signals(["r_a"], side="wish")


@pytest.mark.parametrize(("given", "value"), [({}, 0.0), ({"impression": 0.25}, 0.25)])
def test_an_impression_is_worth_what_the_values_say(given: dict[str, float], value: float) -> None:
    """Beside an augmented item, which is always worth nothing."""
    values = {"click": 1.0, "purchase": 10.0, **given}
    made = make_signals(["r_a"], behaviour_values=values, behaviour_names=NAMES)
    behaviours = torch.tensor([[1, SHOWN, AUGMENTED, 0]])
    context = dataclasses.replace(CONTEXT, behaviours=behaviours, items=torch.arange(4)[None])
    assert BehaviourAwareReward(made)(context).parts["r_a"].tolist() == [[10.0, value, 0.0, 1.0]]


def test_generation_probability_is_per_token() -> None:
    _, parts = reward("r_generation")
    expected = torch.tensor([[-1.0, -2.0, -3.0]]).exp()
    torch.testing.assert_close(parts["r_generation"][:, :3], expected)
    with pytest.raises(ValueError, match=r"needs context\.log_probs"):
        reward("r_generation", log_probs=None)


def test_tokens_beyond_the_positives_end_are_not_similar() -> None:
    """Where the positive has ended, a padding token that equals a real one is no common token."""
    mask = CONTEXT.mask.clone()
    mask[0, 0, 2] = False
    _, parts = reward("r_sim", mask=mask)
    assert parts["r_sim"].tolist() == [[2.0, 2.0, 0.0, 0.0]]


def test_a_signal_may_say_anything_of_padding_trajectories() -> None:
    class Odd:
        name = "r_odd"

        def __init__(self, value: float) -> None:
            self.value = value

        def __call__(self, context: SignalContext) -> torch.Tensor:
            return torch.tensor([[1.0, 2.0, 3.0, self.value]])

    for value in (math.nan, math.inf, -1.0, 5.0):
        measured = BehaviourAwareReward([Odd(value)]).measure(CONTEXT)
        assert measured.flatten().tolist() == [1.0, 2.0, 3.0, 0.0]


@pytest.mark.parametrize("left_out", ["r_a", "r_yhat", "r_sim"])
def test_each_signal_can_be_left_out(left_out: str) -> None:
    kept = [name for name in ("r_a", "r_yhat", "r_sim") if name != left_out]
    log_reward, parts = reward(*kept)
    assert list(parts) == kept
    total = sum(parts.values())
    torch.testing.assert_close(log_reward[:, :2], total[:, :2].log())


def test_rewards_are_positive_whatever_the_signals() -> None:
    """Augmented items that share no token with the positive, without a collaborative model."""
    log_reward, _ = reward(
        "r_a", "r_sim", tokens=torch.tensor([[[2, 5, 9], [3, 6, 8], [3, 6, 8], [0, 0, 0]]])
    )
    assert torch.isfinite(log_reward).all()
    assert log_reward[0, 1] == pytest.approx(math.log(1e-6))
    no_model, parts = reward("r_yhat", scores=None)
    assert parts["r_yhat"].tolist() == [[0.0] * 4]
    assert torch.isfinite(no_model).all()
    constant, _ = reward("r_yhat", scores=torch.full((1, 4), 3.0))
    assert torch.isfinite(constant).all()


class LateItems:
    """What a user writes for a signal of their own."""

    name = "r_late"

    def __call__(self, context: SignalContext) -> torch.Tensor:
        return (context.items >= 2).float()


class Negative(LateItems):
    def __call__(self, context: SignalContext) -> torch.Tensor:
        return -super().__call__(context)


class Flat(LateItems):
    def __call__(self, context: SignalContext) -> torch.Tensor:
        return context.items[:, 0].float()


class Nameless:
    def __call__(self, context: SignalContext) -> torch.Tensor:
        return context.items.float()


def test_a_signal_of_ones_own() -> None:
    log_reward, parts = reward("r_sim", f"{__name__}:LateItems")
    assert parts["r_late"].tolist() == [[0.0, 0.0, 1.0, 0.0]]
    torch.testing.assert_close(log_reward, torch.tensor([[3.0, 2.0, 2.0, 1.0]]).log())


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        (["r_b"], r"'r_b' is neither one of \['r_a', .*\] nor 'module:Class'"),
        (["r_a", "r_a"], "must not repeat one"),
        (["no.such.module:X"], "cannot make 'no.such.module:X': no module 'no.such.module' is"),
        ([f"{__name__}:Missing"], "cannot make .*Missing"),
        ([f"{__name__}:Nameless"], "needs a `name`"),
        ([f"{__name__}:LateItems", f"{__name__}:Negative"], "must have different names"),
        ([f"{__name__}:Negative"], r"the signal 'r_late' is -1\.0 at \[0, 2\]; .* >= 0"),
        ([f"{__name__}:Flat"], r"'r_late' must be \[B, N\] = \(1, 4\); got \(1,\)"),
    ],
)
def test_bad_signals_are_named(signals: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward(*signals)


@pytest.mark.parametrize("mode", get_args(FusionMode))
def test_a_bad_value_that_is_not_checked_becomes_nan(mode: FusionMode) -> None:
    """A sum's floor must not hide it: the loss is what tells then."""
    made = make_signals(["r_sim", f"{__name__}:Negative"])
    with validation(False):
        log_reward = BehaviourAwareReward(made, RewardFusion(2, mode))(CONTEXT).log_reward
    assert log_reward.isnan().tolist() == [[False, False, True, False]]


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match=r"behaviour_values\['click'\].*got -1"):
        make_signals(["r_a"], behaviour_values={"click": -1.0})
    with pytest.raises(ValueError, match=r"no reward is known for the behaviours \['wink'\]"):
        make_signals(["r_a"], behaviour_values={"click": 1.0}, behaviour_names=("click", "wink"))
    with pytest.raises(ValueError, match=r"'r_yhat' is nan at \[0, 0\]"):
        reward(scores=torch.tensor([[1.0, torch.nan, 0.0, 0.0]]))
    with pytest.raises(ValueError, match="signals must be a list of names"):
        make_signals([])


def test_values_that_are_not_given_are_the_defaults() -> None:
    names = ("click", "purchase", "wink")
    (level,) = make_signals(["r_a"], behaviour_values={"wink": 2.0}, behaviour_names=names)
    codes = torch.tensor([[0, 1, 2]])
    empty = torch.zeros(1, 3, 1)
    context = SignalContext(empty.long(), empty.bool(), codes, codes)
    assert level(context).tolist() == [[1.0, 10.0, 2.0]]


def test_default_values_of_behaviours_and_stars() -> None:
    assert default_behaviour_values(("click", "purchase")) == {"click": 1.0, "purchase": 10.0}
    assert default_behaviour_values(("0.5", "2.5", "5")) == {"0.5": 1.0, "2.5": 5.0, "5": 10.0}
    assert default_behaviour_values(()) == {}
    logged = ("view", "Add_To-Cart", "addtocart", "transaction", "PageView", "wish list")
    assert list(default_behaviour_values(logged).values()) == [1.0, 3.0, 3.0, 10.0, 1.0, 3.0]
    with pytest.raises(ValueError, match=r"\['wink'\]; give behaviour_values"):
        default_behaviour_values(("click", "wink"))
