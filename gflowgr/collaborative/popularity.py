"""Popularity: every user gets the items that occur most often in the training part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gflowgr.collaborative.base import check_score_inputs, load_saved, save_model


class Popularity:
    """Scores an item by log(1 + its count), whatever the history.

    Args:
        counts: [num_items], how often each item occurs (for the published protocol: in the
            training part only, ``Split.item_counts``).

    Raises:
        ValueError: counts is not one-dimensional, or holds a negative or non-finite value.
    """

    KIND = "popularity"

    def __init__(self, counts: np.ndarray | torch.Tensor) -> None:
        counts = torch.as_tensor(counts)
        if counts.ndim != 1 or counts.numel() == 0:
            raise ValueError(
                f"counts must be one-dimensional and not empty; got shape {tuple(counts.shape)}"
            )
        values = counts.double()
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise ValueError("counts must be finite and not negative")
        self.counts = counts
        self.num_items = counts.numel()
        self._scores = values.log1p().float()

    def score(self, histories: torch.Tensor, items: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`gflowgr.collaborative.CollaborativeModel.score`."""
        check_score_inputs(histories, items, self.num_items)
        scores = self._scores.to(histories.device)
        if items is None:
            return scores.expand(histories.shape[0], -1)
        return scores[items.long()]

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each atomically."""
        save_model(folder, {"kind": self.KIND}, {"counts": self.counts})

    @classmethod
    def load(cls, folder: str | Path) -> Popularity:
        """Read what :meth:`save` wrote; DataError where it cannot be read."""
        return cls(load_saved(folder, cls.KIND)[1]["counts"])
