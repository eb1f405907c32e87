"""The Triton kernel of ``tree_walk`` under Triton's interpreter (see test_interpreted.py)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from support.dict_trie import Catalogue, catalogues
from support.walk_cases import check_equals_the_dictionary_trie, check_several_blocks_and_all_widths

import gflowgr
from gflowgr.tree import PrefixTree


@settings(max_examples=12)
@given(catalogues())
def test_equals_the_dictionary_trie(catalogue: Catalogue) -> None:
    check_equals_the_dictionary_trie(catalogue, "triton")


@pytest.mark.parametrize("index_bytes", [4, 8])
def test_several_blocks_and_all_widths(index_bytes: int) -> None:
    check_several_blocks_and_all_widths(index_bytes, "triton")


def test_opcheck() -> None:
    tree = PrefixTree.from_identifiers([(5, 9, 2), (5, 8, 1)]).buffer
    tokens = torch.tensor([[5, 9, 2], [5, 7, 2]])
    with gflowgr.backend("triton"):
        torch.library.opcheck(torch.ops.gflowgr.tree_walk, (tokens, None, tree))
