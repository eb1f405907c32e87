"""Ragged histories stacked as one padded tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gflowgr.integers import integer_array


def pad_histories(
    histories: Sequence[np.ndarray], *, max_length: int | None = None
) -> torch.Tensor:
    """Stack ragged histories as int64 [B, H], left-aligned and padded with -1.

    H is the longest length (at least 1); with ``max_length`` only the last items are kept.

    Raises:
        ValueError: a history holds something else than integers that fit 64 bits.
    """
    if max_length is not None:
        histories = [history[-max_length:] for history in histories]
    lengths = np.fromiter((len(history) for history in histories), np.int64, len(histories))
    width = max(1, int(lengths.max(initial=1)))
    padded = np.full((len(histories), width), -1, np.int64)
    padded[np.arange(width) < lengths[:, None]] = (
        integer_array(np.concatenate(histories), "histories")
        if lengths.sum()
        else np.empty(0, np.int64)
    )
    return torch.from_numpy(padded)
