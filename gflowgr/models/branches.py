"""Trajectories that branch off whole sequences: a sequence and all its branches as ONE row.

The row is [sequence | branch 1 | ... | branch C]. A branch continues the sequence after one of its
prompts, other than the sequence itself does: its tokens see the sequence up to that prompt's end,
and those before them in their own branch. Positions go on from there, so the states are those of
the prompt and the trajectory alone (up to rounding).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backbone import without_peft
from .packed import TrajectoryStates
from .packed_causal import attention_of
from .sequences import sequence_hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["sequence_branch_states", "sequence_trajectories"]


def sequence_branch_states(
    model: PreTrainedModel | Any,
    input_ids: Tensor,
    states: Tensor,
    valid: Tensor,
    branches: Tensor,
    branch_mask: Tensor,
) -> TrajectoryStates:
    """States of the items of whole sequences, and of trajectories that branch off them.

    One pass over ``S + C (L - 1)`` tokens a row, where C is the number of branches of the row that
    has most: branches that are padding cost nothing.

    Args:
        model: the decoder-only backbone.
        input_ids: [W, S], padded on the right.
        states: int64 [W, P, L] of :class:`~gflowgr.models.sequences.SequencePrompts`.
        valid: true for the positions that have a target [W, P]; T of them, each a prompt.
        branches: tokens of further trajectories of each prompt [T, M, L].
        branch_mask: true for their real tokens [T, M, L]; any value stands at the others.

    Returns:
        Of the T prompts: states [T, 1 + M, L, d], the sequence's own item first, and the mean of
        the prompts' states [T, d], as :func:`~gflowgr.models.trajectory_hidden_states` gives them.
        States of padding are anything.
    """
    plain: Any = without_peft(model)
    rows, size = input_ids.shape
    steps = branches.shape[-1] - 1
    device = input_ids.device
    row, _ = valid.nonzero(as_tuple=True)
    own = states[valid]
    end = own[:, 0]  # where in its row each prompt ends

    # The slot that each branch has in its row; padding has none.
    exists = branch_mask.any(-1)
    prompt, _ = exists.nonzero(as_tuple=True)
    counts = torch.zeros(rows, dtype=torch.int64, device=device)
    counts.scatter_add_(0, row[prompt], torch.ones_like(prompt))
    before = counts.cumsum(0) - counts
    slot = torch.arange(len(prompt), device=device) - before[row[prompt]]
    width = int(counts.max()) if len(prompt) else 0
    tokens = input_ids.new_zeros(rows, width, steps)
    tokens[row[prompt], slot] = branches.masked_fill(~branch_mask, 0)[exists][:, :-1]
    attached = torch.full((rows, max(width, 1)), -1, device=device)
    attached[row[prompt], slot] = end[prompt]
    after = attached[:, :width, None] + 1 + torch.arange(steps, device=device)
    places = torch.arange(size, device=device).expand(rows, -1)

    def visible(row: Tensor, head: Any, query: Tensor, key: Tensor) -> Tensor:
        branch = (query - size).clamp_min(0) // max(steps, 1)
        within = key <= torch.where(query < size, query, attached[row, branch])
        same = (key >= size) & (query >= size) & ((key - size) // max(steps, 1) == branch)
        # A token of padding sees itself: a row without anything to see would be NaN.
        return ((key < size) & within) | (same & (key <= query)) | (key == query)

    total = size + width * steps
    mask = attention_of(plain, visible, rows, total, device) if width and steps else None
    hidden: Tensor = plain.base_model(
        input_ids=torch.cat([input_ids, tokens.flatten(1)], dim=1),
        attention_mask=mask,
        position_ids=torch.cat([places, after.flatten(1)], dim=1),
        use_cache=False,
    ).last_hidden_state
    sequence, others = hidden[:, :size], hidden[:, size:]
    own_states = sequence[row.unsqueeze(1), own]
    first = own_states[:, None, :1].expand(-1, branches.shape[1], -1, -1)
    slots = torch.zeros(exists.shape, dtype=torch.int64, device=device)
    slots[exists] = slot
    if width and steps:
        rest = others.unflatten(1, (width, steps))[row.unsqueeze(1), slots]
    else:
        rest = first.new_zeros(*exists.shape, steps, first.shape[-1])
    further = torch.cat([first, rest], dim=2)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    sums = sequence.to(dtype).cumsum(1)[row, end]
    pooled = sums / (end + 1).unsqueeze(1)
    return TrajectoryStates(torch.cat([own_states.unsqueeze(1), further], dim=1), pooled)


def sequence_trajectories(
    model: PreTrainedModel | Any,
    input_ids: Tensor,
    states: Tensor,
    tokens: Tensor,
    mask: Tensor,
    branches: Tensor | None = None,
    branch_mask: Tensor | None = None,
    observed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole sequences as their T prompts: states [T, N, L, d], tokens and mask [T, N, L].

    Args:
        model: the decoder-only backbone.
        input_ids, tokens, mask, states: of :class:`~gflowgr.models.sequences.SequencePrompts`.
        branches: further trajectories [T, N - 1, L]; None: N is 1.
        branch_mask: true for their real tokens; None: all are.
        observed: false for prompts whose own item is no trajectory [T]; None: all are.
    """
    valid = mask.any(-1)
    tokens, mask = tokens[valid].unsqueeze(1), mask[valid].unsqueeze(1)
    if observed is not None:
        mask = mask & observed[:, None, None]
    if branches is None:
        return sequence_hidden_states(model, input_ids, states, valid), tokens, mask
    if branch_mask is None:
        branch_mask = torch.ones_like(branches, dtype=torch.bool)
    found = sequence_branch_states(model, input_ids, states, valid, branches, branch_mask)
    branches = branches.masked_fill(~branch_mask, 0)
    return found.hidden, torch.cat([tokens, branches], 1), torch.cat([mask, branch_mask], 1)
