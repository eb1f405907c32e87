"""A data set small enough to check by hand."""

from __future__ import annotations

import numpy as np

from gflowgr.data import Dataset, LeaveOneOut, Ragged

SEQUENCES = [
    [0, 1, 2, 3],  # valid 2, test 3
    [4, 5, 6, 0],  # valid 6, test 0
    [7, 7, 1, 7],  # valid 1, test 7 (seen before)
    [2, 5],  # too short: trains only
    [6, 0, 4, 2, 5],  # valid 2, test 5
]


def tiny_split() -> LeaveOneOut:
    """Four evaluated users, eight items, histories of at most two items."""
    dataset = Dataset(
        name="tiny",
        user_ids=[f"u{i}" for i in range(len(SEQUENCES))],
        sequences=Ragged.from_lists(SEQUENCES),
        num_items=8,
        texts=[{"title": f"Item *{i}* | blue"} for i in range(8)],
        truth=np.arange(40, dtype=np.float16).reshape(5, 8) / 10,
    )
    return LeaveOneOut(dataset, max_history=2)
