"""TB, DB and SubTB against exact flows, a reference in the reward, and what is measured beside."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_shop import make_inputs, make_model
from torch import Tensor

from gflowgr.models import FlowSettings, GFlowModel
from gflowgr.models.exact_objective import distillation_loss, exact_loss
from gflowgr.models.monitor import distinct_prefixes, entropy_first_token
from gflowgr.tree import PrefixTree, item_flows

OBJECTIVES = ("tb", "db", "subtb")

# ---- which flows, and what follows ----


def test_a_reward_of_every_item_has_exact_flows() -> None:
    for objective in OBJECTIVES:
        assert not FlowSettings(objective=objective).has_exact_flows
        assert FlowSettings(objective=objective, signals=["r_cm"]).has_exact_flows
        asked = FlowSettings(objective=objective, flows="exact")
        assert asked.has_exact_flows
        assert asked.catalogue_signals == ["r_cm"]
        own = FlowSettings(objective=objective, signals=["r_cm", "mine:Fresh"])
        assert own.catalogue_signals == ["r_cm", "mine:Fresh"]
    assert FlowSettings(objective="flow_kl").has_exact_flows
    assert not FlowSettings(objective="sft", signals=["r_cm"]).has_exact_flows


def test_exact_flows_clip_residuals_and_average_over_trajectories() -> None:
    learned, exact = FlowSettings(objective="db"), FlowSettings(objective="db", flows="exact")
    assert (learned.clip, learned.reduced_by) == (None, "prompt")
    assert (exact.clip, exact.reduced_by) == (3.0, "mean")
    assert FlowSettings(objective="tb", residual_clip=5.0).clip == 5.0
    given = FlowSettings(objective="tb", flows="exact", residual_clip=0.0, reduction="prompt")
    assert (given.clip, given.reduced_by) == (None, "prompt")
    assert FlowSettings(objective="subtb", flows="exact").clip is None
    assert FlowSettings(objective="flow_kl").reduced_by == "prompt"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "grpo", "flows": "exact"}, "flows is of the objectives 'tb', 'db'"),
        ({"objective": "flow_kl", "flows": "learned"}, "flows must be 'exact' for objective 'flow"),
        ({"objective": "tb", "flows": "learned", "signals": ["r_cm"]}, "signals must be without"),
        ({"objective": "ipa", "signals": ["r_cm"]}, "signals must be without 'r_cm'"),
        ({"objective": "tb", "signals": ["r_cm", "r_a"]}, r"signals must be .* got \['r_a'\]"),
        ({"objective": "tb", "flows": "exact", "signals": ["r_a"]}, r"signals must be \['r_cm'\]"),
        ({"objective": "tb", "flows": "exact", "partition": "scalar"}, "partition must be"),
        ({"objective": "db", "flows": "exact", "forward_looking": True}, "forward_looking must be"),
        ({"objective": "db", "flows": "exact", "fusion": "mlp"}, "fusion must be 'sum' for exact"),
        ({"objective": "db", "flows": "exact", "beta": 4.0}, r"beta must be 1 \(reward_temp"),
        ({"objective": "tb", "flows": "exact", "log_reward_floor": -3.0}, "log_reward_floor must"),
        ({"objective": "distill", "reward_temperature": 2.0}, "sampler's teacher_temperature"),
        ({"objective": "distill", "observed_share": 0.2}, "observed_share is of flows; got 0.2"),
        ({"objective": "distill", "reduction": "sum"}, "reduction must be 'prompt' for objective"),
        ({"objective": "tb", "reward_temperature": 2.0}, "reward_temperature is of exact flows"),
        ({"objective": "subtb", "residual_clip": 3.0}, "residual_clip is of the objectives 'tb'"),
        ({"objective": "tb", "residual_clip": -1.0}, "residual_clip must be finite and >= 0"),
        ({"objective": "dpo", "reference": True}, "reference is of the objectives 'tb', 'db'"),
        ({"objective": "db", "flows": "exact", "reference": True}, "reference must be false for"),
        (
            {"objective": "tb", "reference": True, "log_reward_floor": -1.0},
            "log_reward_floor must be None with reference",
        ),
    ],
)
def test_what_does_not_go_together_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowSettings(**settings)


# ---- against the flow itself ----

IDENTIFIERS = [[2, 6, 11], [2, 6, 12], [2, 7, 11], [2, 6, 12], [3, 6, 13], [4, 6, 11]]
"""Items 1 and 3 share one."""


def tabular(log_reward: Tensor) -> tuple[PrefixTree, Tensor, Tensor]:
    """States [1, 5, 3, V] of a policy that samples in proportion to the rewards, and tokens."""
    tree = PrefixTree.from_identifiers(IDENTIFIERS)
    tokens = torch.tensor([row for i, row in enumerate(IDENTIFIERS) if i != 3])[None]
    hidden = torch.full((1, 5, 3, 14), -40.0, dtype=torch.float64)
    for n, row in enumerate(tokens[0].tolist()):
        for place in range(3):
            for child in {r[place] for r in IDENTIFIERS if r[:place] == row[:place]}:
                prefix = [*row[:place], child]
                under = [i for i, r in enumerate(IDENTIFIERS) if r[: place + 1] == prefix]
                hidden[0, n, place, child] = log_reward[0, under].exp().sum().log()
    return tree, hidden, tokens


@pytest.mark.parametrize("objective", [*OBJECTIVES, "vargrad"])
def test_a_policy_in_proportion_to_the_rewards_has_no_residual(objective: str) -> None:
    log_reward = torch.tensor([[0.3, -1.0, 2.0, 0.5, -4.0, 1.0]], dtype=torch.float64)
    tree, hidden, tokens = tabular(log_reward)
    kind = {"objective": objective}
    if objective == "vargrad":
        kind = {"objective": "tb", "partition": "vargrad"}
    settings = FlowSettings(flows="exact", normalize="children", **kind)
    head = {"weight": torch.eye(14).double(), "bias": None, "tree": tree, "normalize": "children"}
    mask = torch.ones_like(tokens, dtype=torch.bool)
    flows = item_flows(tree, log_reward)
    _, logs = exact_loss(settings, head, hidden, tokens, mask, flows)
    assert abs(float(logs["loss_gfn"])) < 1e-12
    assert float(logs["residual_rms"]) < 1e-6
    assert abs(float(logs["kl_positive"])) < 1e-9
    assert float(logs["log_z"]) == pytest.approx(float(log_reward.exp().sum().log()))
    # Another policy has one, clipped at 3 nats.
    shifted = hidden.clone()
    shifted[0, 0, 0, 2] -= 9.0
    _, other = exact_loss(settings, head, shifted, tokens, mask, flows)
    assert float(other["residual_rms"]) > 1.0
    assert float(other["kl_positive"]) > 0.1


def test_distillation_is_the_mean_nll_of_each_prompts_draws() -> None:
    _, _, tokens = tabular(torch.zeros(1, 6, dtype=torch.float64))
    tokens = tokens.expand(2, -1, -1)
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 5, 3, 14, generator=g, dtype=torch.float64)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 3:] = False  # the first prompt has two draws
    mask[1, 1:] = False  # and the second has none
    head = {"weight": torch.eye(14).double(), "bias": None, "tree": None, "normalize": "vocab"}
    settings = FlowSettings(objective="distill", gfn_weight=0.5)
    loss, logs = distillation_loss(settings, head, hidden, tokens, mask)
    nll = -hidden.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1).sum(-1)
    expected = {"loss_gr": nll[:, 0].mean(), "loss_gfn": nll[0, 1:3].mean() / 2}
    for name, value in expected.items():
        torch.testing.assert_close(logs[name], value)
    torch.testing.assert_close(loss, expected["loss_gr"] + 0.5 * expected["loss_gfn"])


def catalogue(model: GFlowModel, *unrewarded: tuple[int, int]) -> Tensor:
    """Log-rewards [3, 200] of the inputs' prompts; -inf for the items given by prompt."""
    g = torch.Generator().manual_seed(7)
    log_reward = torch.randn(3, model.tree.num_items, generator=g)
    for prompt, item in unrewarded:
        log_reward[prompt, item] = -math.inf
    return log_reward


