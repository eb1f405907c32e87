"""Training by balance against exact flows: residuals fall, and rewards of 0 are no trajectories."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.tiny_decoder import make_decoder
from support.tiny_shop import make_args, make_model, make_scorer, shop
from support.tiny_trainer import make_trainer, steps, weights
from torch import Tensor

from gflowgr.training.inputs import make_inputs


def test_tb_lowers_the_residual(tmp_path: Path) -> None:
    settings = {"flows": "exact", "reward_temperature": 1.0, "gfn_weight": 10.0}
    model = make_decoder(objective="tb", **settings)
    args = make_args(
        tmp_path,
        sampler="teacher",
        num_trajectories=4,
        per_device_train_batch_size=128,
        max_steps=12,
        logging_steps=4,
        learning_rate=2e-2,
    )
    trainer = make_trainer(args, model)
    trainer.train()
    assert all(name.startswith("backbone.") for name in weights(trainer))
    first, last = steps(trainer)[0], steps(trainer)[-1]
    assert last["residual_rms"] < 0.9 * first["residual_rms"]
    assert last["kl_positive"] < first["kl_positive"]
    assert first["residual_rms"] >= abs(first["residual_mean"])
    assert first["reward_temperature"] == 1.0
    assert 1.9 < first["entropy_first_token"] < math.log(8)  # of eight first codes
    assert 4 < first["distinct_prefixes"] <= 16
    joint = first["loss_gr"] + 10 * first["loss_gfn"]
    assert first["loss"] == pytest.approx(joint, rel=1e-4)


def test_distillation_lowers_the_nll_of_what_the_teacher_draws(tmp_path: Path) -> None:
    model = make_decoder(objective="distill")
    args = make_args(
        tmp_path,
        sequences=True,
        positions_per_sequence=2,
        num_trajectories=4,
        sampler="teacher",
        per_device_train_batch_size=64,
        max_steps=10,
    )
    trainer = make_trainer(args, model)
    trainer.train()
    first, last = steps(trainer)[0], steps(trainer)[-1]
    assert last["loss_gfn"] < first["loss_gfn"]
    assert first["loss"] == pytest.approx(first["loss_gr"] + first["loss_gfn"], rel=1e-4)


def test_distillation_needs_draws(tmp_path: Path) -> None:
    model = make_decoder(objective="distill")
    with pytest.raises(ValueError, match="positions_per_sequence must be given for objective 'dis"):
        make_inputs(model, make_args(tmp_path, sequences=True), shop(), make_scorer())
    with pytest.raises(ValueError, match="num_trajectories must be >= 2 for objective 'distill'"):
        make_inputs(model, make_args(tmp_path, num_trajectories=1), shop(), make_scorer())


def test_db_trains_on_whole_sequences(tmp_path: Path) -> None:
    """Positives everywhere, and sampled trajectories at two positions of each."""
    model = make_decoder(objective="db", signals=["r_cm"], reward_temperature=1.0)
    args = make_args(
        tmp_path,
        sequences=True,
        positions_per_sequence=2,
        sampler="random",
        per_device_train_batch_size=64,
        max_steps=10,
    )
    trainer = make_trainer(args, model)
    trainer.train()
    first, last = steps(trainer)[0], steps(trainer)[-1]
    assert last["residual_rms"] < first["residual_rms"]
    assert first["distinct_prefixes"] > 4  # a trajectory alone has four


class Even:
    """Items of even ids, and of those only the ones that are not of the last twenty."""

    def log_reward(self, scores: Tensor, histories: Tensor) -> Tensor:
        ids = torch.arange(scores.shape[1])
        return torch.where((ids % 2 == 0) & (ids < 180), 0.0, -torch.inf).expand_as(scores)


def test_items_without_a_reward_are_no_trajectories(tmp_path: Path) -> None:
    model = make_model(signals=["r_cm", f"{__name__}:Even"], importance_clip=5.0)
    args = make_args(tmp_path, num_trajectories=6, sampler="random")
    inputs, examples, collator = make_inputs(model, args, shop(), make_scorer())
    picked = [i for i in range(400) if examples[i]["target"] % 2][:8]
    batch = collator([examples[i] for i in picked])
    flow, _ = inputs(batch, epoch=0, progress=0.0, log_probs=model.log_probs)
    every, seen = model.item_tokens(), batch["histories"]
    assert flow["mask"][:, 0].all()  # the supervised term of positives stays, though they are odd
    others = 0
    for b in range(len(picked)):
        for n in range(1, 6):
            if bool(flow["mask"][b, n].any()):
                item = int((every == flow["tokens"][b, n]).all(-1).nonzero()[0, 0])
                assert item % 2 == 0
                assert item not in seen[b].tolist()
                others += 1
    assert 0 < others < 5 * len(picked)
    found = model.eval()(**flow)
    assert bool(found["loss"].isfinite())
    assert bool(found["residual_rms"].isfinite())


@pytest.mark.parametrize("sampler", ["random", "curriculum", "teacher"])
def test_items_of_the_past_are_never_sampled(sampler: str, tmp_path: Path) -> None:
    """Their reward is 0; so no trajectory is lost to it."""
    model = make_model(flows="exact", reward_temperature=1.0)
    args = make_args(tmp_path, num_trajectories=5, sampler=sampler)
    inputs, examples, collator = make_inputs(model, args, shop(), make_scorer())
    batch = collator([examples[i] for i in range(0, 300, 10)])
    flow, _ = inputs(batch, epoch=0, progress=0.5, log_probs=model.log_probs)
    assert flow["mask"][:, 1:].any(-1).all()


def test_accumulated_steps_equal_one_large_batch(tmp_path: Path) -> None:
    """A mean over trajectories, of which micro-batches have different numbers."""
    found = []
    for size, parts in ((64, 1), (16, 4)):
        args = make_args(
            tmp_path / str(size),
            num_trajectories=4,
            sampler="random",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
        )
        model = make_decoder(
            objective="tb", signals=["r_cm", f"{__name__}:Even"], reward_temperature=1.0
        )
        trainer = make_trainer(args, model)
        trainer.train()
        found.append((weights(trainer), [entry["loss"] for entry in steps(trainer)]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], rtol=1e-3, atol=1e-4)


def test_a_reference_is_frozen_when_the_training_begins(tmp_path: Path) -> None:
    model = make_decoder(objective="tb", reference=True)
    before = {n: p.detach().clone() for n, p in model.backbone.named_parameters()}
    trainer = make_trainer(make_args(tmp_path), model)
    trainer.train()
    assert model.reference is not None
    assert all(torch.equal(value, before[n]) for n, value in model.reference.weights.items())
    assert not all(torch.equal(p, before[n]) for n, p in model.backbone.named_parameters())


def test_what_exact_flows_cannot_do_is_said(tmp_path: Path) -> None:
    model = make_model(flows="exact")
    with pytest.raises(ValueError, match="collaborative is required by the objective 'tb'"):
        make_inputs(model, make_args(tmp_path, sampler="random"), shop(), None)
    vargrad = make_decoder(objective="tb", flows="exact", partition="vargrad")
    with pytest.raises(ValueError, match="positions_per_sequence must be given for partition"):
        make_inputs(vargrad, make_args(tmp_path, sequences=True), shop(), make_scorer())
    for name, value in (("reference", True), ("importance_clip", 2.0)):
        model = make_decoder(objective="tb", flows="exact", partition="vargrad", **{name: value})
        args = make_args(tmp_path, sequences=True, positions_per_sequence=2)
        with pytest.raises(ValueError, match=f"sequences must be off with {name}"):
            make_inputs(model, args, shop(), make_scorer())
    with_reference = make_model(reference=True)
    args = make_args(tmp_path, eval_calibration_users=5)
    with pytest.raises(ValueError, match="eval_calibration_users must be 0 with reference"):
        make_inputs(with_reference, args, shop(), make_scorer())
