"""What a stepwise decoder is, and the cache of the few identifier tokens of each beam."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["IdentifierCache", "StepDecoder"]

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

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits [B, K, V] of ``hidden`` [B, K, d]."""
        return hidden if self.head is None else torch.nn.functional.linear(hidden, *self.head)

    def _rows(self, parents: Tensor, width: int) -> Tensor:
        """Where each beam's parent is among B x ``width`` beams, int64 [B * K]."""
        start = torch.arange(0, self.batch * width, width, device=parents.device)
        return (parents.clamp_min(0) + start.unsqueeze(1)).flatten()


class IdentifierCache:
    """Keys and values of the identifier tokens of each beam: [steps, layers, 2, B * K, width].

    Steps come first, so that re-ordering the beams is one gather that leaves room for the new
    token, and what attention reads of a layer are plain views.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.steps = 0
        self._past: Tensor | None = None
        self._rows: Tensor | None = None

    def begin_step(self, rows: Tensor | None) -> None:
        """Open a step, in which beam i continues beam ``rows[i]`` of the step before."""
        self._rows = rows
        self.steps += 1

    def put(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store this step's keys and values of a layer, each [B * K, width].

        Returns:
            Keys and values of all steps of that layer, each [steps, B * K, width].
        """
        if layer == 0:
            self._grow(key)
        assert self._past is not None  # layer 0 comes first
        own = self._past[:, layer]
        own[-1, 0] = key
        own[-1, 1] = value
        return own[:, 0], own[:, 1]

    def _grow(self, like: Tensor) -> None:
        """Make room for a step, its beams' past re-ordered."""
        grown = like.new_empty(self.steps, self.layers, 2, *like.shape)
        if self._past is not None and self._rows is not None:
            torch.index_select(self._past, 3, self._rows, out=grown[:-1])
        self._past = grown
