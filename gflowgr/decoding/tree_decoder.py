"""Decoding the nodes of a prefix tree: one new query position per node, whatever its depth.

A node's hidden state needs the keys and values of its ancestors and the prompt's. Both are kept and
shared: the prompt's once per prompt, an ancestor's once for all nodes below it. The decoders here
are functional (a step leaves the state it starts from as it was), so that a tree can be walked in
any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..models.backbone import PromptState, branch_hidden_states, encode_prompt, output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PrefixDecoder", "evaluating", "floats_per_node", "prefix_decoder"]

_BRANCHES = 64  # packed in one sequence by the general decoder, whose mask is quadratic in them


class PrefixDecoder(Protocol):
    """Prompts in, hidden states of prefixes out.

    Attributes:
        batch: number of prompts B.
        head: the output head's weight [V, d] and bias [V] or None; None where hidden states already
            are the logits.
    """

    batch: int
    head: tuple[Tensor, Tensor | None] | None

    def first(self, steps: int) -> tuple[Tensor, Any]:
        """Hidden states [B, 1, d] that predict the first token, and the state to go on from.

        ``steps`` is the largest number of tokens that will follow.
        """
        ...

    def advance(self, state: Any, tokens: Tensor, parents: Tensor) -> tuple[Tensor, Any]:
        """Hidden states [B, K, d] that predict the token after ``tokens``, and their state.

        Args:
            state: of the prefixes [B, K'] that are a token shorter; not changed.
            tokens: last token of each prefix [B, K], or [1, K] for all prompts.
            parents: place of the shorter prefix in ``state``, of the shape of ``tokens``.
        """
        ...


def prefix_decoder(model: PreTrainedModel, input_ids: Tensor, mask: Tensor) -> PrefixDecoder:
    """Encode prompts [B, S] and return what decodes prefixes for them.

    Raises:
        TypeError: the model is not an encoder-decoder model of the T5 family.
    """
    prompt = encode_prompt(model, input_ids, mask)
    weights = _t5_layers(model)
    if weights is None or prompt.hidden.dtype not in (torch.float32, torch.float64):
        return _PackedDecoder(model, prompt)
    return _T5Decoder(model, prompt, weights)


def floats_per_node(model: PreTrainedModel, prompt_length: int) -> int:
    """Numbers that a decoding step holds for each prompt and node, about."""
    config: Any = model.config
    heads = int(config.num_attention_heads)
    width = int(config.hidden_size)
    inner = heads * int(getattr(config, "d_kv", width // heads))
    feed = getattr(config, "d_ff", None) or 4 * width
    return max(8 * inner, 2 * heads * prompt_length) + 2 * int(feed) + 4 * width


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) within, every module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _PackedDecoder:
    """Any model of the T5 family: whole prefixes as branches of one packed sequence."""

    def __init__(self, model: PreTrainedModel, prompt: PromptState) -> None:
        self.model, self.prompt = model, prompt
        self.batch = prompt.hidden.shape[0]
        self.head: tuple[Tensor, Tensor | None] | None = output_head(model)

    def first(self, steps: int) -> tuple[Tensor, Tensor]:
        start = int(self.model.config.decoder_start_token_id)
        shape = (self.batch, 1, 1)
        prefixes = torch.full(shape, start, dtype=torch.long, device=self.prompt.hidden.device)
        return self._hidden(prefixes), prefixes

    def advance(self, state: Tensor, tokens: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
        tokens, parents = tokens.expand(self.batch, -1), parents.expand(self.batch, -1)
        history = state.gather(1, parents.unsqueeze(-1).expand(-1, -1, state.shape[2]))
        prefixes = torch.cat([history, tokens.unsqueeze(-1)], dim=2)
        return self._hidden(prefixes), prefixes

    def _hidden(self, prefixes: Tensor) -> Tensor:
        parts = [
            branch_hidden_states(self.model, self.prompt, part)[:, :, -1]
            for part in prefixes.split(_BRANCHES, dim=1)
        ]
        return torch.cat(parts, dim=1)


@dataclass(frozen=True)
class _SelfWeights:
    """Weights of a decoder layer's self-attention that do not change from call to call."""

    qkv: Tensor


@dataclass(frozen=True)
class _Prompt:
    """What cross-attention of one layer needs of the prompts, in one of two forms.

    ``keys`` [B, d, H S] are the keys with the query projection multiplied in, ``values``
    [B, H S, d] the values with the output projection: all heads of a node are then two plain
    matrix products. That costs 2 d H S per node in place of 2 (d + S) H d_head, which is less up to
    S = d d_head / (d - d_head). Beyond, ``keys`` and ``values`` are the usual [B, H, S, d_head].
    """

    keys: Tensor
    values: Tensor
    folded: bool


@dataclass(frozen=True)
class _Nodes:
    """Decoded prefixes: keys and values of every step, and where each prefix's own are.

    Attributes:
        steps: per step and layer [B or 1, K_s, 2 H d_head].
        places: per step the place of each prefix's ancestor [B or 1, K]; the last step's are None,
            which stands for 0, 1, 2, ...
    """

    steps: tuple[tuple[Tensor, ...], ...]
    places: tuple[Tensor | None, ...]


class _T5Decoder:
    """T5's decoder from its own weights, with ancestors looked up instead of copied.

    Up to the first cross-attention nothing depends on the prompt: with tokens [1, K] that much is
    computed once for all prompts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: PromptState,
        weights: list[_SelfWeights],
    ) -> None:
        config: Any = model.config
        self.model, self.prompt, self.weights = model, prompt, weights
        self.stack: Any = model.get_decoder()
        self.batch = prompt.hidden.shape[0]
        self.heads, self.d_head = int(config.num_heads), int(config.d_kv)
        scaled = getattr(config, "scale_decoder_outputs", False)  # mT5 has no such setting
        self.scale = config.d_model**-0.5 if scaled else 1.0
        self._barred = None if bool(prompt.attention_mask.all()) else prompt.attention_mask == 0
        self._prompt = self._read_prompt()
        self.head: tuple[Tensor, Tensor | None] | None = output_head(model)

    def first(self, steps: int) -> tuple[Tensor, _Nodes]:
        device = self.prompt.hidden.device
        start = torch.tensor([[int(self.model.config.decoder_start_token_id)]], device=device)
        return self._decode(start, (), ())

    def advance(self, state: _Nodes, tokens: Tensor, parents: Tensor) -> tuple[Tensor, _Nodes]:
        places = tuple(
            parents if place is None else _same_rows(place, parents) for place in state.places
        )
        return self._decode(tokens, state.steps, places)

    def _decode(
        self,
        tokens: Tensor,
        steps: tuple[tuple[Tensor, ...], ...],
        places: tuple[Tensor, ...],
    ) -> tuple[Tensor, _Nodes]:
        # Nodes outnumber tokens: the first layer's projections are had per distinct token.
        distinct, which = tokens.unique(return_inverse=True)
        embedded = self.stack.embed_tokens(distinct)
        hidden = embedded[which]
        first: Any = self.stack.block[0].layer[0].SelfAttention
        bias = first.compute_bias(len(steps) + 1, len(steps) + 1)[0, :, -1]  # [H, steps + 1]
        own = []
        for number, block in enumerate(self.stack.block):
            attend, cross, feed = block.layer
            normed = attend.layer_norm(hidden if number else embedded)
            qkv = functional.linear(normed, self.weights[number].qkv)
            qkv = qkv if number else qkv[which]
            query, own_pair = qkv.split(
                [self.heads * self.d_head, 2 * self.heads * self.d_head], -1
            )
            own.append(own_pair.contiguous())
            pairs = [
                _take(layers[number], place) for layers, place in zip(steps, places, strict=True)
            ]
            mixed = self._self_attention(query, [*pairs, own_pair], bias)
            hidden = hidden + attend.SelfAttention.o(mixed)
            hidden = hidden + self._cross_attention(
                cross.EncDecAttention, cross.layer_norm(hidden), self._prompt[number]
            )
            hidden = hidden + feed.DenseReluDense(feed.layer_norm(hidden))
        hidden = self.stack.final_layer_norm(hidden) * self.scale
        return hidden, _Nodes((*steps, tuple(own)), (*places, None))

    def _self_attention(self, query: Tensor, pairs: list[Tensor], bias: Tensor) -> Tensor:
        """Attention of each node to its ancestors and itself; pairs are keys then values."""
        heads = (self.heads, self.d_head)
        query = query.unflatten(-1, heads)
        split = [pair.unflatten(-1, (2, *heads)) for pair in pairs]
        scores = [(query * pair[..., 0, :, :]).sum(-1) for pair in split]
        share = (torch.stack(torch.broadcast_tensors(*scores), -1) + bias).softmax(-1)
        mixed = share[..., :1] * split[0][..., 1, :, :]
        for step, pair in enumerate(split[1:], 1):
            mixed = torch.addcmul(mixed, share[..., step, None], pair[..., 1, :, :])
        return mixed.flatten(-2)

    def _cross_attention(self, attention: Any, hidden: Tensor, prompt: _Prompt) -> Tensor:
        hidden = hidden.expand(self.batch, -1, -1)
        if prompt.folded:
            scores = (hidden @ prompt.keys).unflatten(-1, (self.heads, -1))
            if self._barred is not None:
                lowest = torch.finfo(scores.dtype).min
                scores = scores.masked_fill(self._barred[:, None, None], lowest)
            return scores.softmax(-1).flatten(-2) @ prompt.values
        query = attention.q(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        seen = None if self._barred is None else ~self._barred[:, None, None]
        mixed = functional.scaled_dot_product_attention(
            query, prompt.keys, prompt.values, attn_mask=seen, scale=1.0
        )
        return attention.o(mixed.transpose(1, 2).flatten(-2))

    def _read_prompt(self) -> list[_Prompt]:
        states = self.prompt.hidden
        length, width = states.shape[1:]
        folded = length * (width - self.d_head) <= width * self.d_head
        layers = []
        for block in self.stack.block:
            cross: Any = block.layer[1].EncDecAttention
            keys, values = (
                part(states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in (cross.k, cross.v)
            )
            if folded:
                query = cross.q.weight.unflatten(0, (self.heads, -1))  # [H, d_head, d]
                output = cross.o.weight.unflatten(1, (self.heads, -1))  # [d, H, d_head]
                keys = torch.einsum("hed,bhse->bdhs", query, keys).flatten(2)
                values = torch.einsum("dhe,bhse->bhsd", output, values).flatten(1, 2)
            layers.append(_Prompt(keys.contiguous(), values.contiguous(), folded))
        return layers


def _t5_layers(model: PreTrainedModel) -> list[_SelfWeights] | None:
    """The fused self-attention weights, or None for a model that is not plain T5.

    Adapters and quantisation replace linear layers by other modules, whose weights alone are not
    what they compute.
    """
    if getattr(model.config, "model_type", None) not in ("t5", "mt5"):
        return None
    stack: Any = model.get_decoder()
    out = []
    for block in stack.block:
        attend, cross = block.layer[0].SelfAttention, block.layer[1].EncDecAttention
        parts = [getattr(attention, name) for attention in (attend, cross) for name in "qkvo"]
        if any(type(part) is not nn.Linear or part.bias is not None for part in parts):
            return None
        out.append(_SelfWeights(torch.cat([part.weight for part in parts[:3]])))
    return out


def _take(pairs: Tensor, places: Tensor) -> Tensor:
    """``pairs`` [B or 1, K', D] at ``places`` [B or 1, K], with as few rows as possible."""
    if pairs.shape[1] == 1:
        return pairs  # the start token: every node's ancestor
    if places.shape[0] == 1:
        return pairs.index_select(1, places[0])
    if pairs.shape[0] == 1:
        return pairs[0][places]
    rows = torch.arange(pairs.shape[0], device=pairs.device).unsqueeze(1) * pairs.shape[1]
    return pairs.flatten(0, 1)[rows + places]


def _same_rows(places: Tensor, parents: Tensor) -> Tensor:
    """``places`` [B or 1, K'] of the parents [B or 1, K]."""
    rows = max(places.shape[0], parents.shape[0])
    return places.expand(rows, -1).gather(1, parents.expand(rows, -1))
