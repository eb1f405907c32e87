"""Randomly damaged tree files neither crash nor hang the process, whatever is done with them.

``GFLOWGR_FUZZ_CASES=100000 python -m pytest tests/tree/test_fuzz.py`` looks longer (and with
``GFLOWGR_FUZZ_SEED`` elsewhere); a case is repeated alone by ``tests/support/tree_fuzz.py``.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = int(os.environ.get("GFLOWGR_FUZZ_CASES", "400"))
SEED = int(os.environ.get("GFLOWGR_FUZZ_SEED", "0"))
SCRIPT = Path(__file__).parents[1] / "support" / "tree_fuzz.py"


@pytest.mark.timeout(60 + CASES)
@pytest.mark.process
def test_damaged_files_are_refused_or_harmless() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(SEED), str(CASES)],
        capture_output=True,
        text=True,
        timeout=50 + CASES,
        check=False,
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"exit {done.returncode} at case {last}: {done.stderr[-2000:]}"
    outcomes = ast.literal_eval(last[0])
    assert sum(outcomes.values()) == CASES
    assert "refused without a name" not in outcomes
    # Most damage is found; some files are other, sound trees, and are used.
    assert outcomes["refused"] > CASES / 2
    assert outcomes["another tree"] > 0
