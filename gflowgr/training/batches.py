"""Batches of prompts: collation, and an order in which batches hold prompts of similar length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ..data import pad_histories
from ..integers import integer_array
from ..models.prompts import TIGER_PROMPT, PromptLayout, prompt_tokens

__all__ = ["LengthBucketSampler", "ProcessBatches", "PromptCollator"]


class PromptCollator:
    """Turns training examples into a batch of prompts.

    Args:
        item_tokens: identifiers of all items [items, L], right-padded with -1 (on the CPU).
        max_history: items of a history that the prompt keeps.
        layout: what stands around them.
    """

    def __init__(
        self, item_tokens: Tensor, max_history: int, layout: PromptLayout = TIGER_PROMPT
    ) -> None:
        self.item_tokens = item_tokens
        self.max_history = max_history
        self.layout = layout

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` [B, S], ``histories`` [B, H], and per example
        ``example``, ``user``, ``target`` and ``behaviour`` [B]."""
        histories = pad_histories(
            [example["history"] for example in examples], max_length=self.max_history
        )
        input_ids, attention_mask = prompt_tokens(histories, self.item_tokens, self.layout)
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "histories": histories,
        }
        for name in ("example", "user", "target", "behaviour"):
            values = integer_array([example[name] for example in examples], name)
            batch[name] = torch.from_numpy(values)
        return batch


class LengthBucketSampler(Sampler[int]):
    """A random order in which neighbouring examples have similar lengths.

    Examples are shuffled, cut into chunks of ``chunk_batches`` batches, sorted by length within
    each chunk, and all batches are shuffled. The order depends on ``seed`` and ``epoch`` only,
    so that a resumed run sees the batches it would have seen.

    Args:
        lengths: length of each example [E].
        batch_size: examples per optimiser step, of all processes and accumulation steps together.
        seed: seeds the order.
        chunk_batches: batches per chunk; more means less padding and less mixing.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.integer],
        batch_size: int,
        *,
        seed: int,
        chunk_batches: int = 64,
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.chunk = batch_size * chunk_batches
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        batches: list[npt.NDArray[np.intp]] = []
        for start in range(0, len(order), self.chunk):
            chunk = order[start : start + self.chunk]
            chunk = chunk[np.argsort(self.lengths[chunk], kind="stable")]
            batches.extend(
                chunk[first : first + self.batch_size]
                for first in range(0, len(chunk), self.batch_size)
            )
        # Only the very last batch of an epoch may be short.
        full = [batch for batch in batches if len(batch) == self.batch_size]
        short = [batch for batch in batches if len(batch) < self.batch_size]
        for place in rng.permutation(len(full)):
            yield from full[place].tolist()
        for batch in short:
            yield from batch.tolist()


class ProcessBatches(Sampler[list[int]]):
    """The batches of one process: its part of every batch that all processes take together.

    Whatever their number, the processes together take the same examples in the same steps. Only the
    last of the joint batches may be short; it is dealt out evenly, and if it has fewer examples
    than there are processes, some of them occur twice.

    Args:
        order: of the examples.
        batch_size: examples per batch of one process.
        rank: of this process.
        processes: how many there are.
    """

    def __init__(
        self, order: LengthBucketSampler, batch_size: int, *, rank: int = 0, processes: int = 1
    ) -> None:
        self.order = order
        self.batch_size = batch_size
        self.rank, self.processes = rank, processes

    @property
    def joint_size(self) -> int:
        """Examples that all processes take together."""
        return self.batch_size * self.processes

    def __len__(self) -> int:
        return -(-len(self.order) // self.joint_size)

    def __iter__(self) -> Iterator[list[int]]:
        examples = iter(self.order)
        while joint := list(itertools.islice(examples, self.joint_size)):
            if len(joint) < self.processes:
                yield [joint[self.rank % len(joint)]]
                continue
            places = (len(joint) * rank // self.processes for rank in (self.rank, self.rank + 1))
            yield joint[slice(*places)]
