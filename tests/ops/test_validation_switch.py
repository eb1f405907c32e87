"""How the checks on values are switched off; those on types and shapes stay."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gflowgr import ops
from gflowgr.ops import checks

B, N, L = 2, 3, 4


def tb(log_reward: Tensor) -> Tensor:
    """The TB loss of log-probabilities -1 at log Z = 0."""
    return ops.tb_loss(-torch.ones(B, N, L), log_reward, torch.zeros(B))


def one_bad_reward() -> Tensor:
    """Zeros but for a NaN at [1, 2]."""
    log_reward = torch.zeros(B, N)
    log_reward[1, 2] = math.nan
    return log_reward


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Data checks off for one test."""
    with ops.validation(False):
        yield
    assert ops.validation_enabled()


def test_values_are_checked_by_default() -> None:
    assert ops.validation_enabled()


@pytest.mark.usefixtures("unchecked")
def test_without_data_checks_a_bad_reward_gives_nan_and_types_are_still_checked() -> None:
    assert not ops.validation_enabled()
    bad = one_bad_reward()
    assert tb(bad).isnan()
    with pytest.raises(ValueError, match="log_reward must have shape"):
        tb(torch.zeros(B))


@pytest.mark.usefixtures("unchecked")
def test_without_data_checks_no_condition_is_computed() -> None:
    def never() -> Tensor:
        raise AssertionError("computed")

    data = checks.DataChecks()
    data.add(never, lambda i: "")
    data.run()


def test_set_validation_returns_the_previous_setting() -> None:
    assert ops.set_validation(True) is True
    with pytest.raises(TypeError, match="enabled must be a bool, got 1"):
        ops.set_validation(1)  # type: ignore[arg-type]


def test_the_environment_switches_the_checks_off() -> None:
    script = "from gflowgr import ops; print(ops.validation_enabled())"
    shown = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "GFLOWGR_VALIDATE": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == "False"


def test_checks_on_values_are_skipped_while_compiling() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.tb_loss, fullgraph=True, backend="eager")
    bad = one_bad_reward()
    assert compiled(-torch.ones(B, N, L), bad, torch.zeros(B)).isnan()
