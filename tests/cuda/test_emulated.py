"""Runs the CUDA kernels on the CPU, in the emulator of emulate.h, without a GPU.

The kernel files themselves (``csrc/*/*.cu``) and their bindings are compiled by g++ with
AddressSanitizer and UndefinedBehaviorSanitizer, and ``FILES`` run in a process of their own (the
sanitizer must be loaded before everything else), where ``gflowgr_cuda`` takes CPU tensors.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import emulation

pytestmark = pytest.mark.process

HERE = Path(__file__).parent
TESTS = HERE.parent
FILES = [
    *sorted(TESTS.glob("ops/*/emulated.py")),
    TESTS / "tree" / "emulated_walk.py",
    TESTS / "ops" / "beam_step" / "test_beam_step_traps.py",
]
# Fresh memory is NaN; a leak report would be about Python's own allocations.
ASAN = "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824"


@pytest.fixture(scope="module")
def gxx() -> str:
    try:
        return emulation.compiler()
    except emulation.CannotEmulate as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def library(gxx: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulation.build_library(gxx, tmp_path_factory.mktemp("emulated"))


@pytest.mark.timeout(900)
def test_in_the_emulator(gxx: str, library: Path) -> None:
    """All files in one process, whose start takes a good part of a file's time."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *map(str, FILES)],
        cwd=HERE.parents[1],
        env={
            **os.environ,
            "LD_PRELOAD": emulation.preload(gxx),
            "ASAN_OPTIONS": ASAN,
            emulation.LIBRARY_VARIABLE: str(library),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    for file in FILES:
        assert re.search(rf"{file.relative_to(TESTS)}::.* PASSED", done.stdout), (file, done.stdout)
    assert "skipped" not in done.stdout, done.stdout


@pytest.fixture(scope="module")
def faults(gxx: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    (built,) = emulation.compile_all(gxx, [HERE / "faults.cpp"], folder, [])
    program = folder / "faults"
    subprocess.run([gxx, *emulation.SANITIZE, str(built), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("barrier_in_branch", "threads wait at different barriers"),
        ("barrier_after_return", "a barrier that some threads never reach"),
        ("shuffle_in_branch", "a barrier that some threads never reach|are at a barrier"),
        ("shuffle_after_return", "names lanes that have returned"),
        ("shared_out_of_bounds", "heap-buffer-overflow"),
        ("global_out_of_bounds", "heap-buffer-overflow"),
        ("misaligned_load", "misaligned address"),
    ],
)
def test_the_emulator_finds(fault: str, message: str, faults: Path) -> None:
    done = subprocess.run([str(faults), fault], capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr


def test_the_emulator_shows_a_missing_barrier(faults: Path) -> None:
    """The sum of a block is the same in every order, unless a barrier is missing."""
    sums = {
        name: {
            subprocess.run([str(faults), name, order], capture_output=True, text=True).stdout
            for order in ("0", "1", "7")
        }
        for name in ("sum", "sum_without_barrier")
    }
    assert sums["sum"] == {"496\n"}
    assert len(sums["sum_without_barrier"]) > 1
