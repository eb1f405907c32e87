"""How the checks on values are switched off; those on types and shapes stay."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import gflowgr
from gflowgr import backends, ops
from gflowgr.ops import checks

from .public_ops import OPS, VOCABULARY, arguments, read_by

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
    with pytest.raises(TypeError, match="enabled must be a bool; got 1"):
        ops.set_validation(1)  # type: ignore[arg-type]


@pytest.mark.process
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


# ------------------------------------------------------------------ what bad values give


# Masked or not, and a token: both ends, and what a narrower integer would take for a token.
OUTSIDE = [
    *((False, token) for token in (VOCABULARY, 10**6, -1, -(2**63))),
    *((True, token) for token in (VOCABULARY + 1, 2**62, -2, -(2**31))),
]
READ_TOKENS = [name for name in OPS if "tokens" in read_by(name)]
# Every op with three of the eight, and every one of the eight with several ops.
WITH_TOKENS = [
    (name, *OUTSIDE[(i + step) % len(OUTSIDE)])
    for i, name in enumerate(READ_TOKENS)
    for step in (0, 3, 6)
]
NOT_A_PREFIX = [[False, True, True, True], [True, False, True, False], [False, False, False, True]]


def spoilt(name: str, given: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What an op gives without data checks, and the gradients of its sum."""
    reads = [key for key in ("hidden", "weight", "logits", "log_pf") if key in read_by(name)]
    leaves = [given[key].requires_grad_() for key in reads]
    result = OPS[name](given)
    return result.detach(), list(torch.autograd.grad(result.sum(), leaves))


@pytest.mark.usefixtures("unchecked", "backend")
@pytest.mark.parametrize(("name", "masked", "token"), WITH_TOKENS)
def test_a_token_outside_the_vocabulary_gives_nothing_finite(
    name: str, masked: bool, token: int
) -> None:
    """Also without a mask, where -1 masks nothing."""
    given = arguments()
    place = (1, 1, int(given["mask"][1, 1].sum()) - 1 if masked else 3)
    given["tokens"][place] = token
    if not masked:
        given["mask"] = None  # type: ignore[assignment]
    result, gradients = spoilt(name, given)
    if result.dim() == 3:
        assert not result[place].isfinite()
    else:
        assert not result.sum().isfinite()
    if "children" not in name and "level" not in name:  # there -inf, which passes no gradient
        assert not any(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.usefixtures("unchecked", "backend")
@pytest.mark.parametrize(
    ("name", "row"), list(zip(OPS, itertools.cycle(NOT_A_PREFIX), strict=False))
)
def test_a_mask_that_is_no_prefix_gives_nothing_finite(name: str, row: list[bool]) -> None:
    given = arguments()
    given["mask"][1, 1] = torch.tensor(row)
    result, _ = spoilt(name, given)
    assert not result.sum().isfinite()
    if result.shape == (3, 2):  # one loss each: the others are as they were
        assert result.isfinite().sum() == 5


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("row", NOT_A_PREFIX)
@pytest.mark.parametrize("name", ["tb", "db", "subtb", "vargrad"])
def test_backends_agree_on_a_mask_that_is_no_prefix(name: str, row: list[bool]) -> None:
    found = []
    for backend in ("torch", "cpp"):
        if backend == "cpp" and (missing := backends.cpp_missing()):
            pytest.skip(missing)
        given = arguments()
        given["mask"][1, 1] = torch.tensor(row)
        with gflowgr.backend(backend):
            found.append(spoilt(name, given))
    (first, (one,)), (second, (other,)) = found
    torch.testing.assert_close(first, second, equal_nan=True)
    torch.testing.assert_close(one, other, equal_nan=True)


def test_compiled_a_token_outside_the_vocabulary_gives_nothing_finite() -> None:
    torch._dynamo.reset()
    given = arguments()
    given["tokens"][1, 1, 0] = -1
    compiled = torch.compile(OPS["fused tb"], fullgraph=True, backend="eager")
    assert compiled(given).isnan()
