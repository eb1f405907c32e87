"""This package's beam search behind ``transformers.generate``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import (
    EosTokenCriteria,
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from ..models.settings import Normalize
from ..tree import PrefixTree
from .beam import BeamSearchOutput, constrained_beam_search

__all__ = ["constrained_generate"]

# The values of each option that change nothing; any other value is refused and not ignored.
# Options of sampling only (temperature, top_k, ...) are ignored, as generate does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_sample": (None, False),
    "num_beam_groups": (None, 1),
    "diversity_penalty": (None, 0.0),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "min_new_tokens": (None, 0),
    "min_length": (None, 0),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "renormalize_logits": (None, False),
    "remove_invalid_values": (None, False),
    "watermarking_config": (None,),
    "token_healing": (None, False),
    "max_time": (None,),
    "stop_strings": (None,),
    "prompt_lookup_num_tokens": (None,),
    "use_mtp": (None, False),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_logits": (None, False),
}


def constrained_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    tree: PrefixTree,
    inputs_tensor: Tensor | None = None,
    normalize: Normalize | None = None,
    available: Tensor | None = None,
    exclude: Tensor | None = None,
    **model_kwargs: Any,
) -> GenerateBeamEncoderDecoderOutput | GenerateBeamDecoderOnlyOutput | Tensor:
    """Decode by :func:`constrained_beam_search`; for ``generate(custom_generate=...)``.

    An existing call of beam search needs two arguments more::

        model.generate(**inputs, num_beams=20, num_return_sequences=20, max_new_tokens=4,
                       custom_generate=constrained_generate, tree=tree)

    ``num_beams``, ``num_return_sequences``, ``max_new_tokens`` (or ``max_length``),
    ``length_penalty``, ``return_dict_in_generate``, ``output_scores`` and the special tokens are
    those of the call. Options that the search does not support are refused by name.

    Args:
        model: the model.
        input_ids: prompts (decoder-only) or start tokens [B * beams, P], from ``generate``.
        logits_processor: none but the defaults of ``generate``.
        stopping_criteria: likewise.
        generation_config: what the call asks for.
        tree: prefix tree in the model's token ids, on the model's device; an argument of
            ``generate``, as the next three are.
        inputs_tensor: the encoder's prompts [B, S], from ``generate``.
        normalize: see :func:`constrained_beam_search`.
        available: items that may be returned, bool [items].
        exclude: items that a prompt may not get [B, E], -1 for padding.
        **model_kwargs: from ``generate``; ``attention_mask`` is used.

    Returns:
        Sequences [B * num_return_sequences, P + length] as ``generate`` returns them: prompt or
        start token, identifier, end token where there is room and the identifier carries none,
        padding. Each identifier once, best first; where there are too few, the rest is padding
        after the prompt, with score -inf. With ``return_dict_in_generate``, an output whose
        ``sequences_scores`` (with ``output_scores``) are log P(identifier) over the identifier's
        length to the power of ``length_penalty``. An end token that was added here has no share in
        them: it is certain under the constraint. ``scores`` is None: no step's whole is kept.

    Raises:
        ValueError: an option is not supported, or identifiers do not fit ``max_new_tokens``.
        TypeError: the model is not supported.
    """
    _check_options(generation_config, logits_processor, stopping_criteria, model_kwargs)
    beams = int(generation_config.num_beams or 1)
    count = int(generation_config.num_return_sequences or 1)
    prompt = input_ids[:: max(beams, count)]
    penalty = 1.0 if generation_config.length_penalty is None else generation_config.length_penalty
    room = int(generation_config.max_length) - prompt.shape[1]
    if room < tree.max_length:
        raise ValueError(
            f"max_new_tokens = {room}, but the tree has identifiers of {tree.max_length} tokens"
        )
    if tree.layout.leaf_rank:  # lengths differ
        _check_ranking(generation_config, penalty)

    inputs, encoded = prompt, None
    if model.config.is_encoder_decoder:
        inputs = _encoder_inputs(prompt, inputs_tensor, model_kwargs)
        # generate has run the encoder, and repeated its states for the beams.
        encoded = model_kwargs["encoder_outputs"][0][:: max(beams, count)]
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(inputs) if mask is None else mask[:: max(beams, count)]
    found = constrained_beam_search(
        model,
        inputs,
        mask,
        tree,
        num_beams=max(beams, count),
        num_return=_items_of(tree, max(beams, count)),
        normalize=normalize,
        available=available,
        exclude=exclude,
        encoded=encoded,
    )
    tokens, scores = _distinct(found, count)
    length = (tokens >= 0).sum(-1)
    sequences = _sequences(prompt, tokens.flatten(0, 1), generation_config, room)
    if not generation_config.return_dict_in_generate:
        return sequences
    own = (scores / length.clamp_min(1) ** penalty).flatten()
    output: Any = (
        GenerateBeamEncoderDecoderOutput
        if model.config.is_encoder_decoder
        else GenerateBeamDecoderOnlyOutput
    )
    return output(
        sequences=sequences, sequences_scores=own if generation_config.output_scores else None
    )


def _check_options(
    config: GenerationConfig,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    model_kwargs: dict[str, Any],
) -> None:
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, None)
        if value not in neutral:
            raise ValueError(f"{name} = {value!r} is not supported by constrained_generate")
    for processor in processors:
        raise ValueError(
            f"logits_processor: {type(processor).__name__} is not supported by "
            "constrained_generate: its scores are never whole"
        )
    for criterion in criteria:
        if not isinstance(criterion, MaxLengthCriteria | EosTokenCriteria):
            raise ValueError(
                f"stopping_criteria: {type(criterion).__name__} is not supported by "
                "constrained_generate"
            )
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds is not supported by constrained_generate: pass input_ids")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError(
            "past_key_values is not supported by constrained_generate: it holds tokens"
        )


def _check_ranking(config: GenerationConfig, penalty: float) -> None:
    """The search ranks identifiers of different lengths by their log-probabilities."""
    if penalty != 0.0:
        raise ValueError(
            f"length_penalty = {penalty} is not supported for identifiers of different lengths: "
            "they are ranked by their log-probabilities; pass length_penalty=0.0"
        )
    if config.early_stopping is True:
        raise ValueError(
            "early_stopping = True is not supported for identifiers of different lengths: "
            "a longer one may be better than those found first"
        )


def _encoder_inputs(start: Tensor, inputs: Tensor | None, model_kwargs: dict[str, Any]) -> Tensor:
    """The encoder's token ids [B, S]."""
    if start.shape[1] != 1:
        raise ValueError(
            f"decoder_input_ids of {start.shape[1]} tokens is not supported by "
            "constrained_generate: identifiers follow the decoder's start token"
        )
    if inputs is None or inputs.is_floating_point() or bool((inputs < 0).any()):
        raise ValueError(
            "encoder_outputs without input_ids is not supported by constrained_generate"
        )
    return inputs


