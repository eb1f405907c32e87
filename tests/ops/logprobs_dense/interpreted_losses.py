"""The joint losses through the Triton head, in its interpreter (see test_interpreted.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gflowgr
from gflowgr.kernels.logprobs_dense import launch
from gflowgr.ops import fused_flow_loss

from .cases import joint_inputs


def make(kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Floating inputs and keywords; ragged trajectories, one prompt without any."""
    inputs, keywords = joint_inputs(
        kind, torch.float32, seed=0, prompts=5, width=20, size=70, length=2
    )
    keywords["mask"][1] = False
    return inputs, keywords


# Every kind and every reduction with one block and with several.
@pytest.mark.parametrize(
    ("kind", "reduction", "blocks"),
    [
        ("tb", "prompt", "one"),
        ("tb", "mean", "several"),
        ("tb", "sum", "one"),
        ("db", "prompt", "several"),
        ("db", "sum", "one"),
        ("subtb", "mean", "one"),
        ("subtb", "sum", "several"),
        ("vargrad", "prompt", "several"),
        ("vargrad", "mean", "one"),
        ("vargrad", "sum", "several"),
    ],
)
def test_equals_the_reference(
    kind: str, reduction: str, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks == "several":
        monkeypatch.setattr(launch, "block_bytes", lambda device: 1)
        monkeypatch.setattr(launch, "MIN_ROWS", 8)
    sizes: list[int] = []
    score = launch.score

    def spy(part: launch.DenseCall, *rest: Tensor) -> Tensor:
        sizes.append(len(part.hidden))
        return score(part, *rest)

    monkeypatch.setattr(launch, "score", spy)
    inputs, keywords = make(kind)
    keywords["residual_clip"] = None if kind == "subtb" else 2.0
    results = []
    for backend in ("torch", "triton"):
        wide = backend == "torch"
        leaves = {
            k: (x.double() if wide else x.clone()).requires_grad_() for k, x in inputs.items()
        }
        with gflowgr.backend(backend):
            given = {k: x for k, x in leaves.items() if k not in ("log_z", "log_flow")}
            balance = leaves.get("log_z", leaves.get("log_flow"))
            loss, log_pf = fused_flow_loss(
                kind, **given, balance=balance, **keywords, reduction=reduction, nll_weight=0.6
            )
            (3 * loss).backward()
        results.append([loss.detach(), log_pf, *(x.grad for x in leaves.values())])
    assert sum(sizes) == 5 * 3 * 2
    assert (len(sizes) > 1) == (blocks == "several")
    for wanted, actual in zip(*results, strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=2e-5 * scale)


def test_frozen_parts() -> None:
    inputs, keywords = make("tb")
    inputs["hidden"].requires_grad_()
    with gflowgr.backend("triton"):
        gflowgr.fused_tb_loss(**inputs, **keywords).backward()
        frozen = gflowgr.fused_tb_loss(**{k: x.detach() for k, x in inputs.items()}, **keywords)
    assert inputs["hidden"].grad is not None
    assert inputs["weight"].grad is None
    assert not frozen.requires_grad
