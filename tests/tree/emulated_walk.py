"""The CUDA kernel of ``tree_walk`` in the emulator (see test_emulated.py)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from support import emulation
from support.dict_trie import Catalogue, catalogues
from support.walk_cases import check_equals_the_dictionary_trie, check_several_blocks_and_all_widths


@settings(max_examples=25)
@given(catalogues())
def test_equals_the_dictionary_trie(catalogue: Catalogue) -> None:
    check_equals_the_dictionary_trie(catalogue, "cuda")


@pytest.mark.parametrize("order", emulation.SCHEDULES)
@pytest.mark.parametrize("index_bytes", [4, 8])
def test_several_blocks_and_all_widths(index_bytes: int, order: int) -> None:
    check_several_blocks_and_all_widths(index_bytes, "cuda", emulation.schedule(order))
