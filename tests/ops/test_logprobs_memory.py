"""What trajectory_logprobs holds in memory, counted and not timed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gflowgr.ops import trajectory_logprobs
from gflowgr.ops.logprobs import reference
from gflowgr.ops.logprobs.dense import backward_reference, probe_cpp
from gflowgr.tree import PrefixTree


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def largest_of_reference(rows: int, valid: int, vocabulary: int) -> int:
    """Largest tensor of a forward and backward pass of the reference, `valid` rows of `rows`."""
    hidden, weight = torch.zeros(rows, 2), torch.zeros(vocabulary, 2)
    targets = torch.where(torch.arange(rows) < valid, 0, -1)
    with LargestTensor() as count, torch.no_grad():
        log_pf, lse = reference.dense_logprobs(hidden, weight, None, targets, 1.0)
        inputs = (torch.ones(rows), hidden, weight, None, targets, log_pf, lse, 1.0)
        backward_reference(*inputs, True, True, False)
    return count.numel


def test_logits_of_masked_tokens_are_never_formed() -> None:
    assert largest_of_reference(rows=400, valid=30, vocabulary=1000) == 30 * 1000


def test_logits_are_formed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 20_000)
    monkeypatch.setattr(reference, "MIN_BLOCK_ROWS", 8)
    assert largest_of_reference(rows=400, valid=400, vocabulary=1000) == 20 * 1000


def largest(
    rows: int,
    valid: int,
    vocabulary: int,
    token: int,
    tree: PrefixTree | None = None,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Largest tensor of a forward and backward pass over `rows` one-token trajectories."""
    hidden = torch.zeros(rows, 1, 1, 2, requires_grad=True, dtype=dtype)
    weight = torch.zeros(vocabulary, 2, dtype=dtype)
    mask = (torch.arange(rows) < valid)[:, None, None]
    tokens = torch.full((rows, 1, 1), token)
    with LargestTensor() as count:
        trajectory_logprobs(hidden, weight, tokens, mask=mask, tree=tree).sum().backward()
    return count.numel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tree_makes_the_cost_independent_of_the_vocabulary(dtype: torch.dtype) -> None:
    """Only the six children are multiplied: nothing of the vocabulary's size is made or widened."""
    tree = PrefixTree.from_identifiers([[i] for i in range(100, 106)])
    assert largest(50, 50, vocabulary=90_000, token=103, tree=tree, dtype=dtype) == 50 * 6


# ------------------------------------------------------------------ C++

PEAK_OF_JOINT_LOSS = """
import sys, torch, gflowgr
dtype, shapes = getattr(torch, sys.argv[1]), eval(sys.argv[2])
torch.set_num_threads(2)
def run(rows, width, size, frozen):
    hidden = torch.randn(rows // 4, 2, 2, width).to(dtype).requires_grad_()
    weight = torch.randn(size, width).to(dtype).requires_grad_(not frozen)
    tokens = torch.randint(0, size, hidden.shape[:3])
    reward, log_z = torch.randn(rows // 4, 2), torch.randn(rows // 4)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    before = resident("VmRSS")
    gflowgr.fused_tb_loss(hidden, weight, tokens, reward, log_z, nll_weight=1.0).backward()
    return resident("VmHWM") - before
def resident(name):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(name)) * 1024
for rows, width, size, frozen in shapes:
    run(64, width, 128, frozen)
    print(run(rows, width, size, frozen))
"""


def predicted_peak(rows: int, width: int, size: int, frozen: bool, element: int) -> int:
    """Bytes, as the docstring of the fused losses states them."""
    gradients = (rows * width + (0 if frozen else size * width)) * element
    block = min(rows, 512)
    scores = 0 if frozen or rows <= width else size * block * element
    references = 0 if frozen else size // 64 * block * 4
    sums = size * width * 4 if element == 2 and rows > block and not frozen else 0
    states = block * width * (4 + element)
    return gradients + scores + references + sums + states


SHAPES = [  # rows, width, size, frozen
    (2048, 64, 60_000, False),
    (256, 256, 60_000, False),  # the scores lie in the memory of the head's gradient
    (4096, 512, 20_000, True),
]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.process
def test_peak_of_the_joint_loss(kind: str) -> None:
    """Resident memory, in its own process; 12 MiB stand for threads' tiles and the allocator."""
    dtype = getattr(torch, kind)
    reason = probe_cpp(torch.device("cpu"), dtype)
    if reason is not None:
        pytest.skip(f"cpp: {reason}")
    if kind == "bfloat16" and not torch.ops.gflowgr_cpp.dense_in_bfloat16():
        pytest.skip("this CPU has no bfloat16 products: the formula is that of float32 then")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs: the peak of a process cannot be reset")
    done = subprocess.run(
        [sys.executable, "-c", PEAK_OF_JOINT_LOSS, kind, repr(SHAPES)],
        capture_output=True,
        text=True,
        check=True,
    )
    peaks = map(int, done.stdout.split())
    for (rows, width, size, frozen), peak in zip(SHAPES, peaks, strict=True):
        predicted = predicted_peak(rows, width, size, frozen, dtype.itemsize)
        assert peak <= 1.05 * predicted + 12 * 2**20
        assert peak >= 0.6 * predicted, "the formula promises too little"
        assert frozen or rows <= 512 or peak < rows * size * dtype.itemsize, "all logits are there"
