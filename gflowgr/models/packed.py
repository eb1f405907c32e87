"""Set-wise forward: all trajectories of a prompt as branches of ONE packed sequence.

However many trajectories there are, the prompt is read once. An encoder-decoder of the T5 family
encodes it, computes its cross-attention keys and values once, and runs the branches as one decoder
sequence behind one start token; a block-diagonal causal mask keeps them apart. T5's position bias
depends only on the distance between two tokens, and within a branch distances are what they are in
a sequence of its own; so the packed forward equals N separate ones (up to rounding). Decoder-only
models run prompt and branches as one sequence: :mod:`gflowgr.models.packed_causal`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..distributed import is_shard
from .backbone import real_prompt, without_peft
from .bare import BareModel
from .families import why_unsupported_causal
from .packed_causal import causal_states
from .wrapped import accelerate_autocast, unwrapped, warn_if_compiled

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "PromptState",
    "TrajectoryStates",
    "encode_prompt",
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
        """Mean of the prompt's real positions [B, d] (input of the partition head), in float32 or
        wider: the sum of a long prompt's states overflows float16."""
        real = self.attention_mask.bool().unsqueeze(-1)
        dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        total = self.hidden.masked_fill(~real, 0.0).sum(1, dtype=dtype)
        return total / real.sum(1).clamp_min(1)


@dataclass(frozen=True)
class TrajectoryStates:
    """A backbone's states of prompts and their trajectories.

    Attributes:
        hidden: [B, N, L, d]: state l predicts token l of the trajectory; ``hidden @ weight.T +
            bias`` of :func:`~gflowgr.models.output_head` are the model's logits.
        pooled: mean of the states of the prompt's real tokens [B, d].
    """

    hidden: Tensor
    pooled: Tensor


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


def _branch_states(model: PreTrainedModel, prompt: PromptState, prefixes: Tensor) -> Tensor:
    """Decoder states of N prefixes per prompt, packed in one sequence.

    Args:
        model: the encoder-decoder model.
        prompt: the encoded prompt.
        prefixes: decoder inputs [B, N, P], each starting with the decoder's start token.

    Returns:
        [B, N, P, d]: state at position p predicts the token after ``prefixes[..., p]``, scaled so
        that ``hidden @ weight.T`` of :func:`~gflowgr.models.output_head` are the model's logits.
    """
    batch, branches, length = prefixes.shape
    decoder: Any = model.get_decoder()
    config: Any = model.config
    bias = _only_position_bias(decoder) if branches > 1 else None
    # The start token is every branch's first: where it can, it stands once, before all of them.
    shared = 0 if bias is None else 1
    steps = length - shared
    mask = _block_causal_mask(shared, branches, steps, prompt.hidden.dtype, prompt.hidden.device)
    if bias is not None:
        mask = mask + _start_correction(bias, branches, steps, mask.device)
    output = decoder(
        input_ids=torch.cat([prefixes[:, 0, :shared], prefixes[:, :, shared:].flatten(1)], dim=1),
        attention_mask=mask.expand(batch, -1, -1, -1),
        encoder_hidden_states=prompt.hidden,
        encoder_attention_mask=prompt.attention_mask,
        use_cache=False,
    )
    hidden = output.last_hidden_state
    if getattr(config, "scale_decoder_outputs", False):  # mT5 has no such setting
        hidden = hidden * config.d_model**-0.5
    first = hidden[:, None, :shared].expand(-1, branches, -1, -1)
    return torch.cat([first, hidden[:, shared:].unflatten(1, (branches, steps))], dim=2)


