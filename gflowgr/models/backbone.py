"""Set-wise forward: all trajectories of a prompt as branches of ONE packed decoder sequence.

The prompt is encoded once and its cross-attention keys and values are computed once, however many
trajectories there are. A block-diagonal causal mask keeps the branches apart. T5's position bias
depends only on the distance between two tokens, and within a branch distances are what they are in
a sequence of its own; so the packed forward equals N separate ones (up to rounding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "PromptState",
    "branch_hidden_states",
    "encode_prompt",
    "output_head",
    "trajectory_hidden_states",
]


@dataclass(frozen=True)
class PromptState:
    """An encoded prompt.

    Attributes:
        hidden: encoder states [B, S, d].
        attention_mask: 1 for real tokens [B, S].
    """

    hidden: Tensor
    attention_mask: Tensor

    def pooled(self) -> Tensor:
        """Mean of the prompt's real positions [B, d] (input of the partition head)."""
        weight = self.attention_mask.to(self.hidden.dtype).unsqueeze(-1)
        return (self.hidden * weight).sum(1) / weight.sum(1).clamp_min(1.0)


def encode_prompt(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> PromptState:
    """Run the encoder once.

    Args:
        model: an encoder-decoder model of ``transformers`` with relative positions (T5).
        input_ids: prompt tokens [B, S].
        attention_mask: 1 for real tokens [B, S].

    Raises:
        TypeError: the model is not an encoder-decoder model of the T5 family.
    """
    _check_supported(model)
    encoder: Any = model.get_encoder()
    output = encoder(input_ids=input_ids, attention_mask=attention_mask)
    return PromptState(output.last_hidden_state, attention_mask)


def branch_hidden_states(model: PreTrainedModel, prompt: PromptState, prefixes: Tensor) -> Tensor:
    """Decoder states of N prefixes per prompt, packed in one sequence.

    Args:
        model: the encoder-decoder model.
        prompt: the encoded prompt.
        prefixes: decoder inputs [B, N, P], each starting with the decoder's start token.

    Returns:
        [B, N, P, d]: state at position p predicts the token after ``prefixes[..., p]``, scaled so
        that ``hidden @ weight.T`` of :func:`output_head` are the model's logits.
    """
    batch, branches, length = prefixes.shape
    decoder: Any = model.get_decoder()
    config: Any = model.config
    mask = _block_causal_mask(branches, length, prompt.hidden.dtype, prompt.hidden.device)
    output = decoder(
        input_ids=prefixes.reshape(batch, branches * length),
        attention_mask=mask.expand(batch, -1, -1, -1),
        encoder_hidden_states=prompt.hidden,
        encoder_attention_mask=prompt.attention_mask,
        use_cache=False,
    )
    hidden = output.last_hidden_state
    if getattr(config, "scale_decoder_outputs", False):  # mT5 has no such setting
        hidden = hidden * config.d_model**-0.5
    return hidden.view(batch, branches, length, -1)


def trajectory_hidden_states(
    model: PreTrainedModel, prompt: PromptState, tokens: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Hidden states from which each token of each trajectory is predicted.

    Args:
        model: the encoder-decoder model.
        prompt: the encoded prompt.
        tokens: trajectories [B, N, L], token ids of the model.
        mask: true for real tokens [B, N, L]; padding may hold any value.

    Returns:
        [B, N, L, d], aligned with ``tokens``: state l predicts ``tokens[..., l]``.
    """
    config: Any = model.config
    if mask is not None:
        tokens = tokens.masked_fill(~mask, config.pad_token_id)
    start = torch.full_like(tokens[..., :1], config.decoder_start_token_id)
    return branch_hidden_states(model, prompt, torch.cat([start, tokens[..., :-1]], dim=-1))


def output_head(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """The output head's weight [V, d] and bias [V] or None."""
    head: Any = model.get_output_embeddings()
    return head.weight, getattr(head, "bias", None)


def _block_causal_mask(
    branches: int, length: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Additive mask [1, 1, N P, N P]: 0 where a token may look, the lowest number elsewhere."""
    position = torch.arange(branches * length, device=device)
    branch = position // length
    visible = (branch[:, None] == branch[None, :]) & (position[:, None] >= position[None, :])
    lowest = torch.finfo(dtype).min
    mask = torch.full(visible.shape, lowest, dtype=dtype, device=device)
    return mask.masked_fill_(visible, 0.0)[None, None]


def _check_supported(model: PreTrainedModel) -> None:
    config = getattr(model, "config", None)
    if not (
        getattr(config, "is_encoder_decoder", False)
        and hasattr(config, "relative_attention_num_buckets")
    ):
        raise TypeError(
            "model must be a transformers encoder-decoder with relative positions (T5 family); "
            f"got {type(model).__name__}"
        )
