"""What every kernel of ``tree_walk`` is asked, whatever runs it: plain checks, for its tests."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

import gflowgr
from gflowgr.tree import PrefixTree
from gflowgr.tree.layout import build_numpy
from support.dict_trie import Catalogue


def check_equals_the_dictionary_trie(catalogue: Catalogue, backend: str) -> None:
    """Walks of a catalogue's queries, all their tokens and those of a mask."""
    tree, oracle = PrefixTree.from_identifiers(catalogue.identifiers), catalogue.oracle
    tokens, masks = torch.tensor(catalogue.queries), torch.tensor(catalogue.masks)
    with gflowgr.backend(backend):
        assert tree.walk(tokens.int()).tolist() == [oracle.walk(q) for q in catalogue.queries]
        assert tree.walk(tokens, mask=masks).tolist() == [
            oracle.walk(q, m) for q, m in zip(catalogue.queries, catalogue.masks, strict=True)
        ]


def check_several_blocks_and_all_widths(
    index_bytes: int, backend: str, schedule: AbstractContextManager[None] | None = None
) -> None:
    """Tokens of one, two and four bytes, and more queries than a block has."""
    generator = np.random.default_rng(0)
    tokens = np.stack([generator.integers(0, high, 300) for high in (9, 300, 70_000)], axis=1)
    tree = PrefixTree(torch.from_numpy(build_numpy(tokens, None, index_bytes)))
    queries = torch.from_numpy(np.concatenate([tokens, np.add(tokens, [0, 1, 0])]))
    with gflowgr.backend("torch"):
        expected = tree.walk(queries)
    with gflowgr.backend(backend), schedule or nullcontext():
        assert torch.equal(tree.walk(queries), expected)
