"""Prompts without a mask, or padded with any token or number: as bare prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.small_models import padded_prompts, small_model
from torch import Tensor

from gflowgr.decoding import constrained_beam_search, item_logprobs, sample_items
from gflowgr.decoding.decoders import decoder_for
from gflowgr.models import trajectory_hidden_states
from gflowgr.tree import PrefixTree

TREE = PrefixTree.from_identifiers(
    [(3 + k % 3, 20 + k % 4, 40 + k % 5) for k in range(30) if k % 7]
)
TOKENS = torch.tensor([[[3, 20, 40], [4, 21, 41]]])

Results = tuple[Tensor, ...]


def search(model: Any, ids: Tensor, mask: Tensor | None) -> Results:
    found = constrained_beam_search(model, ids, mask, TREE, num_beams=6)
    return found.scores, found.items


def score(model: Any, ids: Tensor, mask: Tensor | None) -> Results:
    return (item_logprobs(model, ids, mask, TREE),)


def sample(model: Any, ids: Tensor, mask: Tensor | None) -> Results:
    drawn = sample_items(model, ids, mask, TREE, 5, seed=3)
    return drawn.log_probs, drawn.items


@torch.no_grad()
def states(model: Any, ids: Tensor, mask: Tensor | None) -> Results:
    found = trajectory_hidden_states(model, ids, mask, TOKENS.expand(len(ids), -1, -1))
    return found.hidden, found.pooled


CALLS: list[Callable[[Any, Tensor, Tensor | None], Results]] = [search, score, sample, states]
# Fast and by whole sequences; BART's positions are places in the row, so padded on the right only.
FAMILIES = [("t5", "left"), ("t5", "right"), ("mt5", "left"), ("gpt2", "left"), ("qwen3", "right")]
SLOW = [("gemma2", "left"), ("bart", "right")]
CASES = [(name, side, call) for name, side in FAMILIES for call in CALLS]
CASES += [(name, side, call) for name, side in SLOW for call in (search, score)]


@pytest.mark.parametrize(
    ("name", "side", "call"), CASES, ids=[f"{n}-{s}-{c.__name__}" for n, s, c in CASES]
)
def test_any_padding_gives_what_bare_prompts_without_a_mask_give(
    name: str, side: str, call: Any
) -> None:
    """A token of an identifier as padding among them, and numbers that are no tokens."""
    model = small_model(name)
    ids, mask = padded_prompts(side)
    rows = [row[kept].unsqueeze(0) for row, kept in zip(ids, mask.bool(), strict=True)]
    bare = [call(model, row, None) for row in rows]
    expected = [torch.cat(parts) for parts in zip(*bare, strict=True)]
    for pad, known in ((0, 0), (20, 20), (20, None), (-100, None), (10**6, 10**6)):
        model.config.pad_token_id = known
        for given in (mask, mask.bool()):
            found = call(model, ids.masked_fill(mask == 0, pad), given)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("call", CALLS)
def test_tokens_that_look_like_padding_without_a_mask_warn(call: Any) -> None:
    model = small_model("t5")
    real, padded = torch.tensor([[5, 0, 7, 8]]), torch.tensor([[5, 6, 7, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model, real, None)
        call(model, padded, torch.ones_like(padded))
    with pytest.warns(UserWarning, match="begins or ends with the model's pad_token_id = 0"):
        found = call(model, padded, None)
    torch.testing.assert_close(found, call(model, padded, torch.ones_like(padded)))


@pytest.mark.parametrize("call", [*CALLS, decoder_for])
def test_prompt_and_mask_of_different_shapes_are_refused(call: Any) -> None:
    model, ids = small_model("t5"), torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=r"must both be \[B, S\].*got \(1, 3\) and \(1, 2\)"):
        call(model, ids, torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"must both be \[B, S\].*got \(3,\) and None"):
        call(model, ids[0], None)
