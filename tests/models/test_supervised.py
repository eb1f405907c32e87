"""The supervised objective's settings: label smoothing along the tree, weights of behaviours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_decoder import make_decoder
from support.tiny_shop import make_args, make_model, make_scorer, shop
from support.tiny_trainer import make_trainer, steps
from torch import Tensor

from gflowgr.models import FlowSettings
from gflowgr.models.objective import supervised_loss
from gflowgr.rewards import InteractionLevel
from gflowgr.training.inputs import make_inputs
from gflowgr.tree import PrefixTree

IDENTIFIERS = [[2, 6, 11], [2, 6, 12], [2, 7, 11], [2, 6, 12], [3, 6], [4, 6, 11]]
"""Items 1 and 3 share one; item 4's is shorter."""
VOCAB = 14


def competitors(prefix: list[int], normalize: str) -> list[int]:
    if normalize == "vocab":
        return list(range(VOCAB))
    level = len(prefix)
    found = {row[level] for row in IDENTIFIERS if row[:level] == prefix and len(row) > level}
    return sorted(found)


def smoothed(logits: Tensor, row: list[int], normalize: str, share: float) -> Tensor:
    """(1 - share) NLL + share KL(U || P) of one identifier, from logits [L, V], written out."""
    total = logits.new_zeros(())
    for level, token in enumerate(row):
        prefix = row[:level]
        within = competitors(prefix, normalize)
        log_p = dict(zip(within, logits[level, within].log_softmax(0), strict=True))
        total = total - (1 - share) * log_p[token]
        going_on = [other for other in IDENTIFIERS if other[:level] == prefix]
        counts = {c: sum(other[: level + 1] == [*prefix, c] for other in going_on) for c in within}
        every = sum(counts.values())
        for child, count in counts.items():
            if count:
                u = count / every
                total = total + share * u * (math.log(u) - log_p[child])
    return total


@pytest.mark.parametrize("normalize", ["children", "vocab"])
@pytest.mark.parametrize("weighted", [False, True])
def test_label_smoothing_is_a_share_of_every_item(normalize: str, weighted: bool) -> None:
    tree = PrefixTree.from_identifiers(IDENTIFIERS)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 1, 3, 5, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, 5, generator=g, dtype=torch.float64, requires_grad=True)
    rows = [IDENTIFIERS[0], IDENTIFIERS[4], IDENTIFIERS[3]]
    tokens = torch.tensor([row + [0] * (3 - len(row)) for row in rows])[:, None]
    mask = torch.tensor([[i < len(row) for i in range(3)] for row in rows])[:, None]
    settings = FlowSettings(objective="sft", normalize=normalize, label_smoothing=0.2)
    head = {
        "weight": weight,
        "bias": None,
        "tree": None if normalize == "vocab" else tree,
        "normalize": normalize,
    }
    w = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64) if weighted else None
    loss = supervised_loss(settings, head, hidden, tokens, mask, tree=tree, weights=w)
    logits = hidden[:, 0] @ weight.T
    each = [smoothed(logits[b], row, normalize, 0.2) for b, row in enumerate(rows)]
    expected = (torch.stack(each) * (1.0 if w is None else w)).mean()
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, (hidden, weight))
    for ours, theirs in zip(found, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_smoothing_is_the_limit_of_little(tmp_path: Path) -> None:
    tree = PrefixTree.from_identifiers(IDENTIFIERS)
    tokens = torch.tensor([[IDENTIFIERS[0]], [IDENTIFIERS[5]]])
    hidden = torch.randn(2, 1, 3, VOCAB, generator=torch.Generator().manual_seed(1))
    head = {"weight": torch.eye(VOCAB), "bias": None, "tree": tree, "normalize": "children"}
    given = (head, hidden, tokens, torch.ones_like(tokens, dtype=torch.bool))
    none = supervised_loss(FlowSettings(objective="sft"), *given, tree=tree)
    little = FlowSettings(objective="sft", label_smoothing=1e-6)
    assert float(supervised_loss(little, *given, tree=tree)) == pytest.approx(float(none), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\); got 1.0"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\)"),
        ({"objective": "flow_kl", "label_smoothing": 0.1}, "label_smoothing is of the objective"),
        ({"behaviour_temperature": 0.0}, "behaviour_temperature must be finite and > 0; got 0.0"),
        ({"objective": "tb", "behaviour_temperature": 1.0}, "behaviour_temperature is of the obj"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowSettings(**settings)


# ---- weights of behaviours ----


def expected_weights(behaviours: Tensor, temperature: float) -> Tensor:
    """A click is worth 1 and a purchase 10."""
    purchase = shop().dataset.behaviour_names.index("purchase")
    return torch.where(behaviours == purchase, 1.0, math.exp((0.1 - 1.0) / temperature))


def unread(_: object) -> Tensor:
    pytest.fail("no log-probability is asked for")


def test_targets_are_weighted_by_what_their_behaviour_is_worth(tmp_path: Path) -> None:
    args = make_args(tmp_path, sequences=True)
    model = make_decoder(objective="sft", behaviour_temperature=0.5)
    assert model.settings.label == "Weighted SFT"
    make_flow, windows, collate = make_inputs(model, args, shop(), None)
    batch = collate([windows[i] for i in range(20)])
    flow, _ = make_flow(batch, epoch=0, progress=0.0, log_probs=unread)
    behaviours = batch["behaviours"][batch["items"][:, 1:] >= 0]
    assert len(behaviours.unique()) == 2
    torch.testing.assert_close(flow["target_weights"], expected_weights(behaviours, 0.5))

    every = model.eval()(**flow)["loss"]
    alone = [
        model(**{**flow, "target_weights": torch.eye(len(behaviours))[t]})["loss"]
        for t in range(len(behaviours))
    ]
    total = (flow["target_weights"] * torch.stack(alone).detach()).sum()
    torch.testing.assert_close(every.detach(), total)


def test_prompts_are_weighted_as_sequences_are(tmp_path: Path) -> None:
    model = make_model(objective="sft", behaviour_temperature=0.5)
    trainer = make_trainer(make_args(tmp_path, max_steps=6), model)
    make_flow, _, _ = make_inputs(model, trainer.args, shop(), make_scorer())
    batch = next(iter(trainer.get_train_dataloader()))
    flow, _ = make_flow(batch, epoch=0, progress=0.0, log_probs=unread)
    expected = expected_weights(batch["behaviour"], 0.5)
    torch.testing.assert_close(flow["target_weights"], expected)
    trainer.train()
    assert steps(trainer)[-1]["loss"] < steps(trainer)[0]["loss"]


def test_a_share_of_nothing_is_refused() -> None:
    level = InteractionLevel({"click": 0.0, "purchase": 0.0}, ["click", "purchase"])
    with pytest.raises(ValueError, match="behaviour_values must have a value > 0"):
        level.check_largest()
