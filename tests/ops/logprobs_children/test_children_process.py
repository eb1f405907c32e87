"""Tests in a process of their own: peak memory, and instruction sets other than the best."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gflowgr import backends

pytestmark = pytest.mark.process


def run(script: str, **environment: str) -> list[float]:
    """The numbers that a script prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [float(x) for x in done.stdout.split()]


@pytest.fixture(autouse=True)
def built() -> None:
    if missing := backends.cpp_missing():
        pytest.skip(missing)


MEMORY = """
    import torch
    from gflowgr import PrefixTree
    from gflowgr.ops import trajectory_logprobs

    rows, width, last = 512, 64, 200_000
    codes = torch.cartesian_prod(torch.arange(64), torch.arange(64))
    tree = PrefixTree.from_identifiers(codes + last - 128 + torch.tensor([0, 64]))
    weight = torch.randn(last, width)

    def step(kind, count):
        hidden = torch.randn(1, count, 2, width, requires_grad=True)
        tokens = tree.identifiers(torch.randint(0, 4096, (1, count)))
        weight.requires_grad_(kind != "frozen")
        sparse = kind == "sparse"
        log_pf = trajectory_logprobs(hidden, weight, tokens, tree=tree, sparse_grad=sparse)
        log_pf.sum().backward()
        weight.grad = None

    def mebibytes(name):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith(name)) / 1024

    def extra(kind, count):
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # the peak is what is resident now
        before = mebibytes("VmRSS")
        step(kind, count)
        return mebibytes("VmHWM") - before

    for kind in ("frozen", "sparse", "dense"):
        step(kind, 2)
        print(extra(kind, rows))
"""


def test_memory_does_not_grow_with_the_vocabulary() -> None:
    """The head takes 49 MiB; rows and their gradients 1 MiB, 64 products a row and their copy 1/2.

    Nor does the dense gradient take memory that is not written: its pages are zero from the start.
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc/self/clear_refs: the peak of a process cannot be reset")
    extra = run(MEMORY)
    assert len(extra) == 3
    assert max(extra) < 8


VALUES = """
    import torch
    from gflowgr import PrefixTree, backends
    from gflowgr.ops import trajectory_logprobs

    torch.manual_seed(0)
    worst = 0.0
    for width in (1, 5, 16, 70):
        codes = torch.randint(0, 40, (500, 3))
        tree = PrefixTree.from_identifiers(codes)
        tokens = codes[torch.randint(0, 500, (10, 20))]
        shapes = (10, 20, 3, width), (40, width), (40,)
        parameters = [torch.randn(shape) for shape in shapes]
        upstream = torch.randn(10, 20, 3)

        def run(dtype):
            given = [x.to(dtype, copy=True).requires_grad_() for x in parameters]
            log_pf = trajectory_logprobs(*given[:2], tokens, bias=given[2], tree=tree)
            log_pf.backward(upstream.to(dtype))
            return [log_pf.detach(), *(x.grad for x in given)]

        with backends.backend("cpp"):
            actual = run(torch.float32)
        for a, e in zip(actual, run(torch.float64), strict=True):
            worst = max(worst, ((a - e).abs() / (1 + e.abs())).max().item())
    print(worst)
"""


@pytest.mark.parametrize("most", ["default", "avx2"])
def test_older_processors_compute_the_same(most: str) -> None:
    """The instruction set can be limited by PyTorch's own variable."""
    (worst,) = run(VALUES, ATEN_CPU_CAPABILITY=most)
    assert worst < 2e-5
