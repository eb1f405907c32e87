"""Trajectories that branch off whole sequences have the states of prompts one by one."""

from __future__ import annotations

import pytest
import torch
from support.tiny_decoder import make_decoder, ragged_decoder
from torch import Tensor

from gflowgr.models import (
    GFlowModel,
    PromptLayout,
    prompt_tokens,
    sequence_prompts,
    trajectory_hidden_states,
)
from gflowgr.models.branches import sequence_branch_states

ITEMS = torch.tensor([[3, 5, 7, 9, 3], [1, 2, -1, -1, -1], [4, 4, 8, -1, -1]])
SEPARATED = PromptLayout(prefix=(1, 0), separator=(0, 1), suffix=(0, 1), end_token=1)
# Of the 7 prompts; -1: no branch. One prompt has none at all, one an item of its own past.
OTHERS = torch.tensor([[8, 2], [3, -1], [-1, -1], [11, 12], [-1, 6], [20, 21], [9, 4]])


def branches_of(model: GFlowModel) -> tuple[Tensor, Tensor]:
    tokens = model.item_tokens()[OTHERS.clamp_min(0)]
    mask = (tokens >= 0) & (OTHERS >= 0).unsqueeze(-1)
    return tokens.masked_fill(~mask, 10**6), mask  # padding may be no token


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", [None, SEPARATED], ids=["plain", "separated"])
@pytest.mark.parametrize("ragged", [False, True])
def test_states_are_those_of_the_prompts_one_by_one(
    ragged: bool, layout: PromptLayout | None, attention: str
) -> None:
    model = ragged_decoder() if ragged else make_decoder()
    model.eval()
    model.backbone.set_attn_implementation(attention)
    layout = layout or model.prompt
    prompts = sequence_prompts(ITEMS, model.item_tokens(), layout)
    tokens, mask = branches_of(model)
    valid = prompts.mask.any(-1)
    padding = prompts.attention_mask == 0
    found = sequence_branch_states(
        model.backbone,
        prompts.input_ids.masked_fill(padding, 7),
        prompts.states,
        valid,
        tokens,
        mask,
    )
    at = 0
    for row in ITEMS:
        for place in range(1, int((row >= 0).sum())):
            prompt = prompt_tokens(row[None, :place], model.item_tokens(), layout)
            own = model.item_tokens()[row[place]][None]
            trajectories = torch.cat([own.clamp_min(0), tokens[at]])
            real = torch.cat([own >= 0, mask[at]])
            alone = trajectory_hidden_states(
                model.backbone, *prompt, trajectories[None], real[None]
            )
            torch.testing.assert_close(
                found.hidden[at][real], alone.hidden[0][real], rtol=1e-5, atol=1e-5
            )
            torch.testing.assert_close(found.pooled[at], alone.pooled[0], rtol=1e-5, atol=1e-5)
            at += 1
    assert at == len(OTHERS)


def test_without_branches_the_sequences_are_read_as_they_are() -> None:
    model = make_decoder().eval()
    prompts = sequence_prompts(ITEMS, model.item_tokens(), model.prompt)
    tokens, mask = branches_of(model)
    inputs = (model.backbone, prompts.input_ids, prompts.states, prompts.mask.any(-1))
    some = sequence_branch_states(*inputs, tokens, mask)
    none = sequence_branch_states(*inputs, tokens, torch.zeros_like(mask))
    torch.testing.assert_close(none.hidden[:, 0], some.hidden[:, 0], rtol=1e-5, atol=1e-5)
    assert none.hidden.shape == some.hidden.shape
