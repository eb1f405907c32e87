"""The package's own ops as variants: which backends there are, and how one is forced."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

import gflowgr
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.plain import NLL_WEIGHT
from gflowgr import backends
from gflowgr.tree import PrefixTree


@contextlib.contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Force a backend (None: choose freely).

    By the environment and not by ``gflowgr.backend``: that one holds for a thread, and the backward
    pass of CUDA tensors runs in another.
    """
    before = os.environ.pop(backends.ENVIRONMENT, None)
    if name is not None:
        os.environ[backends.ENVIRONMENT] = name
    try:
        yield
    finally:
        os.environ.pop(backends.ENVIRONMENT, None)
        if before is not None:
            os.environ[backends.ENVIRONMENT] = before


def usable_backends(
    ops: str, device: torch.device, dtype: torch.dtype
) -> tuple[list[str | None], list[tuple[str, str]]]:
    """Backends to measure (None: the free choice, on a GPU where ops differ), and those left out.

    ``ops`` is what the names of the registered ops that do the work begin with. The second list
    holds (name, reason). ValueError where no op begins so.
    """
    able = gflowgr.available_backends(device, dtype)
    working = [reasons for op, reasons in able.items() if op.startswith(ops)]
    if not working:
        raise ValueError(f"ops must be the beginning of one of {', '.join(able)}; got {ops!r}")
    found: list[str | None] = [None] if device.type == "cuda" else []
    missing = []
    for name in backends.BACKENDS:
        reasons = [each[name] for each in working]
        reason = next((r for r in reasons if r), "no op that does this work has it")
        if name == "triton" and device.type == "cpu":
            reason = "runs on the CPU only in its interpreter, which is for tests"
        elif name == "torch" or None in reasons:
            found.append(name)
            continue
        missing.append((variant_name(name), reason))
    return found, missing


def without_kernels(ops: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Ops whose names begin so and which the reference would run."""
    names = [op for op in gflowgr.available_backends(device, dtype) if op.startswith(ops)]
    return [op for op in names if backends.resolve(op, device, dtype) == "torch"]


def variant_name(backend: str | None) -> str:
    """The name of one of our backends in the tables."""
    return "gflowgr" if backend is None else f"gflowgr/{backend}"


def fused_loss(inputs: Inputs, tree: PrefixTree | None = None, *, sparse: bool = False) -> Tensor:
    """The TB + NLL loss from hidden states, in one op."""
    return gflowgr.fused_tb_loss(
        inputs["hidden"],
        inputs["weight"],
        inputs["tokens"],
        inputs["log_reward"],
        inputs["log_z"],
        tree=tree,
        nll_weight=NLL_WEIGHT,
        sparse_grad=sparse,
    )
