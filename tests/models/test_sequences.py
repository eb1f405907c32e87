"""Whole sequences: every prompt of a sequence in one pass equals the prompts one by one."""

from __future__ import annotations

import pytest
import torch
from support.tiny_decoder import make_decoder, ragged_decoder
from support.tiny_shop import make_model
from torch import Tensor

from gflowgr.models import (
    GFlowModel,
    PromptLayout,
    prompt_tokens,
    sequence_hidden_states,
    sequence_prompts,
    trajectory_hidden_states,
)
from gflowgr.models.sequences import check_sequences

ITEMS = torch.tensor([[3, 5, 7, 9, 3], [1, 2, -1, -1, -1], [4, 4, 8, -1, -1]])
SEPARATED = PromptLayout(prefix=(1, 0), separator=(0, 1), suffix=(0, 1), end_token=1)


def one_by_one(model: GFlowModel, layout: PromptLayout) -> list[tuple[Tensor, Tensor]]:
    """States [L, d] and mask [L] of each item after the first, from a prompt of its own."""
    item_tokens, found = model.item_tokens(), []
    for row in ITEMS:
        for place in range(1, int((row >= 0).sum())):
            prompt = prompt_tokens(row[None, :place], item_tokens, layout)
            tokens = item_tokens[row[place]][None, None]
            mask = tokens >= 0
            states = trajectory_hidden_states(model.backbone, *prompt, tokens.clamp_min(0), mask)
            found.append((states.hidden[0, 0], mask[0, 0]))
    return found


@pytest.mark.parametrize("separated", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_states_are_those_of_the_prompts_one_by_one(ragged: bool, separated: bool) -> None:
    model = ragged_decoder() if ragged else make_decoder()
    model.eval()
    layout = SEPARATED if separated else model.prompt
    prompts = sequence_prompts(ITEMS, model.item_tokens(), layout)
    valid = prompts.mask.any(-1)
    states = sequence_hidden_states(model.backbone, prompts.input_ids, prompts.states, valid)
    wanted = one_by_one(model, layout)
    assert len(wanted) == len(states) == 7
    for found, (expected, mask) in zip(states[:, 0], wanted, strict=True):
        torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)


def test_the_supervised_loss_is_the_mean_of_the_prompts_losses() -> None:
    model = make_decoder().eval()
    prompts = sequence_prompts(ITEMS, model.item_tokens(), model.prompt)
    whole = model(
        prompts.input_ids,
        prompts.attention_mask,
        prompts.tokens,
        prompts.mask,
        states=prompts.states,
    )
    losses = []
    for row in ITEMS:
        for place in range(1, int((row >= 0).sum())):
            prompt = prompt_tokens(row[None, :place], model.item_tokens(), model.prompt)
            losses.append(model(*prompt, model.item_tokens()[row[place]][None, None])["loss"])
    torch.testing.assert_close(whole["loss"], torch.stack(losses).mean(), rtol=1e-5, atol=1e-5)


def test_padding_is_read_by_nothing() -> None:
    model = make_decoder().eval()
    prompts = sequence_prompts(ITEMS, model.item_tokens(), model.prompt)
    padding = prompts.attention_mask == 0
    assert padding.any()
    valid = prompts.mask.any(-1)
    poisoned = prompts.input_ids.masked_fill(padding, 7)
    one, two = (
        sequence_hidden_states(model.backbone, ids, prompts.states, valid)
        for ids in (prompts.input_ids, poisoned)
    )
    assert torch.equal(one, two)


def test_prompts_that_do_not_begin_one_another_are_refused() -> None:
    model = make_decoder()
    with pytest.raises(ValueError, match=r"what follows a history .* got \[1\] and \[\]"):
        check_sequences(model.backbone, PromptLayout(suffix=(1,)), 5)
    with pytest.raises(ValueError, match=r"may have 2 items, .* has 4 before its last"):
        check_sequences(model.backbone, PromptLayout(max_items=2), 5)
    with pytest.raises(ValueError, match="need a decoder-only model"):
        check_sequences(make_model().backbone, PromptLayout(), 5)


def test_items_that_are_none_are_named() -> None:
    model = make_decoder()
    with pytest.raises(ValueError, match="item 999"):
        sequence_prompts(torch.tensor([[1, 999]]), model.item_tokens(), model.prompt)
    with pytest.raises(ValueError, match=r"items must be \[W, H\] with H >= 2"):
        sequence_prompts(torch.tensor([[1]]), model.item_tokens(), model.prompt)
