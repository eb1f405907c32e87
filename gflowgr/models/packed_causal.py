"""Set-wise forward of decoder-only models: a prompt and its trajectories as ONE sequence.

The sequence is [prompt | branch 1 | ... | branch N]. A branch holds a trajectory's tokens but the
last, which predicts nothing. Its tokens see the prompt's real tokens and those before them in their
own branch; their positions go on after the prompt's last real token, wherever padding and other
branches stand in the sequence. So rotary and learned positions are what they are in a sequence of
prompt and trajectory alone, and the states are the same (up to rounding).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .backbone import DENSE_ATTENTION

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["attention_of", "causal_states"]


def causal_states(
    model: PreTrainedModel | Any, input_ids: Tensor, attention_mask: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """States of prompts and of the trajectories that continue them.

    Args:
        model: a supported decoder-only model with its language modelling head.
        input_ids: prompts [B, S]; padding may be on either side, and is any token of the model.
        attention_mask: int64, 1 for real tokens [B, S], at least one in each row.
        tokens: trajectories [B, N, L], valid token ids also where there is padding.

    Returns:
        States of the prompt [B, S, d], and of the trajectories [B, N, L, d]: state l predicts
        ``tokens[..., l]``.

    Raises:
        TypeError: the model's attention takes no mask of which token may see which.
    """
    batch, branches, length = tokens.shape
    size, steps = input_ids.shape[1], length - 1
    real = attention_mask.bool()
    branch_ids = tokens[..., :-1].flatten(1)
    positions = (real.cumsum(1) - 1).clamp_min(0)
    after = real.sum(1).view(batch, 1, 1) + torch.arange(steps, device=tokens.device)
    after = after.expand(batch, branches, steps).flatten(1)
    if branches == 1 or steps == 0:
        # Causal order and padding suffice here: the model then makes its cheapest mask, or none.
        ones = torch.ones_like(branch_ids, dtype=attention_mask.dtype)
        mask: Any = torch.cat([attention_mask, ones], dim=1)
    else:
        mask = _branch_mask(model, real, branches, steps)
    hidden: Tensor = model.base_model(
        input_ids=torch.cat([input_ids, branch_ids], dim=1),
        attention_mask=mask,
        position_ids=torch.cat([positions, after], dim=1),
        use_cache=False,
    ).last_hidden_state
    prompt, own = hidden[:, :size], hidden[:, size:].unflatten(1, (branches, steps))
    last = (real * torch.arange(size, device=real.device)).argmax(1)
    first = prompt[torch.arange(batch, device=real.device), last]
    first = first[:, None, None].expand(batch, branches, 1, -1)
    return prompt, torch.cat([first, own], dim=2)


def _branch_mask(model: Any, real: Tensor, branches: int, steps: int) -> Any:
    """The mask of which token sees which, for :func:`causal_states`."""
    batch, size = real.shape
    total = size + branches * steps

    def visible(row: Tensor, head: Any, query: Tensor, key: Tensor) -> Tensor:
        of_prompt = (key < size) & real[row, key.clamp_max(size - 1)]
        same = (key >= size) & ((key - size) // steps == (query - size) // steps)
        # A token of padding sees itself only: a row without anything to see would be NaN.
        return ((key <= query) & (of_prompt | same)) | (key == query)

    return attention_of(model, visible, batch, total, real.device)


def attention_of(
    model: Any, visible: Callable[..., Tensor], rows: int, total: int, device: torch.device
) -> Any:
    """The mask of which token sees which, in the form that the model's attention takes.

    Args:
        model: the decoder-only model.
        visible: of (row, head, query, key), which broadcast: whether the query sees the key.
        rows: how many sequences.
        total: tokens of each.
        device: of the mask.

    Raises:
        TypeError: the model's attention takes no mask of its caller.
    """
    kind = model.config._attn_implementation
    if kind == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(visible, rows, None, total, total, device=str(device))
    if kind not in ("sdpa", "eager", DENSE_ATTENTION):
        raise TypeError(
            f"model has attn_implementation {kind!r}, which takes no mask of its caller; "
            "load it with 'sdpa', 'eager' or 'flex_attention'"
        )
    place = torch.arange(total, device=device)
    row = torch.arange(rows, device=device).view(-1, 1, 1, 1)
    mask = visible(row, None, place.view(-1, 1), place)
    if kind != "eager":
        return mask
    dtype = model.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)
