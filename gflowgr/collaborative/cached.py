"""A collaborative model's scores of all training examples, in a memory-mapped file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from gflowgr import files
from gflowgr.collaborative.base import CollaborativeModel
from gflowgr.data import TrainingExamples, pad_histories
from gflowgr.errors import DataError

_BATCH = 512
_PROBE = 64
_TINY = 1e-6


class CachedScores:
    """Scores of the whole catalogue for each training example, standardised, in half precision.

    For slow models: each example is scored once and not once an epoch. All users of the scores
    sort or standardise them, so each row is kept with mean 0 and variance 1 (all 0
    where all scores are equal), which half precision holds to 3 digits whatever the model's scale.

    The file is valid for the same examples and a model with the same scores of the first 64;
    otherwise, or if it is incomplete, it is written anew.

    Args:
        model: the collaborative model.
        examples: the training examples.
        folder: where the file (``scores.npy``) is or will be.
        max_history: items of a history that the model is given.
        max_bytes: largest file, ``2 * examples * items`` bytes.
        progress: show a progress bar while scoring.

    Raises:
        ValueError: the file would be too large, or a score is NaN or infinite.
        OutputError: the file cannot be written.
    """

    def __init__(
        self,
        model: CollaborativeModel,
        examples: TrainingExamples,
        folder: str | Path,
        *,
        max_history: int,
        max_bytes: float,
        progress: bool = True,
    ) -> None:
        size = 2 * len(examples) * model.num_items
        if size > max_bytes:
            raise ValueError(
                f"the scores of {len(examples):,} examples and {model.num_items:,} items take "
                f"{size / 2**30:.2f} GiB, more than the {max_bytes / 2**30:.2f} GiB allowed; allow "
                "more, or none to compute them in each step"
            )
        self._model, self._examples, self._max_history = model, examples, max_history
        self._path = Path(folder) / "scores.npy"
        description = Path(folder) / "scores.json"
        digest = self._digest()
        stored = self._stored() if _describes(description, digest) else None
        if stored is None:
            files.ensure_writable(folder, min_free_bytes=size + 2**20)
            description.unlink(missing_ok=True)
            self._write(progress)
            files.write_json(description, {"digest": digest})
            stored = files.load_npy(self._path, mmap=True)
        self._rows = stored

    def _stored(self) -> np.ndarray | None:
        """The scores in the file, if it is complete."""
        try:
            rows = files.load_npy(self._path, mmap=True)
        except (FileNotFoundError, DataError):
            return None
        whole = (rows.shape, rows.dtype) == (
            (len(self._examples), self._model.num_items),
            np.float16,
        )
        return rows if whole else None

    def rows(self, examples: torch.Tensor) -> torch.Tensor:
        """Standardised scores [B, items] of examples [B], float32, on the host."""
        return torch.from_numpy(np.asarray(self._rows[examples.numpy()], dtype=np.float32))

    def _score(self, begin: int, end: int) -> np.ndarray:
        histories = [self._examples[index]["history"] for index in range(begin, end)]
        padded = pad_histories(histories, max_length=self._max_history)
        with torch.no_grad():
            scores = self._model.score(padded, None).float()
        if not bool(torch.isfinite(scores).all()):
            row = begin + int((~torch.isfinite(scores)).any(1).nonzero()[0])
            raise ValueError(f"the collaborative model's scores of example {row} are not finite")
        std, mean = torch.std_mean(scores, dim=1, keepdim=True, correction=0)
        return ((scores - mean) / std.clamp_min(_TINY)).half().cpu().numpy()

    def _digest(self) -> str:
        digest = hashlib.sha256()
        facts = [len(self._examples), self._model.num_items, self._max_history]
        probe = self._score(0, min(_PROBE, len(self._examples)))
        for values in (np.array(facts), self._examples.items, self._examples.bounds, probe):
            digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()

    def _write(self, progress: bool) -> None:
        from tqdm.auto import tqdm

        count = len(self._examples)
        with files.atomic_path(self._path) as temporary:
            table = np.lib.format.open_memmap(
                temporary, mode="w+", dtype=np.float16, shape=(count, self._model.num_items)
            )
            steps = range(0, count, _BATCH)
            for begin in tqdm(steps, "collaborative scores", disable=not progress):
                end = min(begin + _BATCH, count)
                table[begin:end] = self._score(begin, end)
            table.flush()
            del table


def _describes(path: Path, digest: str) -> bool:
    try:
        return bool(files.read_json(path, expect=dict).get("digest") == digest)
    except (FileNotFoundError, DataError):
        return False
