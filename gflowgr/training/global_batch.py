"""Weights of micro-batches in an optimiser step: the step is independent of their division.

A step's global batch is the prompts of all gradient accumulation steps of all processes. The
trainer divides the sum of the micro-batches' losses by their number, and DDP and FSDP average
gradients over processes; so each loss, a mean over its own prompts (and trajectories, or pairs), is
scaled here such that what comes out is the mean over the global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Count", "Part", "count_of", "parts_of"]


@dataclass(frozen=True)
class Count:
    """A micro-batch's number of prompts, and of the things that the second loss term averages.

    Attributes:
        prompts: those with an observed target, over which the supervised term is a mean.
        terms: see above.
        read: prompts that the micro-batch's own losses are means over; None: ``prompts``.
    """

    prompts: float
    terms: float
    read: float | None = None


@dataclass(frozen=True)
class Part:
    """A micro-batch's place in the global batch.

    Attributes:
        loss_scale: multiplies its loss.
        flow_share: multiplies the second term within it: the flow loss, or the preference.
        prompts: its share of the global batch's prompts; all shares together are 1.
    """

    loss_scale: float
    flow_share: float
    prompts: float


def count_of(batch: Mapping[str, Any], *, rank: int, processes: int) -> tuple[Count, int]:
    """A micro-batch's count, and how many examples all processes take together beside it.

    Args:
        batch: as it was collated.
        rank: of this process.
        processes: how many there are.
    """
    size = len(batch["example"])
    together = int(batch["joint"][0]) if "joint" in batch else size * processes
    # With fewer prompts than processes, the last of these have none of their own.
    own = size if rank < together else 0
    if "targets" in batch:  # of whole sequences, each of which has many prompts
        own = int(batch["targets"]) if own else 0
    if "prompts" not in batch:
        return Count(own, own), together
    read = int(batch["prompts"])  # with some that have no target
    return Count(own, read if own else 0, read), together


def parts_of(counts: list[Count], total: Count, *, processes: int, is_sum: bool) -> list[Part]:
    """The parts of one process's micro-batches.

    Args:
        counts: of its micro-batches.
        total: of the global batch.
        processes: how many there are, each with as many micro-batches.
        is_sum: whether losses are sums, not means.
    """
    number = float(len(counts) * processes)
    parts = []
    for mine in counts:
        prompts = mine.prompts / total.prompts
        if is_sum:
            # A stand-in batch repeats another process's prompts, so it must not count.
            parts.append(Part(number if mine.prompts else 0.0, 1.0, prompts))
            continue
        share = 1.0
        if mine.terms and mine.prompts:  # else there is nothing to share
            share = mine.terms / total.terms / prompts
        among = 1.0 if mine.read is None else mine.prompts / mine.read
        if not among:  # another process's prompts, which do not count
            parts.append(Part(0.0, 1.0, 0.0))
            continue
        parts.append(Part(prompts * number / among, share * among, prompts))
    return parts
