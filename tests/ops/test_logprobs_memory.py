"""What trajectory_logprobs holds in memory, counted and not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gflowgr.ops import definitions, trajectory_logprobs
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


def test_logits_of_masked_tokens_are_never_formed() -> None:
    assert largest(rows=400, valid=30, vocabulary=1000, token=0) == 30 * 1000


def test_logits_are_formed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(definitions, "BLOCK_ELEMENTS", 20_000)
    monkeypatch.setattr(definitions, "MIN_BLOCK_ROWS", 8)
    assert largest(rows=400, valid=400, vocabulary=1000, token=0) == 20 * 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tree_makes_the_cost_independent_of_the_vocabulary(dtype: torch.dtype) -> None:
    """Only the six children are multiplied: nothing of the vocabulary's size is made or widened."""
    tree = PrefixTree.from_identifiers([[i] for i in range(100, 106)])
    assert largest(50, 50, vocabulary=90_000, token=103, tree=tree, dtype=dtype) == 50 * 6
