"""Batches of prompts: collation, and an order in which batches hold prompts of similar length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..data import pad_histories
from ..integers import integer_array
from ..models.prompts import TIGER_PROMPT, PromptLayout, prompt_tokens

__all__ = ["JointExamples", "LengthBucketSampler", "ProcessBatches", "PromptCollator"]


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
        ``example``, ``user``, ``target`` and ``behaviour`` [B]; and ``joint`` [B] of
        :class:`JointExamples`."""
        histories = pad_histories(
            [example["history"] for example in examples], max_length=self.max_history
        )
        input_ids, attention_mask = prompt_tokens(histories, self.item_tokens, self.layout)
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "histories": histories,
        }
        for name in ("example", "user", "target", "behaviour", "joint"):
            if name in examples[0]:
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
        self.chunk_batches = chunk_batches
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
        size = self.batch_size * self.chunk_batches
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
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


class JointExamples(Dataset[dict[str, Any]]):
    """Examples that know how many prompts all processes take together beside them.

    Args:
        examples: of a split.
    """

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        """The example, and ``joint``, of an index and the size of its joint batch."""
        index, joint = place
        return {**self.examples[index], "joint": joint}


class ProcessBatches(Sampler[list[tuple[int, int]]]):
    """The batches of one process: its part of every batch that all processes take together.

    Whatever their number, the processes together take the same examples in the same steps. Only the
    last of the joint batches may be short; it is dealt out evenly, and if it has fewer examples
    than there are processes, those without one of their own are lent another's, which there must
    count nothing: a collective step needs them all.

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

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Batches of examples, each with the number of examples in the joint batch."""
        examples = iter(self.order)
        while joint := list(itertools.islice(examples, self.joint_size)):
            size = len(joint)
            if size < self.processes:
                mine = [joint[self.rank % size]]
            else:
                places = (size * rank // self.processes for rank in (self.rank, self.rank + 1))
                mine = joint[slice(*places)]
            yield [(example, size) for example in mine]
