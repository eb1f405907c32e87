"""The scripts for a machine with a GPU: their syntax, their time, and a rehearsal on the CPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gflowgr.architectures import read_architectures

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "benchmarks").glob("gpu_*.sh"))
STEP = re.compile(r"^step (\w+) (\d+) ", re.MULTILINE)


@pytest.mark.process
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_the_script(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_step_has_a_timeout_and_all_fit_into_500_seconds() -> None:
    text = (ROOT / "benchmarks" / "gpu_fast.sh").read_text()
    steps = {name: int(seconds) for name, seconds in STEP.findall(text)}
    assert len(steps) == len(re.findall(r"^step ", text, re.MULTILINE))
    assert list(steps)[:4] == ["parts", "info", "smoke", "tests"]
    assert {"bench", "profile", "memcheck", "racecheck"} <= set(steps)
    # `timeout` waits 3 seconds more before it kills.
    assert sum(steps.values()) + 3 * len(steps) < 510
    assert sum(steps.values()) < 500


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.process
def test_a_rehearsal_on_the_cpu_does_every_step(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_fast.sh")],
        env={**os.environ, "GFLOWGR_GPU_REHEARSE": "1", "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    status = (tmp_path / "status.txt").read_text()
    assert done.returncode == 0, status + done.stdout[-4000:]
    text = (ROOT / "benchmarks" / "gpu_fast.sh").read_text()
    assert [line.split(":")[0] for line in status.splitlines()] == [
        n for n, _ in STEP.findall(text)
    ]
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {row["op"].split(".")[0] for row in rows} >= {"logprobs_dense", "search", "train_step"}
    assert "cases passed on cpu" in (tmp_path / "fast.log").read_text()
    assert "dense head" in (tmp_path / "profile.txt").read_text()
    assert len(list(tmp_path.iterdir())) <= 8  # what a lent machine brings back


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.process
def test_prepared_parts_hold_the_architecture_asked_for() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc was not found")
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_prepare.sh")],
        env={**os.environ, "GPU_ARCH": "90"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "not made: _C_cuda" not in done.stdout
    built = read_architectures(ROOT / "build" / "gpu" / "_C_cuda.abi3.so")
    assert list(map(str, built)) == ["sm_90"]
