"""A training step depends on its global batch, not on how that is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_shop import make_args, make_model, shop
from support.tiny_trainer import make_trainer, steps, weights

from gflowgr.training.batches import LengthBucketSampler, ProcessBatches
from gflowgr.training.flow_inputs import FlowInputs
from gflowgr.training.global_batch import Count, Part, parts_of
from gflowgr.training.step_log import histogram

GLOBAL_BATCH = 1024  # of 1,353 examples: the second and last step of an epoch has 329


class UnevenSampler:
    """Leaves out one or two trajectories of some prompts, so that prompts differ in what counts."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def sample(self, request: Any) -> Any:
        chosen = self.inner.sample(request)
        for n in (1, 2):
            if n < chosen.items.shape[1]:
                chosen.items[request.examples % (2 + n) == 0, n] = -1
        return chosen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def course(
    folder: Path, parts: int, settings: dict[str, Any], options: dict[str, Any]
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Log and weights of an epoch, each step's prompts taken in ``parts``."""
    args = make_args(
        folder,
        per_device_train_batch_size=GLOBAL_BATCH // parts,
        gradient_accumulation_steps=parts,
        max_steps=2,
        optim="sgd",  # where a gradient is rounding alone, Adam would make it large
        max_grad_norm=0.0,
        learning_rate=1e-5,
        partition_learning_rate=1e-5,
        **options,
    )
    trainer = make_trainer(args, make_model(**settings))
    inputs: FlowInputs = trainer._flow_inputs
    if inputs.sampler is not None:
        inputs.sampler = UnevenSampler(inputs.sampler)  # type: ignore[assignment]
    trainer.train()
    return steps(trainer), weights(trainer)


ON_POLICY = {"sampler": "on_policy", "sampler_options": {"refresh_steps": 2}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sft": ({"objective": "sft"}, {}),
    "tb": ({"objective": "tb"}, {"num_trajectories": 4}),
    "tb-mean": ({"objective": "tb", "reduction": "mean", "fusion": "weighted"}, {}),
    "tb-sum": ({"objective": "tb", "reduction": "sum", "gfn_weight": 0.1}, {}),
    "db-mean": ({"objective": "db", "reduction": "mean", "forward_looking": True}, {}),
    "dpo": ({"objective": "dpo", "sft_weight": 0.5}, {"num_trajectories": 2}),
    "ipa": ({"objective": "ipa"}, {"num_trajectories": 4, **ON_POLICY}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_taken_in_four_parts_is_the_same_step(case: str, tmp_path: Path) -> None:
    """Also the last one of the epoch, whose second part is short and whose others are missing; the
    start of log Z and log F; and every number that is logged."""
    settings, options = CASES[case]
    whole, parted = (course(tmp_path, parts, settings, options) for parts in (1, 4))
    assert len(whole[0]) == len(parted[0]) == 2
    for one, other in zip(whole[0], parted[0], strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"seconds", "cpu_seconds", "tokens_per_second", "epoch"}:
            near = 5e-3 if name == "preference_accuracy" else 1e-5  # a margin of 0 is rounding
            assert other[name] == pytest.approx(one[name], rel=2e-4, abs=near), name
    for name, value in whole[1].items():
        torch.testing.assert_close(parted[1][name], value, rtol=1e-4, atol=1e-6)


def test_parts_add_up_to_the_global_batch() -> None:
    """Three prompts with 5 pairs here and one with 3 pairs elsewhere, of two processes."""
    here, there = [Count(2, 4), Count(1, 1)], [Count(1, 3), Count(0, 0)]
    total = Count(4, 8)
    parts = [parts_of(counts, total, processes=2, is_sum=False) for counts in (here, there)]
    # The trainer divides by 2 micro-batches, DDP by 2 processes.
    nll = sum(part.loss_scale for row in parts for part in row) / 4
    assert nll == 1.0
    flow = [part.loss_scale * part.flow_share / 4 for row in parts for part in row]
    assert flow == [4 / 8, 1 / 8, 3 / 8, 0.0]
    assert sum(part.prompts for row in parts for part in row) == 1.0
    summed = parts_of(there, total, processes=2, is_sum=True)
    assert summed == [Part(4.0, 1.0, 0.25), Part(0.0, 1.0, 0.0)]


def test_a_process_without_a_prompt_of_its_own_counts_nothing() -> None:
    """13 examples in joint batches of 8: five are left for eight processes."""
    order = LengthBucketSampler(torch.arange(13).numpy(), 8, seed=0)
    last = [list(ProcessBatches(order, 1, rank=r, processes=8))[-1] for r in range(8)]
    assert [batch[0][1] for batch in last] == [5] * 8
    assert [batch[0][0] for batch in last[5:]] == [batch[0][0] for batch in last[:3]]


def test_a_lent_prompt_adds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the sixth of eight processes, of which five have a prompt."""
    args = make_args(tmp_path, per_device_train_batch_size=1)
    trainer = make_trainer(args, make_model(objective="sft"))
    batch = trainer.data_collator([{**shop().train[3], "joint": 5}])
    monkeypatch.setattr(type(args), "world_size", 8)
    for rank, expected in ((4, 8 / 5), (5, 0.0)):
        monkeypatch.setattr(type(args), "process_index", rank)
        plain = trainer.model(**trainer._flow_of(trainer._prepare_inputs(batch))[0])["loss"]
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
        assert loss.item() == pytest.approx(expected * plain.item())


def test_histograms_of_parts_add_up() -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    values[7] = torch.nan
    values[8], values[9] = 0.0, 1.0
    together = histogram(values)
    assert int(together.sum()) == 49
    assert torch.equal(histogram(values[:20]) + histogram(values[20:]), together)
    assert together[0] >= 1
    assert together[-1] >= 1
