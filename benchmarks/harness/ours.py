"""The package's own ops as variants: which backends there are, and how one is forced."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor

import gflowgr
from benchmarks.harness.inputs import Inputs
from benchmarks.harness.plain import LAM, SFT_WEIGHT
from gflowgr import backends
from gflowgr.tree import PrefixTree

_OPS = {
    "head": ("head_",),
    "children": ("children_",),
    "reductions": ("flow_loss",),
    "beam": ("beam_step",),
    "walk": ("tree_walk",),
}
"""First letters of the registered ops that do the work of a group."""


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
    group: str, device: torch.device, dtype: torch.dtype
) -> tuple[list[str | None], list[tuple[str, str]]]:
    """Backends to measure (None: the free choice, on a GPU where ops differ), and those left out.

    The second list holds (name, reason).
    """
    able = gflowgr.available_backends(device, dtype)
    ops = {op: reasons for op, reasons in able.items() if op.startswith(_OPS[group])}
    found: list[str | None] = [None] if device.type == "cuda" and ops else []
    missing = []
    for name in backends.BACKENDS:
        reasons = [reasons[name] for reasons in ops.values()]
        reason = next((r for r in reasons if r), "no op of this group has it")
        if name == "triton" and device.type == "cpu":
            reason = "runs on the CPU only in its interpreter, which is for tests"
        elif name == "torch" or None in reasons:
            found.append(name)
            continue
        missing.append((variant_name(name), reason))
    return found, missing


def variant_name(backend: str | None) -> str:
    """What the tables call a backend of ours."""
    return "gflowgr" if backend is None else f"gflowgr/{backend}"


def joint_loss(inputs: Inputs, tree: PrefixTree | None = None, *, sparse: bool = False) -> Tensor:
    """The joint TB + SFT loss in one op."""
    return gflowgr.fused_tb_loss(
        inputs["hidden"],
        inputs["weight"],
        inputs["tokens"],
        inputs["log_reward"],
        inputs["log_z"],
        tree=tree,
        sft_weight=SFT_WEIGHT,
        sparse_grad=sparse,
    )


def logprobs(inputs: Inputs) -> Tensor:
    """The per-token op."""
    return gflowgr.trajectory_logprobs(inputs["hidden"], inputs["weight"], inputs["tokens"])


def reduction(inputs: Inputs, kind: str) -> Tensor:
    """A pure reduction."""
    log_pf, log_reward = inputs["log_pf"], inputs["log_reward"]
    if kind == "tb":
        return gflowgr.tb_loss(log_pf, log_reward, inputs["log_z"])
    if kind == "db":
        return gflowgr.db_loss(log_pf, log_reward, inputs["log_flow"])
    if kind == "subtb":
        return gflowgr.subtb_loss(log_pf, log_reward, inputs["log_flow"], lam=LAM)
    return gflowgr.vargrad_loss(log_pf, log_reward)
