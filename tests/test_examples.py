"""The examples run as their comments say, or, where that takes hours, are at least well formed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_losses_in_a_loop_of_ones_own_reach_the_rewards() -> None:
    command = [sys.executable, str(EXAMPLES / "custom_trainer.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    left = [float(found) for found in re.findall(r"distance ([0-9.]+)", done.stdout)]
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.15


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_configurations_are_well_formed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gflowgr.pipeline import RunConfig

    for name in ("GFLOWGR_DATA", "GFLOWGR_MODEL"):
        monkeypatch.setenv(name, "/somewhere")
    assert RunConfig.load(path).output_dir
