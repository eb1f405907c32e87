"""A generator's distribution over the whole catalogue against the reward's."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_shop import MAX_HISTORY, make_model, make_scorer, shop

from gflowgr import PrefixTree
from gflowgr.data import pad_histories
from gflowgr.evaluation import Calibration, measure_calibration
from gflowgr.models import GFlowModel, prompt_tokens
from gflowgr.rewards import BehaviourAwareReward, CatalogueReward, make_signals

SIGNALS = ["r_a", "r_yhat", "r_sim"]


def reward(signals: list[str] = SIGNALS) -> BehaviourAwareReward:
    names = shop().dataset.behaviour_names
    return BehaviourAwareReward(make_signals(signals, behaviour_names=names))


def measure(model: GFlowModel, **options: Any) -> Calibration:
    options = {"users": 5, "points": 300, "progress": False, **options}
    return measure_calibration(model, shop(), reward(), make_scorer(), **options)


def plain_flow(model: GFlowModel, row: int) -> tuple[np.ndarray, np.ndarray]:
    """log P and log R of all items for a test user, one item at a time."""
    split, tokens = shop(), model.item_tokens()
    history = pad_histories([split.histories("test")[row]], max_length=MAX_HISTORY)
    target = int(split.targets("test")[row])
    user = int(split.eval_users("test")[row])
    behaviour = int(split.dataset.behaviours[split.dataset.sequences.offsets[user + 1] - 1])  # type: ignore[index]
    prompt = prompt_tokens(history, tokens)
    flow = {
        "input_ids": prompt[0],
        "attention_mask": prompt[1],
        "tokens": tokens[None],
        "mask": torch.ones_like(tokens[None], dtype=torch.bool),
    }
    log_p = model.log_probs(flow)[0].double()
    sharing = [int((tokens == own).all(1).sum()) for own in tokens]
    scores = make_scorer().score(history, None)[0].double()
    z = (scores - scores.mean()) / scores.std(correction=0)
    r_yhat = torch.nn.functional.softplus(z)
    r_sim = (tokens == tokens[target]).sum(1)
    r_a = torch.zeros(len(tokens), dtype=torch.float64)
    level = make_signals(["r_a"], behaviour_names=split.dataset.behaviour_names)[0]
    r_a[target] = float(level._table[behaviour])  # type: ignore[attr-defined]
    log_r = (r_a + r_yhat + r_sim).log()
    return (log_p - torch.tensor(sharing).log()).numpy(), log_r.numpy()


def test_the_first_level_has_the_sums_of_policy_and_reward() -> None:
    model = make_model()
    scored = CatalogueReward(temperature=0.7)
    found = measure_calibration(
        model, shop(), scored, make_scorer(), users=5, points=300, progress=False
    ).first_level
    rows = np.sort(np.random.default_rng(42).choice(len(shop().eval_users("test")), 5, False))[:4]
    assert found.users == shop().eval_users("test")[rows].tolist()
    first = model.item_tokens()[:, 0].numpy()
    assert found.tokens == sorted(set(first.tolist()))
    for place, row in enumerate(rows):
        history = pad_histories([shop().histories("test")[row]], max_length=MAX_HISTORY)
        scores = make_scorer().score(history, None).double() / 0.7
        scores[0, history[history >= 0]] = -torch.inf
        target, log_p = scores[0].softmax(0).numpy(), plain_flow(model, int(row))[0]
        for at, token in enumerate(found.tokens):
            under = first == token
            assert found.target[place][at] == pytest.approx(target[under].sum(), abs=2e-5)
            assert found.model[place][at] == pytest.approx(np.exp(log_p[under]).sum(), abs=2e-5)
    with pytest.raises(ValueError, match="'r_cm'"):
        measure_calibration(model, shop(), scored, None, users=5, progress=False)


def sharing_identifiers(model: GFlowModel) -> GFlowModel:
    """The same generator of a catalogue where every fifth item has its neighbour's identifier."""
    tokens = model.item_tokens()
    tokens[::5] = tokens[1::5]
    tree = PrefixTree.from_identifiers(tokens.numpy())
    return GFlowModel(model.backbone, tree, model.vocabulary, model.settings)


@pytest.mark.parametrize("objective", ["sft", "tb"])
def test_correlations_are_means_over_users_of_those_over_the_catalogue(objective: str) -> None:
    model = sharing_identifiers(make_model(objective=objective))
    found = measure(model)
    rows = np.sort(np.random.default_rng(42).choice(len(shop().eval_users("test")), 5, False))
    flows = [plain_flow(model, row) for row in rows.tolist()]
    pearson = np.mean([np.corrcoef(p, r)[0, 1] for p, r in flows])
    assert found.users == 5
    assert found.pearson == pytest.approx(pearson, abs=1e-5)
    assert found.spearman is not None
    assert -1 < found.spearman < 1
    # The points are pairs of one user and one item, relative to that user's mean.
    centred = [np.stack([p - p.mean(), r - r.mean()], 1) for p, r in flows]
    for point in zip(found.log_p[:20], found.log_r[:20], strict=True):
        assert min(np.abs(np.concatenate(centred) - point).max(1)) < 2e-4


def test_every_method_is_measured_on_the_same_users_items_and_rewards() -> None:
    one = measure(make_model(seed=0, objective="sft"))
    two = measure(make_model(seed=1, beta=0.5, log_reward_floor=-1.0))
    assert one.log_r == two.log_r
    assert one.log_p != two.log_p
    assert measure(make_model(seed=0, objective="sft")) == one
    assert measure(make_model(seed=0, objective="sft"), seed=7).log_r != one.log_r


def test_the_sample_is_no_larger_than_what_there_is() -> None:
    found = measure(make_model(), users=10**6, points=10**6)
    assert found.users == len(shop().eval_users("test"))
    assert len(found.log_p) == len(found.log_r) == found.users * 200
    assert len(measure(make_model(), points=7).log_r) == 7
    assert set(json.loads(json.dumps(measure(make_model()).to_dict()))) == {
        "users",
        "pearson",
        "spearman",
        "log_p",
        "log_r",
        "first_level",
    }


def test_a_generator_that_follows_the_reward_is_recognised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With log P = 2 log R - 3 + (nothing else) the correlations are 1."""
    from gflowgr.evaluation import calibration

    honest = calibration.catalogue_flow

    def ideal(*args: Any) -> Any:
        for _, log_reward in honest(*args):
            yield 2 * log_reward - 3, log_reward

    monkeypatch.setattr(calibration, "catalogue_flow", ideal)
    found = measure(make_model())
    assert found.pearson == pytest.approx(1)
    assert found.spearman == pytest.approx(1)
    np.testing.assert_allclose(found.log_p, 2 * np.array(found.log_r), atol=2e-4)


def test_what_cannot_be_measured_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"collaborative is None, but the reward has .* 'r_yhat'"):
        measure_calibration(model, shop(), reward(), None)
    with pytest.raises(ValueError, match="'r_generation' is the model's own probability"):
        measure_calibration(model, shop(), reward(["r_generation"]), None)
    with pytest.raises(ValueError, match="users must be at least 1; got 0"):
        measure(model, users=0)
    without = measure_calibration(model, shop(), reward(["r_sim"]), None, users=3, progress=False)
    assert without.users == 3
