"""Two processes sample what one does, also from what both had sampled before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing as mp
from support.sampling_ranks import STEPS, run_rank, sample_part

pytestmark = pytest.mark.process


def test_two_processes_sample_what_one_does(tmp_path: Path) -> None:
    mp.start_processes(run_rank, args=(str(tmp_path), 2), nprocs=2, start_method="fork")
    parts = [np.load(tmp_path / f"{rank}.npy") for rank in range(2)]
    alone = sample_part(0, 1)
    for step in range(STEPS):
        together = np.concatenate([part[step] for part in parts])
        assert together[together[:, 0].argsort()].tolist() == alone[step].tolist()
