"""Batches of prompts: what is in them, and their order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gflowgr.models import EOS_TOKEN, PAD_TOKEN
from gflowgr.training.batches import LengthBucketSampler, ProcessBatches, PromptCollator

LENGTHS = np.random.default_rng(0).integers(1, 21, size=1003)


def order(*, seed: int = 1, epoch: int = 0, **options: int) -> list[int]:
    sampler = LengthBucketSampler(LENGTHS, 16, seed=seed, **options)
    sampler.set_epoch(epoch)
    return list(sampler)


def padding(indices: list[int] | np.ndarray) -> int:
    """Positions that batches of 16 spend on padding."""
    lengths = LENGTHS[np.asarray(indices)]
    batches = [lengths[start : start + 16] for start in range(0, len(lengths), 16)]
    return sum(int((batch.max() - batch).sum()) for batch in batches)


@pytest.mark.parametrize("chunk_batches", [1, 8, 64, 1000])
def test_every_example_comes_once(chunk_batches: int) -> None:
    assert sorted(order(chunk_batches=chunk_batches)) == list(range(1003))
    assert len(LengthBucketSampler(LENGTHS, 16, seed=1)) == 1003


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    sampler = LengthBucketSampler(LENGTHS, 16, seed=1)
    first = list(sampler)
    np.random.default_rng().random(3)
    torch.rand(3)
    assert list(sampler) == first == order()
    assert order(epoch=1) != first
    assert order(seed=2) != first
    sampler.set_epoch(1)
    assert list(sampler) == order(epoch=1)


def test_batches_hold_similar_lengths_in_random_order() -> None:
    shuffled = np.random.default_rng(1).permutation(1003)
    assert padding(order()) < 0.1 * padding(shuffled)
    firsts = LENGTHS[order()[::16]]
    assert 0.3 < (np.diff(firsts) > 0).mean() < 0.7  # neither ascending nor descending


def test_only_the_last_batch_is_short() -> None:
    """A batch of 11 in the middle would shift all batches after it off their buckets."""
    indices = order(chunk_batches=4)
    spread = [np.ptp(LENGTHS[indices[start : start + 16]]) for start in range(0, 1003, 16)]
    chunk_sorted_spread = max(spread[:-1])
    assert chunk_sorted_spread <= 8
    assert len(indices) % 16 == 11


@pytest.mark.parametrize("processes", [1, 2, 4, 16])
def test_processes_together_take_the_same_batches(processes: int) -> None:
    """1,003 examples in joint batches of 16: the last one has 11, also for 16 processes."""
    order = LengthBucketSampler(LENGTHS, 16, seed=1)
    parts = [
        list(ProcessBatches(order, 16 // processes, rank=rank, processes=processes))
        for rank in range(processes)
    ]
    alone = list(order)
    assert {len(part) for part in parts} == {len(ProcessBatches(order, 16))} == {63}
    for step, together in enumerate(zip(*parts, strict=True)):
        joined = [example for batch in together for example, _ in batch]
        sizes = {size for batch in together for _, size in batch}
        assert sizes == {11 if step == 62 else 16}
        assert min(len(batch) for batch in together) >= 1
        if processes == 16 and step == 62:
            assert joined == alone[-11:] + alone[-11:-6]
        else:
            assert joined == alone[step * 16 : step * 16 + 16]


def test_collated_prompts() -> None:
    item_tokens = torch.tensor([[2, 5], [3, 6], [4, -1]])  # item 2's identifier is shorter
    collator = PromptCollator(item_tokens, max_history=2)
    examples = [
        {"example": 7, "user": 1, "history": np.array([0, 1, 2]), "target": 1, "behaviour": -1},
        {"example": 9, "user": 0, "history": np.array([0]), "target": 2, "behaviour": 1},
    ]
    batch = collator(examples)
    assert batch["histories"].tolist() == [[1, 2], [0, -1]]
    assert batch["input_ids"].tolist() == [
        [3, 6, 4, EOS_TOKEN],
        [2, 5, EOS_TOKEN, PAD_TOKEN],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["example"].tolist() == [7, 9]
    assert batch["user"].tolist() == [1, 0]
    assert batch["target"].tolist() == [1, 2]
    assert batch["behaviour"].tolist() == [-1, 1]
    assert {values.dtype for values in batch.values()} == {torch.int64}