def trajectory_hidden_states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None = None,
) -> TrajectoryStates:
    """Hidden states from which each token of each trajectory is predicted, in one forward pass.

    Equal to N separate passes over prompt and trajectory, up to rounding (without dropout).

    Args:
        model: an encoder-decoder of the T5 family, or a decoder-only Gemma (the first), GPT-2,
            GPT-NeoX, Llama, Mistral, OLMo 2, Qwen2, Qwen3 or SmolLM3 without a sliding window, with
            its language modelling head; also in a ``peft.PeftModel``, in what ``torch.compile``
            returns (it then runs uncompiled, with a warning), and as ``accelerate`` prepared it
            (its autocast holds here too). Within data parallelism, call this in the forward of the
            module that is wrapped.
        input_ids: prompts [B, S]; padding may be on either side and hold any value.
        attention_mask: 1 for real tokens [B, S]; a decoder-only model needs one in each row. None:
            every token is real.
        tokens: trajectories [B, N, L], token ids of the model.
        mask: true for real tokens [B, N, L]; padding may be any token, or a whole trajectory, and
            hold any value.

    Returns:
        The states, aligned with ``tokens``; in float32 where accelerate's autocast was entered, as
        the model's own outputs are.

    Raises:
        TypeError: the model is none of these, its attention takes no mask, its ``peft`` adapters
            add tokens to prompts, or gradients are recorded and it is wrapped in data parallelism.
    """
    plain = unwrapped(model)
    warn_if_compiled(model)
    model = plain
    autocast = accelerate_autocast(model, input_ids.device)
    if autocast is None:
        return _states(without_peft(model), input_ids, attention_mask, tokens, mask)
    with autocast:
        states = _states(without_peft(model), input_ids, attention_mask, tokens, mask)
    return TrajectoryStates(states.hidden.float(), states.pooled.float())


def _states(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
) -> TrajectoryStates:
    if isinstance(model, BareModel):
        model.forward()  # says why it cannot
    input_ids, attention_mask = real_prompt(model, input_ids, attention_mask)
    if mask is not None:
        tokens = tokens.masked_fill(~mask, 0)
    if not getattr(model.config, "is_encoder_decoder", False):
        _check_causal(model)
        states, hidden = causal_states(model, input_ids, attention_mask, tokens)
        return TrajectoryStates(hidden, PromptState(states, attention_mask).pooled())
    config: Any = model.config
    prompt = encode_prompt(model, input_ids, attention_mask)
    start = torch.full_like(tokens[..., :1], config.decoder_start_token_id)
    hidden = _branch_states(model, prompt, torch.cat([start, tokens[..., :-1]], dim=-1))
    return TrajectoryStates(hidden, prompt.pooled())


def _block_causal_mask(
    shared: int, branches: int, steps: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Additive mask [1, 1, P, P]: 0 where a token may look, the lowest number elsewhere.

    Of ``shared`` first tokens, which all see, and ``branches`` times ``steps`` tokens.
    """
    position = torch.arange(shared + branches * steps, device=device)
    branch = (position - shared) // max(steps, 1)
    before = position[:, None] >= position[None, :]
    visible = before & ((branch[:, None] == branch[None, :]) | (position < shared)[None, :])
    lowest = torch.finfo(dtype).min
    mask = torch.full(visible.shape, lowest, dtype=dtype, device=device)
    return mask.masked_fill_(visible, 0.0)[None, None]


def _only_position_bias(decoder: Any) -> Any:
    """The attention whose position bias serves all layers, if there is one that can be read here.

    UMT5 has one in each layer; and FSDP may hold its weight in shards until the layer runs.
    """
    found = [m for m in decoder.modules() if getattr(m, "has_relative_attention_bias", False)]
    if len(found) != 1 or is_shard(found[0].relative_attention_bias.weight):
        return None
    return found[0]


def _start_correction(attention: Any, branches: int, steps: int, device: torch.device) -> Tensor:
    """The correction of the position bias for the shared start token [1, H, P, P].

    The decoder takes distances from places in the sequence. Within a branch they are right; to the
    start token they are right for the first branch alone.
    """
    place = torch.arange(1 + branches * steps, device=device)
    own = torch.where(place > 0, (place - 1) % max(steps, 1) + 1, 0)
    bias = attention.compute_bias(len(place), 1, device=device)  # by distance [1, H, P, 1]
    return nn.functional.pad(bias[:, :, own] - bias, (0, branches * steps))


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


def _check_causal(model: PreTrainedModel) -> None:
    reason = why_unsupported_causal(model)
    if reason is not None:
        raise TypeError(
            "model must be of the T5 family, or a decoder-only model whose attention and positions "
            f"can be given from outside; {type(model).__name__} is not: {reason}"
        )
