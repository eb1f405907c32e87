"""Random inputs for tests of several ops: ragged trajectories of a small tree, states, a head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from gflowgr.tree import PrefixTree

IDENTIFIERS = [
    [2, 6, 11],
    [2, 6, 12],
    [2, 7, 11],
    [2, 8],
    [3, 6, 13],
    [3, 9],
    [4, 6, 11, 14],
    [4, 6, 11, 15],
    [4, 10, 12],
    [5],
]
"""Different lengths, codes shared by places, nodes with one child; none is a prefix of another."""

VOCABULARY = 17


def prefix_mask(lengths: Tensor, steps: int) -> Tensor:
    """[B, N, L] true for the first `lengths` [B, N] positions."""
    return torch.arange(steps) < lengths[..., None]


@dataclass
class HeadCase:
    """Inputs of the log-probabilities; every valid trajectory is an identifier of the tree."""

    hidden: Tensor
    weight: Tensor
    tokens: Tensor
    bias: Tensor
    mask: Tensor

    @property
    def tree(self) -> PrefixTree:
        return PrefixTree.from_identifiers(IDENTIFIERS)


def make_head_case(
    prompts: int, branches: int, width: int, seed: int, *, dtype: torch.dtype = torch.float64
) -> HeadCase:
    """Random identifiers (or padding) as trajectories, five positions; random states and head."""
    g = torch.Generator().manual_seed(seed)
    steps = 5
    tokens = torch.zeros(prompts, branches, steps, dtype=torch.long)
    lengths = torch.zeros(prompts, branches, dtype=torch.long)
    for b in range(prompts):
        for n in range(branches):
            pick = int(torch.randint(0, len(IDENTIFIERS) + 2, (), generator=g))
            if pick < len(IDENTIFIERS):
                identifier = IDENTIFIERS[pick]
                lengths[b, n] = len(identifier)
                tokens[b, n, : len(identifier)] = torch.tensor(identifier)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return HeadCase(
        hidden=normal(prompts, branches, steps, width),
        weight=normal(VOCABULARY, width),
        tokens=tokens,
        bias=normal(VOCABULARY),
        mask=prefix_mask(lengths, steps),
    )


head_cases = st.builds(
    make_head_case,
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(1, 6),
    st.integers(0, 2**20),
)
