"""Flow calibration on numbers made by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from support.identifier_shop import IdentifierShop
from support.small_models import small_model

from gflowgr.decoding import flow_calibration, item_logprobs

REWARD = torch.tensor([[1.0, 2.0, 4.0, 8.0]]).log()


def test_a_perfect_flow() -> None:
    report = flow_calibration(REWARD.double() - math.log(15), REWARD)
    assert report.pearson.item() == pytest.approx(1)
    assert report.spearman.item() == pytest.approx(1)
    assert report.total_variation.item() == pytest.approx(0, abs=1e-7)
    assert report.invalid_mass.item() == pytest.approx(0, abs=1e-7)
    assert report.num_items.tolist() == [4]


def test_values_by_hand() -> None:
    # P = .1 .2 .3 .2 (20% goes to no item); R / 10 = .4 .1 .2 .3.
    log_probs = torch.tensor([[0.1, 0.2, 0.3, 0.2]], dtype=torch.float64).log()
    log_reward = torch.tensor([4.0, 1.0, 2.0, 3.0], dtype=torch.float64).log()
    report = flow_calibration(log_probs, log_reward)
    assert report.invalid_mass.item() == pytest.approx(0.2)
    # |.125 - .4| + |.25 - .1| + |.375 - .2| + |.25 - .3| = .65
    assert report.total_variation.item() == pytest.approx(0.325)
    expected = np.corrcoef(log_probs[0].numpy(), log_reward.numpy())[0, 1]
    assert report.pearson.item() == pytest.approx(expected)
    # Ranks 1, 2.5, 4, 2.5 and 4, 1, 2, 3: covariance -3 / (sqrt(4.5) sqrt(5)).
    assert report.spearman.item() == pytest.approx(-3 / math.sqrt(4.5 * 5))


def test_monotone_but_not_proportional() -> None:
    report = flow_calibration(2 * REWARD - 9, REWARD**3)
    assert report.spearman.item() == pytest.approx(1)
    assert report.pearson.item() < 0.99


def test_beta_is_the_exponent_of_the_target() -> None:
    log_probs = (3 * REWARD).log_softmax(1)
    assert flow_calibration(log_probs, REWARD).total_variation.item() > 0.1
    report = flow_calibration(log_probs, REWARD, beta=3.0)
    assert report.total_variation.item() == pytest.approx(0, abs=1e-6)


def test_items_without_probability_or_reward_count_in_the_total_variation_alone() -> None:
    nothing = -math.inf
    log_probs = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    log_reward = torch.tensor([[0.25, 0.25, 0.5, 0.0]]).log()
    report = flow_calibration(log_probs, log_reward)
    assert report.total_variation.item() == pytest.approx(0.5)
    assert report.num_items.tolist() == [2]
    assert report.pearson.isnan().all()  # the two that are left do not vary
    none = flow_calibration(torch.full((1, 4), nothing), log_reward)
    assert none.total_variation.isnan().all()
    assert none.invalid_mass.item() == 1


def test_items_of_one_identifier_share_its_probability() -> None:
    log_probs = torch.tensor([[0.5, 0.5, 0.5]]).log()  # identifiers 0, 0 and 1
    report = flow_calibration(
        log_probs, torch.tensor([1.0, 1.0, 2.0]).log(), leaf_of=torch.tensor([0, 0, 1])
    )
    assert report.invalid_mass.item() == pytest.approx(0, abs=1e-7)
    assert report.total_variation.item() == pytest.approx(0, abs=1e-7)
    assert report.pearson.item() == pytest.approx(1)


@pytest.mark.parametrize("family", ["t5", "gpt2", "qwen3", "gemma2"])
def test_the_invalid_mass_of_a_model_is_what_leaves_the_tree(family: str) -> None:
    # Items 1 and 3 share an identifier; leaving happens at the first token or at the second.
    shop = IdentifierShop([(2, 3), (2, 4), (5, 6), (2, 4)], model=small_model(family))
    prompts = (shop.ids, shop.mask)
    log_probs = item_logprobs(shop.model, *prompts, shop.tree, normalize="vocab")
    first, after_2, after_5 = (shop.logits(p).softmax(-1) for p in [(), (2,), (5,)])
    valid = first[:, 2] * after_2[:, [3, 4]].sum(1) + first[:, 5] * after_5[:, 6]
    report = flow_calibration(log_probs, torch.zeros(4), leaf_of=shop.tree.leaf_of(torch.arange(4)))
    torch.testing.assert_close(report.invalid_mass, 1 - valid, rtol=0, atol=1e-6)


def test_a_tiny_invalid_mass_keeps_its_digits() -> None:
    log_probs = torch.tensor([[-1e-12]], dtype=torch.float64)
    result = flow_calibration(log_probs, torch.zeros(1, 1))
    torch.testing.assert_close(result.invalid_mass.item(), 1e-12, rtol=1e-9, atol=0)


def test_the_summary_is_json_with_quartiles_over_prompts() -> None:
    log_reward = REWARD.expand(3, -1)
    log_probs = torch.stack([REWARD[0], REWARD[0].flip(0), torch.zeros(4)]) - 4
    summary = json.loads(json.dumps(flow_calibration(log_probs, log_reward).to_dict()))
    assert summary["prompts"] == 3
    assert summary["pearson"]["prompts"] == 2  # a constant has no correlation
    assert summary["pearson"]["mean"] == pytest.approx(0, abs=1e-9)
    assert summary["pearson"]["q25"] == pytest.approx(-0.5)
    assert summary["pearson"]["q75"] == pytest.approx(0.5)
    assert summary["total_variation"]["median"] == pytest.approx(0.3)
    empty = flow_calibration(log_probs[2:], log_reward[2:]).to_dict()
    assert empty["spearman"] == dict.fromkeys(("mean", "q25", "median", "q75")) | {"prompts": 0}


@pytest.mark.parametrize(
    ("log_probs", "log_reward", "options", "error", "message"),
    [
        (REWARD.long(), REWARD, {}, TypeError, "log_probs must be floating"),
        (REWARD * torch.nan, REWARD, {}, ValueError, "log_probs must be finite or -inf"),
        (REWARD[0], REWARD, {}, ValueError, r"log_probs must be \[B, items\]; got \(4,\)"),
        (REWARD, REWARD[:, :3], {}, ValueError, r"log_reward must be \(1, 4\).*got \(1, 3\)"),
        (REWARD, REWARD, {"beta": 0.0}, ValueError, r"beta must be finite and > 0; got 0\.0"),
        (REWARD, REWARD, {"leaf_of": torch.arange(3)}, ValueError, r"leaf_of must be \[items\]"),
    ],
)
def test_bad_arguments_are_named(
    log_probs: torch.Tensor,
    log_reward: torch.Tensor,
    options: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        flow_calibration(log_probs, log_reward, **options)
