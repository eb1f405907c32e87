"""What all tests share: the real data folder, one CPU thread, reproducible property tests.

In the emulator's process (tests/cuda/test_emulated.py) the emulated kernels are loaded here.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from support import emulation

ONE_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

if emulation.LIBRARY_VARIABLE in os.environ:
    emulation.load_library(os.environ[emulation.LIBRARY_VARIABLE])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests that start processes take longest and come first."""
    long = {item.path for item in items if item.get_closest_marker("process")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors are fastest, and sums reproducible, on one thread."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run, carried out once by the command line without interruption."""
    from support.tiny_run import tiny_run, write_config

    from gflowgr.cli import main

    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder / "run.yaml", tiny_run(folder / "run"))
    assert main(["train", "--config", str(config), "--no-progress"]) == 0
    return folder / "run"


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture of a report is one pixel; figures are made, but not laid out and drawn.

    Fixtures of a larger scope, such as ``finished_run``, come first and draw theirs.
    """
    from gflowgr.report import plots

    def save(figure: object, path: Path) -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ONE_PIXEL)
        return True

    monkeypatch.setattr(plots, "save", save)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of real data sets: $GFLOWGR_DATA, or ``shared/data`` beside the repository."""
    given = os.environ.get("GFLOWGR_DATA")
    root = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (root / "Beauty" / "inter.json.gz").is_file():
        pytest.skip(f"no real data: {root} has no Beauty/inter.json.gz (set GFLOWGR_DATA)")
    return root
