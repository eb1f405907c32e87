"""A search whose steps are captured once for a shape gives what any search gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.small_models import padded_prompts, small_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gflowgr.decoding import BeamSearchOutput, GraphedSearch, constrained_beam_search
from gflowgr.decoding.beam import Search
from gflowgr.decoding.decoders import decoder_for
from gflowgr.tree import PrefixTree, facts
from gflowgr.tree.admissible import admissible_for

CODES = [[3, 7, 9], [3, 7, 10], [3, 8, 9], [4, 7, 11], [4, 8, 12], [3, 7, 9]]
TREE = PrefixTree.from_identifiers(CODES)


def check_equal(found: BeamSearchOutput, wanted: BeamSearchOutput) -> None:
    assert torch.equal(found.items, wanted.items)
    assert torch.equal(found.tokens, wanted.tokens)
    torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "mt5", "gpt2", "qwen3"])
def test_calls_of_one_shape_do_not_disturb_each_other(name: str) -> None:
    model = small_model(name)
    available = torch.tensor([True, True, True, False, True, True])
    search = GraphedSearch(model, TREE, num_beams=3, available=available, multiple=4)
    ids, mask = padded_prompts("left")
    for turn in range(3):
        prompt = (ids + turn).clamp_max(59)
        seen = torch.tensor([[turn, -1, 2]]).expand(len(ids), -1)
        wanted = constrained_beam_search(
            model, prompt, mask, TREE, num_beams=3, available=available, exclude=seen
        )
        check_equal(search(prompt, mask, exclude=seen), wanted)
        wanted = constrained_beam_search(
            model, prompt, mask, TREE, num_beams=3, available=available
        )
        check_equal(search(prompt, mask), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_any_number_and_length(side: str) -> None:
    model = small_model("gpt2")
    search = GraphedSearch(model, TREE, num_beams=4, num_return=2, temperature=1.3, multiple=8)
    for rows in (1, 2, 3, 5):
        ids, mask = (part.repeat(3, 1)[:rows, : 3 + rows] for part in padded_prompts(side))
        wanted = constrained_beam_search(
            model, ids, mask, TREE, num_beams=4, num_return=2, temperature=1.3
        )
        check_equal(search(ids, mask), wanted)


def test_a_change_of_the_weights_in_place_is_seen() -> None:
    model = small_model("qwen3")
    search = GraphedSearch(model, TREE)
    ids, mask = padded_prompts("left")
    before = search(ids, mask)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-1.1)
    check_equal(search(ids, mask), constrained_beam_search(model, ids, mask, TREE))
    assert not torch.equal(before.scores, search(ids, mask).scores)


def test_bad_arguments_are_refused() -> None:
    model, prompts = small_model("gpt2"), padded_prompts("left")
    with pytest.raises(ValueError, match=r"multiple must be >= 1; got 0"):
        GraphedSearch(model, TREE, multiple=0)
    with pytest.raises(ValueError, match=r"num_beams must be >= 1; got 0"):
        GraphedSearch(model, TREE, num_beams=0)(*prompts)
    with pytest.raises(ValueError, match=r"exclude must hold items 0..5, or -1; got 6..6"):
        GraphedSearch(model, TREE)(*prompts, exclude=torch.full((len(prompts[0]), 1), 6))
    with pytest.raises(ValueError, match=r"exclude must be \[B, E\] with B = \d; got \(1, 1\)"):
        GraphedSearch(model, TREE)(*prompts, exclude=torch.zeros(1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"input_ids must hold a prompt; got none"):
        GraphedSearch(model, TREE)(prompts[0][:0], prompts[1][:0])
    with pytest.raises(ValueError, match="steps of a GenericDecoder cannot be kept"):
        GraphedSearch(small_model("umt5"), TREE)(*prompts)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        GraphedSearch(model, TREE)(*prompts)


# ---------------------------------------------------------------------- what a graph cannot hold

aten = torch.ops.aten


class Copies(TorchDispatchMode):
    """Collects copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (aten._to_copy, aten.copy_, aten.lift_fresh_copy):
            devices = {part.device.type for part in (*args, out) if isinstance(part, Tensor)}
            if len(devices) > 1:
                self.found.append(f"{func} between {devices}")
        return out


def without_values(tree: PrefixTree) -> PrefixTree:
    """The tree on the device ``meta``, whose tensors have shapes only: what reads them raises."""
    known, buffer = facts._known[tree.buffer], tree.buffer.to("meta")
    facts._known[buffer] = facts._Known(known.layout, facts._version(buffer), known.facts)
    without = PrefixTree(buffer)
    without._leaf_of_item = tree.leaf_map().to("meta")
    return without


@pytest.mark.parametrize("barred", [False, True])
@pytest.mark.parametrize("name", ["t5", "gpt2", "qwen3"])
def test_steps_read_no_values_and_copy_nothing_between_devices(name: str, barred: bool) -> None:
    facts.tree_facts(TREE.buffer)
    model, tree = small_model(name).to("meta"), without_values(TREE)
    model.set_attn_implementation("eager")  # else reading prompts looks at the mask
    ids = torch.ones(2, 6, dtype=torch.long, device="meta")
    seen = torch.zeros(2, 4, dtype=torch.long, device="meta") if barred else None
    with torch.no_grad():
        encoded = torch.zeros(2, 6, model.config.d_model, device="meta") if name == "t5" else None
        decoder = decoder_for(model, ids, torch.ones_like(ids), encoded)
        with Copies() as copies:
            rules = admissible_for(tree, 2, None, seen, look=False)
            found, nan = Search(decoder, tree, rules, 3, "children", 1.0).answer(3)
    assert found.items.shape == (2, 3)
    assert found.items.device.type == nan.device.type == "meta"
    assert not copies.found, copies.found


def test_reads_and_copies_would_be_noticed() -> None:
    there = torch.ones(2, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        bool(there.any())
    with pytest.raises(RuntimeError, match="meta"):
        there.nonzero()
    with Copies() as copies:
        there.copy_(torch.ones(2))
    assert len(copies.found) == 1
