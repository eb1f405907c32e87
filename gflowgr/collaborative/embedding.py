"""A scorer from a given table of item embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from gflowgr.collaborative.base import (
    check_score_inputs,
    load_saved,
    positions_to_score,
    save_model,
)
from gflowgr.errors import DataError
from gflowgr.files import load_npy
from gflowgr.transfer import to_device


class EmbeddingScorer:
    """Scores an item by the mean cosine similarity to the history's items.

    The mean of cosines equals one dot product with the mean of the normalised history vectors,
    which is how it is computed: O(d) per scored item. An empty history scores every item 0.

    Args:
        table: float [num_items, d], for example a published SASRec item table.

    Raises:
        ValueError: table is not a finite floating-point matrix.
    """

    KIND = "embedding"

    def __init__(self, table: np.ndarray | torch.Tensor) -> None:
        table = torch.as_tensor(table)
        if table.ndim != 2 or not table.is_floating_point() or table.numel() == 0:
            raise ValueError(
                "table must be a floating-point matrix [num_items, d]; "
                f"got {table.dtype} of shape {tuple(table.shape)}"
            )
        bad = (~torch.isfinite(table)).any(1)
        if bool(bad.any()):
            raise ValueError(f"table[{int(bad.nonzero()[0])}] holds a value that is not finite")
        self.item_embeddings = table.float()
        self.num_items = table.shape[0]
        self._unit = F.normalize(self.item_embeddings, dim=1)

    @classmethod
    def from_file(cls, path: str | Path) -> EmbeddingScorer:
        """Read a .npy table; DataError names the file when it is not one."""
        try:
            return cls(load_npy(path))
        except DataError:
            raise
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: {error}") from error

    def to(self, device: torch.device | str) -> EmbeddingScorer:
        """Move the table to a device, in place."""
        self.item_embeddings, self._unit = self.item_embeddings.to(device), self._unit.to(device)
        return self

    def score(self, histories: torch.Tensor, items: torch.Tensor | None = None) -> torch.Tensor:
        """See :meth:`gflowgr.collaborative.CollaborativeModel.score`."""
        lengths = check_score_inputs(histories, items, self.num_items)
        device = self._unit.device
        histories, lengths = to_device(histories.long(), device), to_device(lengths, device)
        real = (histories >= 0).unsqueeze(-1)
        vectors = self._unit[histories.clamp_min(0)] * real
        user = vectors.sum(1) / lengths.clamp_min(1).unsqueeze(1)
        if items is None:
            return user @ self._unit.t()
        return torch.einsum("bd,bmd->bm", user, self._unit[items.to(device).long()])

    def score_positions(
        self, histories: torch.Tensor, chosen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :func:`gflowgr.collaborative.score_positions`; running means of the history."""
        check_score_inputs(histories, None, self.num_items)
        where = to_device(positions_to_score(histories, chosen), self._unit.device)
        histories = to_device(histories.long(), self._unit.device)
        count = torch.arange(1, histories.shape[1] + 1, device=histories.device)
        means = self._unit[histories.clamp_min(0)].cumsum(1) / count[:, None]
        return means[where] @ self._unit.t()

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each atomically."""
        save_model(folder, {"kind": self.KIND}, {"table": self.item_embeddings})

    @classmethod
    def load(cls, folder: str | Path) -> EmbeddingScorer:
        """Read what :meth:`save` wrote; DataError where it cannot be read."""
        return cls(load_saved(folder, cls.KIND)[1]["table"])
