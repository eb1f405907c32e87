"""Item sequences packed into rows, so that batches of any mixture of lengths hold no padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from gflowgr.data import Ragged


def cut_windows(sequences: Ragged, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut sequences, from their ends, into windows of at most ``max_length`` + 1 items.

    Neighbouring windows share one item, so each of the n - 1 transitions of a sequence of n items
    is in exactly one window.

    Args:
        sequences: items of each user, oldest first.
        max_length: most transitions of a window.

    Returns:
        Of each window, int64: where its first item is among ``sequences.values``, the number of its
        transitions (its items - 1), and its sequence.

    Raises:
        ValueError: no sequence has two items.
    """
    transitions = np.maximum(sequences.lengths - 1, 0)
    if transitions.sum() == 0:
        raise ValueError("sequences must hold at least one sequence of two items; got none")
    pieces = -(-transitions // max_length)
    owner = np.repeat(np.arange(len(sequences)), pieces)
    piece = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    last = sequences.offsets[owner + 1] - 1 - piece * max_length
    begin = np.maximum(sequences.offsets[owner], last - max_length)
    return begin, last - begin, owner


class PackedSequences(Dataset[dict[str, torch.Tensor]]):
    """Next-item prediction over all positions of all sequences.

    Sequences are cut into windows by :func:`cut_windows`. Indexing takes an array of window numbers
    and returns one batch.

    Args:
        sequences: items of each user, oldest first.
        max_length: the model's longest input.

    Raises:
        ValueError: no sequence has two items.
    """

    def __init__(self, sequences: Ragged, max_length: int) -> None:
        self.items = sequences.values
        self.max_length = max_length
        self._begin, self._length, _ = cut_windows(sequences, max_length)

    def __len__(self) -> int:
        return len(self._begin)

    @property
    def num_predictions(self) -> int:
        """Transitions predicted in one epoch."""
        return int(self._length.sum())

    def __getitem__(self, windows: np.ndarray) -> dict[str, torch.Tensor]:
        """The batch of ``windows`` [S]: the arguments of :meth:`SASRec.forward`, int64 [R, L]."""
        lengths = self._length[windows]
        order = np.argsort(-lengths, kind="stable")
        windows, lengths = windows[order], lengths[order]
        width = int(lengths[0])
        rows, columns = _first_fit(lengths.tolist(), width)
        row_of, begin_at = np.asarray(rows), np.asarray(columns)
        place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        at = (np.repeat(row_of, lengths), np.repeat(begin_at, lengths) + place)
        source = np.repeat(self._begin[windows], lengths) + place
        shape = (int(row_of.max()) + 1, width)
        batch = {name: np.full(shape, -1, np.int64) for name in ("items", "segments", "targets")}
        batch["positions"] = np.zeros(shape, np.int64)
        batch["items"][at] = self.items[source]
        batch["targets"][at] = self.items[source + 1]
        batch["segments"][at] = np.repeat(np.arange(len(windows)), lengths)
        batch["positions"][at] = place
        return {name: torch.from_numpy(values) for name, values in batch.items()}


def _first_fit(lengths: list[int], width: int) -> tuple[list[int], list[int]]:
    """Row and first column of each length (falling), the first row with room each time."""
    used: list[int] = []
    # Lengths fall, so a row too full for one length may still take a later, shorter one; rows
    # without any room left are skipped by moving ``first``.
    rows, columns, first = [], [], 0
    for length in lengths:
        while first < len(used) and used[first] == width:
            first += 1
        for row in range(first, len(used)):
            if used[row] + length <= width:
                break
        else:
            row = len(used)
            used.append(0)
        rows.append(row)
        columns.append(used[row])
        used[row] += length
    return rows, columns


class EpochBatches(Sampler[np.ndarray]):
    """Random batches of window numbers, a function of seed and epoch only.

    Each of ``world_size`` processes takes every ``world_size``-th batch; the last batches are
    repeated from the start where they do not divide evenly.
    """

    def __init__(
        self, num_windows: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_windows, self.batch_size, self.seed = num_windows, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.num_windows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[np.ndarray]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_windows)
        needed = len(self) * self.batch_size * self.world_size
        if self.world_size > 1:
            order = np.resize(order, needed)
        for start in range(self.rank * self.batch_size, needed, self.batch_size * self.world_size):
            yield order[start : start + self.batch_size]


class PackedLoader(DataLoader[dict[str, torch.Tensor]]):
    """A loader that yields whole batches and lets the trainer choose the epoch's order."""

    def __init__(self, dataset: PackedSequences, batches: EpochBatches, pin_memory: bool) -> None:
        super().__init__(dataset, batch_size=None, sampler=batches, pin_memory=pin_memory)
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.batches.epoch = epoch
