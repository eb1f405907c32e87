"""Prompts without an observed target: random parts of the training sequences, and draws for them.

Exposure bias: a generator is trained at prompts that users had and at the prefixes of what they
chose. The collaborative model scores any history, so that its reward, and the exact flows that
follow from it, are known at prompts nobody had. Here these are random parts of what a user did
within the training part, and the prefixes are those of an item drawn from the reward itself.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import pad_histories
from ..models.prompts import PromptLayout
from ..models.sequences import sequence_prompts
from ..samplers.keyed_random import keyed_uniform

__all__ = ["augmented_batch", "draw_items", "random_positions", "sub_histories"]

# Streams of keyed draws beside those of the candidate pool, by other seeds.
_WINDOWS, _ITEMS, _DRAWS, _POSITIONS = range(4)
_STREAMS = 4
_SEED = 0x5E9
_KEEP = 0.5  # of a window's items


def _uniform(seed: int, epoch: int, stream: int, examples: Tensor, columns: int) -> np.ndarray:
    key = epoch * _STREAMS + stream
    return keyed_uniform(seed ^ (_SEED << 32), key, examples.numpy(), columns)


def sub_histories(
    items: Tensor, examples: Tensor, share: float, *, seed: int, epoch: int
) -> tuple[Tensor, list[np.ndarray]]:
    """A random part of the items of a share of the windows.

    Each item is kept with probability 1/2, at least one, and at most all but one, so that the part
    and its target fit where the window did. The same for the same seed, epoch and example.

    Args:
        items: windows [W, P + 1], left-aligned, -1 for padding.
        examples: numbers of the windows [W].
        share: probability of each window to have one.
        seed: of the run.
        epoch: other parts each epoch.

    Returns:
        Which windows, int64 [W'], and the kept items of each, oldest first.
    """
    chosen = _uniform(seed, epoch, _WINDOWS, examples, 1)[:, 0] < share
    kept = _uniform(seed, epoch, _ITEMS, examples, items.shape[1]) < _KEEP
    windows = np.flatnonzero(chosen)
    parts = []
    for window in windows:
        row = items[window].numpy()
        row, mine = row[row >= 0], kept[window][: int((items[window] >= 0).sum())].copy()
        if not mine.any():
            mine[-1] = True
        if mine.all():
            mine[0] = False
        parts.append(row[mine])
    return torch.from_numpy(windows), parts


def augmented_batch(
    batch: dict[str, Tensor],
    item_tokens: Tensor,
    layout: PromptLayout,
    share: float,
    *,
    seed: int,
    epoch: int,
) -> dict[str, Tensor]:
    """A batch of windows with the parts of :func:`sub_histories` as further rows.

    Every prefix of a part is a prompt; what stands after the last one is only there so that the row
    goes on, and no more a target than the other items are.

    Args:
        batch: of :class:`~gflowgr.training.sequences.SequenceCollator`.
        item_tokens: identifiers of all items [items, L], on the CPU.
        layout: of prompts.
        share: see :func:`sub_histories`.
        seed, epoch: see there.

    Returns:
        The fields that change, and ``observed`` [T'], false for the new prompts, ``prompts``, how
        many there are in all, and ``augmented`` [W'], the windows' examples.
    """
    windows, parts = sub_histories(batch["items"], batch["example"], share, seed=seed, epoch=epoch)
    if len(windows) == 0:
        return {}
    items = pad_histories([np.append(part, part[0]) for part in parts])
    further = sequence_prompts(items, item_tokens, layout)._asdict()
    further |= {"items": items, "behaviours": torch.full_like(items[:, 1:], -1)}
    padding = {"input_ids": layout.pad_token, "items": -1, "behaviours": -1}
    joined = {}
    for name, rows in further.items():
        width = max(rows.shape[1], batch[name].shape[1])
        both = []
        for part in (batch[name], rows):
            beyond = (0, 0) * (part.dim() - 2) + (0, width - part.shape[1])
            both.append(F.pad(part, beyond, value=padding.get(name, 0)))
        joined[name] = torch.cat(both)
    targets = int(batch["targets"])
    count = targets + sum(len(part) for part in parts)
    return joined | {
        "user": torch.cat([batch["user"], batch["user"][windows]]),
        "observed": torch.arange(count) < targets,
        "prompts": torch.tensor(count),
        "augmented": batch["example"][windows],
    }


def draw_items(
    log_reward: Tensor, examples: Tensor, valid: Tensor, *, seed: int, epoch: int
) -> Tensor:
    """An item for each prompt, drawn from its rewards.

    Args:
        log_reward: [A, items].
        examples: of the rows of prompts [W'].
        valid: true for the positions that are prompts [W', P]; A of them.
        seed, epoch: of the draws, which differ by row and position.

    Returns:
        int64 [A], on the device of the rewards.
    """
    uniform = torch.from_numpy(_uniform(seed, epoch, _DRAWS, examples, valid.shape[1]))
    total = log_reward.double().softmax(1).cumsum(1)
    points = uniform[valid].to(total.device)[:, None] * total[:, -1:]
    return torch.searchsorted(total, points, right=True)[:, 0].clamp_max(log_reward.shape[1] - 1)


def random_positions(
    valid: Tensor, examples: Tensor, count: int, *, seed: int, epoch: int
) -> Tensor:
    """At most ``count`` random ones of each row's valid positions, bool [W, P].

    Args:
        valid: bool [W, P].
        examples: numbers of the rows [W].
        count: most positions of a row.
        seed, epoch: of the choice.
    """
    order = torch.from_numpy(_uniform(seed, epoch, _POSITIONS, examples, valid.shape[1]))
    rank = order.masked_fill(~valid, 2.0).argsort(dim=1, stable=True).argsort(dim=1, stable=True)
    return valid & (rank < count)