def _items_of(tree: PrefixTree, identifiers: int) -> int:
    """Items that so many identifiers may stand for: items share identifiers, sequences do not."""
    if tree.layout.item_begin == 0:
        return identifiers
    begin, end = tree.leaf_items(torch.arange(tree.num_leaves, device=tree.device))
    return min(identifiers * int((end - begin).max()), tree.layout.num_entries)


def _distinct(found: BeamSearchOutput, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` identifiers [B, count, L] and their scores, each identifier once."""
    tokens, scores = found.tokens, found.scores
    again = torch.zeros_like(scores, dtype=torch.bool)
    again[:, 1:] = (tokens[:, 1:] == tokens[:, :-1]).all(-1)  # those of one leaf are together
    empty = found.items < 0
    order = (again | empty).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    gone = (again | empty).gather(1, order)
    tokens = tokens.gather(1, order.unsqueeze(-1).expand(-1, -1, tokens.shape[2]))
    tokens = tokens.masked_fill(gone.unsqueeze(-1), -1)
    scores = scores.gather(1, order).masked_fill(gone, -torch.inf)
    missing = count - order.shape[1]
    tokens = torch.nn.functional.pad(tokens, (0, 0, 0, missing), value=-1)
    return tokens, torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)


def _sequences(prompt: Tensor, tokens: Tensor, config: GenerationConfig, room: int) -> Tensor:
    """Prompt [B, P], identifiers [B * count, L] (-1 beyond the end), end token, padding."""
    ends = config.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
    tokens = torch.nn.functional.pad(tokens, (0, 1), value=-1)
    length = (tokens >= 0).sum(1, keepdim=True)
    if ends:
        last = tokens.gather(1, (length - 1).clamp_min(0))
        carries = torch.isin(last, torch.tensor(ends, device=tokens.device))
        add = ~carries & (length > 0) & (length < room)
        tokens = torch.where(
            add & (torch.arange(tokens.shape[1], device=tokens.device) == length), ends[0], tokens
        )
        length = length + add.long()
    pad = config.pad_token_id if config.pad_token_id is not None else ends[0] if ends else -1
    tokens = tokens[:, : int(length.max()) if len(length) else 0]
    prompts = prompt.repeat_interleave(len(tokens) // max(1, len(prompt)), dim=0)
    return torch.cat([prompts, tokens.masked_fill(tokens < 0, pad)], dim=1)
