"""Sampled trajectories at positions of whole sequences, and prompts without an observed target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_decoder import make_decoder
from support.tiny_shop import MAX_HISTORY, make_args, make_scorer, shop
from support.tiny_trainer import make_trainer
from torch import Tensor

from gflowgr.data import Dataset, LeaveOneOut, Ragged, pad_histories
from gflowgr.models import GFlowModel, prompt_tokens
from gflowgr.training.augmentation import draw_items, random_positions, sub_histories
from gflowgr.training.catalogue import position_histories
from gflowgr.training.inputs import make_inputs
from gflowgr.training.sequences import SequenceExamples, SequenceInputs

FLOW_KL: dict[str, Any] = {"objective": "flow_kl", "reward_temperature": 1.0}
WINDOWS = [0, 5, 9, 40]


def made(
    folder: Path, split: LeaveOneOut | None = None, **options: Any
) -> tuple[GFlowModel, dict[str, Tensor], dict[str, Tensor]]:
    """A model, a batch of four windows, and the model's inputs made of it."""
    model = make_decoder(**FLOW_KL).eval()
    args = make_args(folder, sequences=True, **options)
    inputs, examples, collator = make_inputs(model, args, split or shop(), make_scorer())
    assert isinstance(inputs, SequenceInputs)
    batch = collator([examples[i] for i in WINDOWS])
    batch |= inputs.augmented(batch, 2)
    flow, _ = inputs(batch, epoch=2)
    return model, batch, flow