def exact_inputs(model: GFlowModel, *unrewarded: tuple[int, int]) -> dict[str, Tensor]:
    inputs = make_inputs(model)
    del inputs["log_reward"]
    return inputs | {"catalogue_log_reward": catalogue(model, *unrewarded)}


@pytest.mark.parametrize("normalize", ["vocab", "children"])
def test_tb_balances_log_p_against_r_over_z(normalize: str) -> None:
    model = make_model(flows="exact", normalize=normalize, gfn_weight=0.3, residual_clip=0.0)
    model.eval()
    assert model.partition is None
    assert model.state_flow is None
    assert model.flow_started
    inputs = exact_inputs(model)
    found = model(**inputs)
    log_p = model.log_probs(inputs)
    items = torch.tensor([[3, 50, 120, 7], [9, 8, 77, 0], [199, 0, 64, 65]])
    leaves = model.tree.leaf_of(torch.arange(200))
    wanted, count = 0.0, 0
    for b in range(3):
        rewards = inputs["catalogue_log_reward"][b].double()
        for n in range(4):
            if (b, n) != (1, 3):
                shared = leaves == leaves[items[b, n]]
                residual = rewards.logsumexp(0) + log_p[b, n] - rewards[shared].logsumexp(0)
                wanted, count = wanted + float(residual) ** 2, count + 1
    assert float(found["loss_gfn"]) == pytest.approx(wanted / count, rel=1e-4)
    assert float(found["residual_rms"]) == pytest.approx((wanted / count) ** 0.5, rel=1e-4)
    joint = found["loss_gr"] + 0.3 * found["loss_gfn"]
    assert float(found["loss"].detach()) == pytest.approx(float(joint), rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("normalize", ["vocab", "children"])
def test_a_positive_without_a_reward_has_its_supervised_term_alone(
    objective: str, normalize: str
) -> None:
    model = make_model(objective=objective, flows="exact", normalize=normalize).eval()
    items = [i for i in range(200) if model.tree.leaf_of([i]) == model.tree.leaf_of([3])]
    without = exact_inputs(model, *[(0, item) for item in items])
    found = model(**without)
    # The same with the trajectory left out, whose share of the mean is then missing: 10 of 11.
    left_out = dict(without, mask=without["mask"].clone())
    left_out["mask"][0, 0] = False
    flow = model(**left_out)
    assert float(found["loss_gfn"]) == pytest.approx(float(flow["loss_gfn"]) * 10 / 11, rel=1e-5)
    whole = model(**exact_inputs(model))
    assert float(found["loss_gr"]) == pytest.approx(float(whole["loss_gr"]), rel=1e-6)
    joint = float(found["loss_gr"] + found["loss_gfn"])
    assert float(found["loss"].detach()) == pytest.approx(joint, rel=1e-5)
    found["loss"].backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients)


