"""What all tests share: the real data folder, one CPU thread, reproducible property tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors are fastest, and sums reproducible, on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets: $GFLOWGR_DATA, or ``shared/data`` beside the repository."""
    given = os.environ.get("GFLOWGR_DATA")
    root = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (root / "Beauty" / "inter.json.gz").is_file():
        pytest.skip(f"no real data: {root} has no Beauty/inter.json.gz (set GFLOWGR_DATA)")
    return root