def prompts_of(model: GFlowModel, batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The prompts of a batch, each by itself."""
    items = batch["items"]
    histories = position_histories(items[:, :-1], items[:, 1:] >= 0)
    return [
        prompt_tokens(row[row >= 0][None], model.item_tokens(), model.prompt) for row in histories
    ]


def test_the_loss_is_that_of_the_prompts_one_by_one(tmp_path: Path) -> None:
    options = {"positions_per_sequence": MAX_HISTORY, "num_trajectories": 4, "sampler": "teacher"}
    model, batch, flow = made(tmp_path, **options)
    whole = model(**flow)["loss"]
    valid = flow["mask"].any(-1)
    own, own_mask = flow["tokens"][valid], flow["mask"][valid]
    assert flow["branch_mask"].any(-1).sum() == 3 * int(batch["targets"])
    losses = [
        model(
            *prompt,
            torch.cat([own[t, None], flow["branches"][t]])[None],
            torch.cat([own_mask[t, None], flow["branch_mask"][t]])[None],
            catalogue_log_reward=flow["catalogue_log_reward"][t, None],
        )["loss"]
        for t, prompt in enumerate(prompts_of(model, batch))
    ]
    assert len(losses) == int(batch["targets"])
    torch.testing.assert_close(whole, torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)


def test_positions_are_sampled_as_their_prompts_are(tmp_path: Path) -> None:
    """The same keys: a position of a sequence is the training example with that target."""
    options = {"num_trajectories": 4, "sampler": "teacher"}
    _, batch, flow = made(tmp_path, positions_per_sequence=MAX_HISTORY, **options)
    model = make_decoder(**FLOW_KL)
    inputs, examples, collator = make_inputs(
        model, make_args(tmp_path, **options), shop(), make_scorer()
    )
    ends = shop().train.bounds[:, 1].tolist()
    valid = batch["items"][:, 1:] >= 0
    row, place = valid.nonzero(as_tuple=True)
    numbers = [ends.index(end) for end in (batch["begin"][row] + 1 + place).tolist()]
    prompts = collator([examples[n] for n in numbers])
    wanted, _ = inputs(prompts, epoch=2, progress=0.0, log_probs=model.log_probs)
    # A prompt has more of the user's past than the window, unless it is the first one.
    whole = [n for n, number in enumerate(numbers) if place[n] + 1 == examples.lengths[number]]
    assert len(whole) > 10
    assert torch.equal(flow["branches"][whole], wanted["tokens"][whole, 1:])


def test_some_positions_are_other_ones_each_epoch() -> None:
    valid = torch.ones(3, 8, dtype=torch.bool)
    valid[1, 1:] = False
    examples = torch.arange(3)
    first, second = (random_positions(valid, examples, 3, seed=1, epoch=e) for e in (0, 1))
    assert first.sum(1).tolist() == second.sum(1).tolist() == [3, 1, 3]
    assert not torch.equal(first, second)
    alone = random_positions(valid[2:], examples[2:], 3, seed=1, epoch=0)
    assert torch.equal(alone, first[2:])  # whatever the batch


def test_positions_that_were_not_chosen_have_the_positive_alone(tmp_path: Path) -> None:
    options = {"positions_per_sequence": 1, "num_trajectories": 2, "sampler": "teacher"}
    _, batch, flow = made(tmp_path, **options)
    assert flow["branch_mask"].any(-1).sum() == len(WINDOWS)
    assert int(batch["targets"]) > len(WINDOWS)


# ---- prompts without an observed target ----


def test_sub_histories_are_parts_of_training_sequences() -> None:
    examples = SequenceExamples(shop(), MAX_HISTORY)
    windows = [examples[i] for i in range(len(examples))]
    items = pad_histories([window["items"] for window in windows])
    numbers = torch.arange(len(windows))
    sequences = [row.tolist() for row in shop().train_sequences]
    kept = total = 0
    for epoch in range(2):
        chosen, parts = sub_histories(items, numbers, 0.3, seed=4, epoch=epoch)
        assert 0.2 < len(chosen) / len(windows) < 0.4
        for window, part in zip(chosen.tolist(), parts, strict=True):
            whole = iter(sequences[windows[window]["user"]])
            assert all(item in whole for item in part.tolist())  # in their order
            assert 1 <= len(part) < len(windows[window]["items"])
            kept, total = kept + len(part), total + len(windows[window]["items"])
    assert kept / total == pytest.approx(0.5, abs=0.05)
    again, same = sub_histories(items, numbers, 0.3, seed=4, epoch=1)
    assert torch.equal(again, chosen)
    assert all(np.array_equal(*pair) for pair in zip(same, parts, strict=True))


def test_nothing_of_validation_and_test_is_read(tmp_path: Path) -> None:
    """Other held-out items change nothing of what a step sees."""
    dataset = shop().dataset
    rows = [list(row) for row in dataset.sequences]
    for row in rows:
        if len(row) >= 3:
            row[-2:] = [(item + 7) % dataset.num_items for item in row[-2:]]
    other = Dataset("other", dataset.user_ids, Ragged.from_lists(rows), dataset.num_items)
    options = {"augment_share": 1.0, "positions_per_sequence": 2, "sampler": "teacher"}
    found = [made(tmp_path, split, **options)[2] for split in (None, LeaveOneOut(other))]
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_the_loss_has_one_mean_over_targets_and_one_over_all_prompts(tmp_path: Path) -> None:
    model, batch, flow = made(tmp_path, augment_share=1.0)
    targets, prompts = int(batch["targets"]), int(batch["prompts"])
    assert prompts == len(flow["observed"]) > targets == int(flow["observed"].sum())
    valid = flow["mask"].any(-1)
    tokens = flow["tokens"][valid].clone()
    tokens[targets:] = flow["branches"][targets:, 0]
    supervised, divergence = [], []
    for t, prompt in enumerate(prompts_of(model, batch)):
        reward = flow["catalogue_log_reward"][t, None]
        alone = model(*prompt, tokens[t, None, None], catalogue_log_reward=reward)
        divergence.append(alone["loss_gfn"])
        supervised += [alone["loss_gr"]] if t < targets else []
    nll, kl = torch.stack(supervised).mean(), torch.stack(divergence).mean()
    found = model(**flow)
    torch.testing.assert_close(found["loss_gr"], nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["loss_gfn"], kl, rtol=1e-5, atol=1e-5)
    trainer = make_trainer(make_args(tmp_path, sequences=True, augment_share=1.0), model)
    trainer.state.epoch = 2
    plain = {name: batch[name] for name in ("example", "begin")}
    examples = [SequenceExamples(shop(), MAX_HISTORY)[int(n)] for n in plain["example"]]
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    torch.testing.assert_close(loss, nll + kl, rtol=1e-5, atol=1e-5)


def test_draws_follow_the_reward() -> None:
    log_reward = torch.tensor([0.5, 0.0, 0.3, 0.2]).log().expand(4000, -1)
    valid = torch.ones(1000, 4, dtype=torch.bool)
    drawn = draw_items(log_reward, torch.arange(1000), valid, seed=1, epoch=0)
    shares = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(shares, log_reward[0].exp(), rtol=0, atol=0.03)
    rows = [
        draw_items(log_reward[:4], torch.tensor([n]), valid[:1], seed=1, epoch=0) for n in (0, 999)
    ]
    assert torch.equal(torch.cat(rows), drawn[[0, 1, 2, 3, -4, -3, -2, -1]])
    assert not torch.equal(
        draw_items(log_reward, torch.arange(1000), valid, seed=1, epoch=1), drawn
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment_share": 1.5}, r"augment_share must be in \[0, 1\]; got 1.5"),
        ({"augment_share": 0.5, "sequences": False}, "augment_share is of training on whole"),
        ({"positions_per_sequence": 0}, "positions_per_sequence must be >= 1; got 0"),
        ({"positions_per_sequence": 3, "num_trajectories": 1}, "num_trajectories must be >= 2"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **{"sequences": True, **options})
