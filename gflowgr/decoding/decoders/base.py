"""The interface of stepwise decoders, and the cache of each beam's identifier tokens."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["IdentifierCache", "StepDecoder", "dot_products", "mix"]

Head = tuple[Tensor, "Tensor | None"]


class StepDecoder(ABC):
    """Continues B prompts by identifiers, one token of all beams at a time.

    The prompts were processed when the decoder was made, and are kept once for all their beams::

        hidden = decoder.first()                          # [B, 1, d]: predicts the first token
        hidden = decoder.advance(tokens, parents)         # [B, K, d]: predicts the one after

    Attributes:
        batch: number of prompts B.
        device: where tokens are expected, and hidden states are returned.
        head: the output head's weight [V, d] and bias [V] or None, so that the model's logits are
            ``hidden @ weight.T + bias``; None where ``hidden`` already is the logits [B, K, V].
    """

    batch: int
    device: torch.device
    head: Head | None

    @abstractmethod
    def first(self) -> Tensor:
        """Hidden states that predict the first identifier token [B, 1, d]; call it once."""

    @abstractmethod
    def advance(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Continue beams by one token.

        Args:
            tokens: the new beams' last tokens [B, K], int64; any number for an empty beam.
            parents: the previous beam (0 after :meth:`first`) that each continues [B, K], int64; a
                negative one, of an empty beam, stands for 0.

        Returns:
            Hidden states that predict the next token [B, K, d]; meaningless for empty beams.
        """

    def prompt_tensors(self) -> list[Tensor]:
        """What the steps read of the prompts: always as many, of shapes that [B, S] decides.

        With those of other prompts of that shape copied into them, a decoder that has not begun
        continues the other prompts.

        Raises:
            ValueError: the steps of this decoder do more than read tensors.
        """
        raise ValueError(
            f"the steps of a {type(self).__name__} cannot be kept for other prompts; see "
            "gflowgr.decoding.decoders.decoder_kind for why a model is decoded by it"
        )

    def fork(self) -> StepDecoder:
        """A second decoder at the same beams; each goes on without the other.

        The prompts' state and the steps so far are shared, not copied, so that parts of a tree can
        be walked one after the other from the prefix that they have in common.
        """
        return copy.copy(self)

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits [B, K, V] of ``hidden`` [B, K, d]."""
        return hidden if self.head is None else torch.nn.functional.linear(hidden, *self.head)

    def _rows(self, parents: Tensor, width: int) -> Tensor:
        """Where each beam's parent is among B x ``width`` beams, int64 [B * K]."""
        start = torch.arange(0, self.batch * width, width, device=parents.device)
        return (parents.clamp_min(0) + start.unsqueeze(1)).flatten()


class IdentifierCache:
    """Keys and values of the identifier tokens of each beam.

    Each step's keys and values stay in place, [B * K, width] per layer; re-ordering the beams
    re-orders row numbers only. A layer gathers the rows that it needs when it reads them.
    """

    def __init__(self, layers: int) -> None:
        self.steps = 0
        self._kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(layers)]
        self._ancestors: list[Tensor] = []

    def fork(self) -> IdentifierCache:
        """A cache of the same steps, whose later steps are its own."""
        twin = copy.copy(self)
        twin._kept = [list(kept) for kept in self._kept]
        return twin

    @property
    def ancestors(self) -> list[Tensor]:
        """For each earlier step, oldest first: where each beam's token is in it, int64 [B * K]."""
        return self._ancestors

    def begin_step(self, rows: Tensor | None) -> None:
        """Open a step, in which beam i continues beam ``rows[i]`` of the step before."""
        if rows is not None:
            self._ancestors = [*(past[rows] for past in self._ancestors), rows]
        self.steps += 1

    def put(self, layer: int, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Store this step's keys and values of a layer, each [B * K, width].

        Returns:
            Those of every step, oldest first, as they were stored.
        """
        kept = self._kept[layer]
        kept.append((key, value))
        return kept

    def of_beams(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each beam's tokens, oldest first: ``steps`` times [B * K, width]."""
        *past, (key, value) = self._kept[layer]
        pairs = list(zip(past, self._ancestors, strict=True))
        keys = [pair[0].index_select(0, rows) for pair, rows in pairs]
        values = [pair[1].index_select(0, rows) for pair, rows in pairs]
        return [*keys, key], [*values, value]


def dot_products(query: Tensor, keys: list[Tensor]) -> Tensor:
    """Products of each beam's query with its own keys.

    Args:
        query: [..., G, d_head]: G query heads per key head.
        keys: T times [..., d_head].

    Returns:
        [T, ..., G] in the query's dtype.
    """
    products = [torch.linalg.vecdot(query, key.unsqueeze(-2)) for key in keys]
    return torch.stack(products)


def mix(weights: Tensor, values: list[Tensor]) -> Tensor:
    """Weighted sum of each beam's own values.

    Args:
        weights: [T, ..., G].
        values: T times [..., d_head].

    Returns:
        [..., G, d_head].
    """
    weights = weights.unsqueeze(-1)
    mixed = weights[0] * values[0].unsqueeze(-2)
    for weight, value in zip(weights[1:], values[1:], strict=True):
        mixed.addcmul_(weight, value.unsqueeze(-2))
    return mixed
