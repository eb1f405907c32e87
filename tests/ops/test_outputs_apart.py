"""An operator's outputs share memory neither with each other nor with its inputs.

``torch.compile`` may write into what it holds for one of them.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import gflowgr
from gflowgr import PrefixTree

PROMPTS, BRANCHES, STEPS, WIDTH, TOKENS = 2, 3, 3, 4, 9


def usable(op: str) -> list[str]:
    return [name for name, why in gflowgr.available_backends("cpu")[op].items() if why is None]


def assert_apart(op: Any, arguments: tuple[Any, ...]) -> None:
    outputs = op(*arguments)
    tensors = [*outputs, *(x for x in arguments if isinstance(x, Tensor))]
    storages = [tensor.untyped_storage()._cdata for tensor in tensors]
    assert len(set(storages)) == len(storages), arguments[-5:]


def needs(count: int) -> list[tuple[bool, ...]]:
    return list(itertools.product((True, False), repeat=count))


@pytest.fixture
def rows() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shape = (PROMPTS, BRANCHES, STEPS)
    return {
        "hidden": torch.randn(*shape, WIDTH),
        "weight": torch.randn(TOKENS, WIDTH),
        "bias": torch.randn(TOKENS),
        "tokens": torch.randint(0, 3, shape),
        "mask": torch.ones(shape, dtype=torch.bool),
        "log_reward": torch.randn(shape[:2]),
        "log_z": torch.randn(PROMPTS),
        "grad": torch.randn(shape),
    }


@pytest.mark.parametrize("name", usable("dense_logprobs"))
def test_dense_head(name: str, rows: dict[str, Tensor]) -> None:
    hidden, targets = rows["hidden"].flatten(0, 2), rows["tokens"].flatten()
    head = (rows["weight"], rows["bias"], targets)
    with gflowgr.backend(name):
        for jacobian in (True, False):
            assert_apart(torch.ops.gflowgr.dense_logprobs, (hidden, *head, 0.7, jacobian))
        log_pf, lse, _ = torch.ops.gflowgr.dense_logprobs(hidden, *head, 0.7, False)
        for need in needs(3):
            given = (rows["grad"].flatten(), hidden, *head, log_pf, lse, 0.7, *need)
            assert_apart(torch.ops.gflowgr.dense_backward, given)


@pytest.mark.parametrize("kind", ["tb", "vargrad"])
@pytest.mark.parametrize("name", usable("dense_flow_loss"))
def test_joint_loss(name: str, kind: str, rows: dict[str, Tensor]) -> None:
    log_z = rows["log_z"] if kind == "tb" else None
    options = (kind, 1.0, 1.0, None, "prompt", 0.5, None)
    head = (rows["hidden"], rows["weight"], rows["bias"], rows["tokens"], 0.7)
    with gflowgr.backend(name):
        for need in needs(5 if kind == "tb" else 4):
            need = need if kind == "tb" else (*need, False)
            given = (*head, rows["log_reward"], log_z, *options, *need)
            assert_apart(torch.ops.gflowgr.dense_flow_loss, given)


@pytest.mark.parametrize("name", usable("flow_loss"))
def test_flow_loss(name: str, rows: dict[str, Tensor]) -> None:
    inputs = (-rows["grad"].abs(), rows["log_reward"], rows["log_z"], rows["mask"])
    options = ("tb", 1.0, 1.0, None, "prompt", 0.5, None)
    with gflowgr.backend(name):
        for need in needs(3):
            given = (torch.ones(()), *inputs, *options, *need)
            assert_apart(torch.ops.gflowgr.flow_loss_backward, given)


@pytest.mark.parametrize("name", usable("children_logprobs"))
def test_children(name: str, rows: dict[str, Tensor]) -> None:
    tree = PrefixTree.from_identifiers(torch.cartesian_prod(*[torch.arange(3)] * STEPS))
    head = (rows["hidden"], rows["weight"], rows["bias"], rows["tokens"], rows["mask"])
    head += (tree.buffer, 0.7)
    with gflowgr.backend(name):
        for saved, sparse in itertools.product((0, 3 * rows["tokens"].numel()), (True, False)):
            assert_apart(torch.ops.gflowgr.children_logprobs, (*head, saved, sparse))
            kept = torch.ops.gflowgr.children_logprobs(*head, saved, sparse)[:3]
            for need in needs(3):
                given = (rows["grad"], *head, *kept, *need, sparse)
                assert_apart(torch.ops.gflowgr.children_backward, given)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("name", usable("flow_kl"))
def test_flow_kl(name: str, pooled: bool, rows: dict[str, Tensor]) -> None:
    tree = PrefixTree.from_identifiers(torch.cartesian_prod(*[torch.arange(3)] * STEPS))
    items = torch.arange(8).expand(PROMPTS, 8) if pooled else None
    flows = gflowgr.item_flows(tree, torch.randn(PROMPTS, 8 if pooled else 27), items=items)
    r = flows.rewards
    head = (rows["hidden"], rows["weight"], rows["bias"], rows["tokens"], rows["mask"])
    head += (tree.buffer, 0.7)
    with gflowgr.backend(name):
        for saved, weights in itertools.product((0, 3 * rows["tokens"].numel()), (True, False)):
            nll = torch.rand(PROMPTS, BRANCHES) if weights else None
            given = (*head, saved, nll, r.log_reward, r.pool, r.floor, r.root)
            assert_apart(torch.ops.gflowgr.flow_kl, given)
            _, log_pf, _, slopes, plan, _ = torch.ops.gflowgr.flow_kl(*given)
            for need in needs(3):
                again = (rows["grad"], *head, *given[8:], log_pf, slopes, plan, *need)
                assert_apart(torch.ops.gflowgr.flow_kl_backward, again)
