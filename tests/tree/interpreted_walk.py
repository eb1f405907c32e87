"""The Triton kernel of ``tree_walk`` under Triton's interpreter (see test_interpreted.py)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from support.dict_trie import Catalogue, catalogues

import gflowgr
from gflowgr.tree import PrefixTree
from gflowgr.tree.layout import build_numpy


@settings(max_examples=12)
@given(catalogues())
def test_equals_the_dictionary_trie(catalogue: Catalogue) -> None:
    tree, oracle = PrefixTree.from_identifiers(catalogue.identifiers), catalogue.oracle
    tokens, masks = torch.tensor(catalogue.queries), torch.tensor(catalogue.masks)
    with gflowgr.backend("triton"):
        assert tree.walk(tokens.int()).tolist() == [oracle.walk(q) for q in catalogue.queries]
        assert tree.walk(tokens, mask=masks).tolist() == [
            oracle.walk(q, m) for q, m in zip(catalogue.queries, catalogue.masks, strict=True)
        ]


@pytest.mark.parametrize("index_bytes", [4, 8])
def test_several_blocks_and_all_widths(index_bytes: int) -> None:
    generator = np.random.default_rng(0)
    tokens = np.stack([generator.integers(0, high, 300) for high in (9, 300, 70_000)], axis=1)
    tree = PrefixTree(torch.from_numpy(build_numpy(tokens, None, index_bytes)))
    queries = torch.from_numpy(np.concatenate([tokens, np.add(tokens, [0, 1, 0])]))
    with gflowgr.backend("torch"):
        expected = tree.walk(queries)
    with gflowgr.backend("triton"):
        assert torch.equal(tree.walk(queries), expected)


def test_opcheck() -> None:
    tree = PrefixTree.from_identifiers([(5, 9, 2), (5, 8, 1)]).buffer
    tokens = torch.tensor([[5, 9, 2], [5, 7, 2]])
    with gflowgr.backend("triton"):
        torch.library.opcheck(torch.ops.gflowgr.tree_walk, (tokens, None, tree))