# ---- the reference ----


def test_the_reference_is_added_to_the_log_reward() -> None:
    """At the start log P cancels against it: what is left are the rewards."""
    model = make_model(partition="vargrad", reference=True, beta=2.0, normalize="children").eval()
    inputs = make_inputs(model)
    with pytest.raises(ValueError, match="objective 'tb' needs a reference"):
        model(**inputs)
    model.freeze_reference()
    before = model.log_probs(inputs)
    valid = inputs["mask"].any(-1)

    def expected(log_p: Tensor) -> float:
        gap = 2.0 * inputs["log_reward"] + before - log_p
        rows = [row[real] for row, real in zip(gap, valid, strict=True)]
        return sum(float((row - row.mean()).square().sum()) for row in rows) / 3

    assert float(model(**inputs)["loss_gfn"]) == pytest.approx(expected(before), rel=1e-4)
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(1.3)
    now = model.log_probs(inputs)
    assert not torch.allclose(now, before)
    assert float(model(**inputs)["loss_gfn"]) == pytest.approx(expected(now), rel=1e-4)


def test_a_learned_z_starts_with_the_reference_counted() -> None:
    model = make_model(reference=True).eval()
    model.freeze_reference()
    sums = model.flow_statistics(**make_inputs(model))
    valid = make_inputs(model)["mask"].any(-1)
    rewards = make_inputs(model)["log_reward"].masked_fill(~valid, 0.0).sum(1) / valid.sum(1)
    assert float(sums[0, -1]) == pytest.approx(float(rewards.sum()), rel=1e-5)


def test_a_checkpoint_keeps_the_reference(tmp_path: Path) -> None:
    model = make_model(partition="vargrad", reference=True).eval()
    model.freeze_reference()
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.mul_(1.3)
    model.save_checkpoint(tmp_path)
    loaded = make_model(partition="vargrad", reference=True, seed=1).eval()
    loaded.load_weights(tmp_path)
    inputs = make_inputs(model)
    assert torch.equal(loaded(**inputs)["loss"], model(**inputs)["loss"])


# ---- what is measured ----


def test_the_entropy_of_the_first_token() -> None:
    tree = PrefixTree.from_identifiers(IDENTIFIERS)
    hidden = torch.zeros(2, 1, 3, 14)
    hidden[0, 0, 0, 2] = 50.0
    mask = torch.ones(2, 1, 3, dtype=torch.bool)
    arguments = (torch.eye(14), torch.zeros(14), tree)
    # One certain, one even among the root's three children.
    found = entropy_first_token(hidden, mask, *arguments)
    assert float(found) == pytest.approx(math.log(3) / 2, rel=1e-5)
    mask[0] = False
    hidden[0] = math.nan
    assert float(entropy_first_token(hidden, mask, *arguments)) == pytest.approx(math.log(3))


def test_distinct_prefixes() -> None:
    """Two items that part at the third token have four, a padding trajectory adds none."""
    tree = PrefixTree.from_identifiers(IDENTIFIERS)
    tokens = torch.tensor([[IDENTIFIERS[0], IDENTIFIERS[1]], [IDENTIFIERS[0], IDENTIFIERS[5]]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    assert float(distinct_prefixes(tree, tokens, mask)) == (4 + 6) / 2
    mask[1, 1] = False
    assert float(distinct_prefixes(tree, tokens, mask)) == (4 + 3) / 2
