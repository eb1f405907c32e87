"""Runs the ``interpreted*.py`` files of tests/ops and tests/tree in Triton's interpreter.

In a process of their own: whether Triton interprets or compiles is settled when it is imported.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gflowgr import backends

pytestmark = pytest.mark.process

TESTS = Path(__file__).parents[1]
FILES = sorted([*TESTS.glob("ops/*/interpreted*.py"), *TESTS.glob("tree/interpreted*.py")])


def test_under_the_interpreter() -> None:
    """All files in one process, whose start takes a good part of a file's time."""
    if backends.triton_missing() is not None:
        pytest.skip(f"triton: {backends.triton_missing()}")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *map(str, FILES)],
        cwd=TESTS.parent,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    for file in FILES:
        assert re.search(rf"{file.relative_to(TESTS)}::.* PASSED", done.stdout), (file, done.stdout)
    assert "skipped" not in done.stdout, done.stdout
