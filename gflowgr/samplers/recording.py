"""The items that a run was trained on, in a file, and a sampler that takes them from there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import files
from ..errors import DataError
from .base import Candidates, SampleRequest, State, TrajectorySampler, TrajectorySet
from .pool import CandidatePool

__all__ = ["RecordingSampler", "ReplayedSampler"]

_FORMAT = "gflowgr-trajectories"
_VERSION = 1


def _row_type(num_trajectories: int) -> np.dtype[np.void]:
    return np.dtype(
        [
            ("epoch", "<i4"),
            ("example", "<i8"),
            ("items", "<i4", (num_trajectories,)),
            ("behaviours", "i1", (num_trajectories,)),
            ("log_proposal", "<f4", (num_trajectories,)),
        ]
    )


class RecordingSampler(TrajectorySampler):
    """Another sampler, whose sets are written down as they are made.

    A log of rows of one size: it only ever grows, one file per process. Of a run that was killed
    the last, incomplete row is ignored; what a resumed run samples again is written again, and the
    last row of an (epoch, example) counts.

    Args:
        inner: the other sampler.
        folder: where to; a recording that is there already is continued.

    Raises:
        OutputError: it cannot be written.
        ValueError: a recording with another number of trajectories is there.
    """

    def __init__(self, inner: TrajectorySampler, folder: str | Path) -> None:
        super().__init__(inner.pool, inner.num_trajectories)
        self.inner = inner
        self.needs_scores = inner.needs_scores
        self._type = _row_type(inner.num_trajectories)
        folder = files.ensure_writable(folder)
        description = folder / "recording.json"
        if description.is_file():
            there = files.read_json(description, expect=dict).get("num_trajectories")
            if there != inner.num_trajectories:
                raise ValueError(
                    f"record: {folder} holds a recording with num_trajectories {there}, not "
                    f"{inner.num_trajectories}; choose another folder"
                )
        else:
            values = {"format": _FORMAT, "version": _VERSION}
            files.write_json(description, {**values, "num_trajectories": inner.num_trajectories})
        distributed = torch.distributed
        several = distributed.is_available() and distributed.is_initialized()
        self._file = folder / f"items.{distributed.get_rank() if several else 0}.bin"
        if self._file.is_file():
            whole = self._file.stat().st_size // self._type.itemsize * self._type.itemsize
            with open(self._file, "r+b") as handle:
                handle.truncate(whole)

    def candidates(self, request: SampleRequest) -> Candidates:
        """Those of the other sampler."""
        return self.inner.candidates(request)

    def sample(self, request: SampleRequest) -> TrajectorySet:
        """The other sampler's set, written down."""
        chosen = self.inner.sample(request)
        rows = np.empty(len(chosen.items), self._type)
        rows["epoch"] = request.epoch
        rows["example"] = request.examples
        rows["items"] = chosen.items
        rows["behaviours"] = chosen.behaviours
        rows["log_proposal"] = np.nan if chosen.log_proposal is None else chosen.log_proposal
        with open(self._file, "ab") as handle:
            handle.write(rows.tobytes())
        return chosen

    def observe(self, request: SampleRequest, chosen: TrajectorySet, log_reward: Tensor) -> None:
        """The other sampler learns the rewards."""
        self.inner.observe(request, chosen, log_reward)

    def state_dict(self) -> State:
        """The other sampler's state."""
        return self.inner.state_dict()

    def load_state_dict(self, state: State) -> None:
        """See :class:`TrajectorySampler`."""
        self.inner.load_state_dict(state)


class ReplayedSampler(TrajectorySampler):
    """The sets of a recording, by epoch and example; the rules are applied to them again.

    Args:
        pool: over the same data.
        num_trajectories: N, as recorded.
        folder: what :class:`RecordingSampler` wrote.

    Raises:
        DataError: the folder is no recording, or one with another N.
    """

    def __init__(self, pool: CandidatePool, num_trajectories: int, folder: str | Path) -> None:
        super().__init__(pool, num_trajectories)
        self.folder = Path(folder)
        description = self.folder / "recording.json"
        if not description.is_file():
            raise DataError(f"{folder} is not a recording: it has no recording.json")
        about = files.read_json(description, expect=dict)
        expected = {
            "format": _FORMAT, "version": _VERSION, "num_trajectories": num_trajectories
        }  # fmt: skip
        if about != expected:
            raise DataError(f"{description}: found {about}, expected {expected}")
        row_type = _row_type(num_trajectories)
        parts = []
        for path in sorted(self.folder.glob("items.*.bin")):
            whole = path.stat().st_size // row_type.itemsize
            parts.append(np.fromfile(path, row_type, count=whole))
        rows = np.concatenate([np.empty(0, row_type), *parts])
        order = np.lexsort((np.arange(len(rows)), rows["example"], rows["epoch"]))
        rows = rows[order]
        same = (np.diff(rows["epoch"]) == 0) & (np.diff(rows["example"]) == 0)
        self._rows = rows[np.append(~same, True)] if len(rows) else rows

    def _find(self, request: SampleRequest) -> npt.NDArray[np.void]:
        begin, end = np.searchsorted(self._rows["epoch"], [request.epoch, request.epoch + 1])
        part = self._rows[begin:end]
        places = np.searchsorted(part["example"], request.examples)
        found = places < len(part)
        if len(part):
            found &= part["example"][np.minimum(places, len(part) - 1)] == request.examples
        if not found.all():
            raise ValueError(
                f"{self.folder} holds no trajectories of example "
                f"{request.examples[~found][0]} in epoch {request.epoch}"
            )
        rows: npt.NDArray[np.void] = part[places]
        other = rows["items"][:, 0] != request.targets
        if other.any():
            raise ValueError(
                f"{self.folder} is of other data: the positive of example "
                f"{request.examples[other][0]} is item {rows['items'][other][0, 0]} there, and "
                f"{request.targets[other][0]} here"
            )
        return rows

    def candidates(self, request: SampleRequest) -> Candidates:
        """The recorded items."""
        rows = self._find(request)
        return Candidates(
            rows["items"][:, 1:].astype(np.int64),
            rows["behaviours"][:, 1:].astype(np.int64),
            rows["log_proposal"][:, 1:].astype(np.float32),
        )
