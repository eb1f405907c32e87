"""What cannot be captured in a CUDA graph says so; a stand-in claims that one is captured."""

from __future__ import annotations

import pytest
import torch

import gflowgr
from gflowgr import backends
from gflowgr.tree import PrefixTree, facts

TREE = PrefixTree.from_identifiers([[0, 3], [0, 4], [1, 3]])


def loss(*, sparse_grad: bool) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, generator=g) for size in ((1, 2, 2, 3), (5, 3)))
    return gflowgr.fused_tb_loss(
        hidden.requires_grad_(),
        weight.requires_grad_(),
        torch.tensor([[[0, 3], [1, 3]]]),
        torch.zeros(1, 2),
        torch.zeros(1),
        tree=TREE,
        normalize="children",
        sparse_grad=sparse_grad,
    )


def test_a_sparse_gradient_is_refused_before_the_graph_is_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss(sparse_grad=True).backward()
    monkeypatch.setattr(backends, "capturing", lambda: True)
    loss(sparse_grad=False).backward()
    with pytest.raises(RuntimeError, match="sparse_grad must be False while a CUDA graph"):
        loss(sparse_grad=True)


def test_a_tree_that_nobody_has_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known, cold = TREE.buffer.clone(), TREE.buffer.clone()
    trusted = TREE.buffer.clone()
    facts.tree_facts(known)
    facts.accept(trusted, trust=True)
    monkeypatch.setattr(backends, "capturing", lambda: True)
    assert facts.tree_facts(known).vocab_size == 5
    for buffer in (cold, trusted):
        with pytest.raises(RuntimeError, match="tree must be known before a CUDA graph"):
            facts.tree_facts(buffer)
