"""A search reads nothing back from the device between the prompt and the answer."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch
from support.small_models import padded_prompts, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from gflowgr.decoding.beam import Search, _to_items
from gflowgr.decoding.decoders import decoder_for
from gflowgr.tree import PrefixTree
from gflowgr.tree.admissible import admissible_for

aten = torch.ops.aten
# What waits for a GPU, by name: on the CPU the same calls only look cheap.
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.unique_dim)


class Reads(TorchDispatchMode):
    """Collects where values are read."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in READS:
            self.found.append("".join(traceback.format_stack(limit=6)[:-1]))
        return func(*args, **(kwargs or {}))


def test_reads_are_noticed() -> None:
    with Reads() as reads:
        assert bool(torch.ones(2).any())
    assert len(reads.found) == 1
    assert "test_reads_are_noticed" in reads.found[0]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", ["t5", "gpt2", "qwen3"])
def test_no_step_reads_values(name: str, shared: bool) -> None:
    identifiers = [[3, 7, 9], [3, 7, 10], [3, 8, 9], [4, 7, 11], [4, 8, 12]]
    tree = PrefixTree.from_identifiers(identifiers + identifiers[:2] * shared)
    rules = admissible_for(tree, 2, None, None)
    for _ in range(2):  # the first search checks the tree, whose facts are kept
        decoder = decoder_for(small_model(name), *padded_prompts("left"))
        search = Search(decoder, tree, rules, 3, "children", 1.0)
        with torch.no_grad(), Reads() as reads:
            found = _to_items(*search.run(3), tree, 3, rules)
    assert (found.items >= 0).all()
    assert not reads.found, "\n".join(reads.found)
