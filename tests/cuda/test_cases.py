"""The cases of `benchmarks/gpu_smoke.py`: all on a GPU; on the CPU, that they are right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.gpu_cases import GpuCase, gpu_cases
from torch import Tensor

from gflowgr import backends
from gflowgr.tree import prefix_tree

CASES = gpu_cases()
FIRST = {case.group: case.name for case in reversed(CASES)}
"""Of each group one runs on the CPU in every run; the others are the same with other values."""


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_a_gpu(case: GpuCase) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    case.run("cuda")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case.name in FIRST.values() else pytest.mark.slow)
        for case in CASES
    ],
    ids=lambda case: case.name,
)
def test_on_the_cpu(case: GpuCase) -> None:
    case.run("cpu")


def test_names_are_unique_and_a_wrong_result_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    walk = prefix_tree.tree_walk

    def wrong(*given: Any) -> Tensor:
        return walk(*given) + (backends.forced_backend() != "torch")

    monkeypatch.setattr(prefix_tree, "tree_walk", wrong)
    with pytest.raises(AssertionError):
        CASES[0].run("cpu")
