"""Log-probabilities of tree edges from hidden states, without keeping any logits."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional

from ..models.settings import Normalize
from ..ops.precision import compute_dtype
from ..tree import PrefixTree

__all__ = ["TreeHead", "check_options"]


def check_options(normalize: str, temperature: float) -> None:
    """Raise ValueError for a ``normalize`` that is no :data:`Normalize`, or a temperature that
    is not finite and positive."""
    if normalize not in get_args(Normalize):
        raise ValueError(f"normalize must be 'vocab', 'level' or 'children'; got {normalize!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be finite and > 0; got {temperature}")


class TreeHead:
    """The output head over a tree's nodes, a block of them at a time.

    Args:
        head: the output head's weight [V, d] and bias [V] or None; None where hidden states already
            are the logits.
        tree: prefix tree in the head's tokens, on its device.
        normalize: over what a token's probability is normalised: all V tokens, the codebook of its
            depth (``PrefixTree.codebooks``) or the node's children.
        temperature: divides the logits.
        block_bytes: logits held at a time.

    Raises:
        ValueError: an option is out of range; from :meth:`edges`, the tree has tokens that the head
            has not.
    """

    def __init__(
        self,
        head: tuple[Tensor, Tensor | None] | None,
        tree: PrefixTree,
        *,
        normalize: Normalize,
        temperature: float,
        block_bytes: int,
    ) -> None:
        check_options(normalize, temperature)
        self.head, self.tree = head, tree
        self.normalize, self.temperature = normalize, temperature
        self.block_bytes = block_bytes

    def certain(self, nodes: Tensor, depth: int) -> Tensor:
        """Whether a node's children [...] need no hidden state: there is but one choice."""
        if self.normalize == "vocab":
            return torch.zeros_like(nodes, dtype=torch.bool)
        if self.normalize == "level":
            return torch.full_like(nodes, len(self.tree.codebooks[depth]) == 1, dtype=torch.bool)
        begin, end = self.tree.child_ranges(nodes)
        return end - begin == 1

    def edges(
        self, hidden: Tensor, depth: int, nodes: Tensor, parents: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of edges out of nodes, and the nodes' normalisers.

        Args:
            hidden: states of the nodes [B, K, d].
            depth: the nodes' depth, 0 for the root.
            nodes: node ids [B or 1, K], -1 for padding.
            parents: for each edge the place of its node [B or 1, n], in 0..K - 1.
            tokens: for each edge its token [B or 1, n]; any token of the depth for padding.

        Returns:
            logits / temperature [B, n] and log of the sum of their exponentials [B, K], float32
            (float64 for a float64 model or head). A padding node's normaliser means nothing.
        """
        batch, count = hidden.shape[:2]
        low, high = self._columns(depth, hidden)
        block = max(1, self.block_bytes // (4 * batch * (high - low)))
        logits_dtype = compute_dtype(hidden, *(() if self.head is None else self.head))
        normaliser = hidden.new_empty(batch, count, dtype=logits_dtype)
        chosen = hidden.new_zeros(batch, parents.shape[1], dtype=logits_dtype)
        tokens = (tokens - low).expand(batch, -1)
        for begin in range(0, count, block):
            end = min(begin + block, count)
            logits = self._logits(hidden[:, begin:end], low, high).to(logits_dtype)
            if self.temperature != 1.0:
                logits = logits / self.temperature
            if self.normalize == "children":
                normaliser[:, begin:end] = self._over_children(logits, nodes[:, begin:end], low)
            else:
                normaliser[:, begin:end] = logits.logsumexp(-1)
            place = (parents - begin).expand(batch, -1)
            here = (place >= 0) & (place < end - begin)
            index = place.clamp(0, end - begin - 1) * (high - low) + tokens
            found = logits.flatten(1).gather(1, index)
            chosen = found if end - begin == count else torch.where(here, found, chosen)
        return chosen, normaliser

    def _columns(self, depth: int, hidden: Tensor) -> tuple[int, int]:
        size = hidden.shape[-1] if self.head is None else self.head[0].shape[0]
        if self.tree.vocab_size > size:
            raise ValueError(
                f"the tree has token {self.tree.vocab_size - 1}, the model's head only {size} "
                "tokens"
            )
        codebook = self.tree.codebooks[depth]
        return (0, size) if self.normalize == "vocab" else (codebook.start, codebook.stop)

    def _logits(self, hidden: Tensor, low: int, high: int) -> Tensor:
        if self.head is None:
            return hidden[..., low:high]
        weight, bias = self.head
        # A head may be kept in a wider type than the model.
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        bias = None if bias is None else bias[low:high].to(dtype)
        return functional.linear(hidden.to(dtype), weight[low:high].to(dtype), bias)

    def _over_children(self, logits: Tensor, nodes: Tensor, low: int) -> Tensor:
        """Log of the sum of exponentials over each node's children [B, K], from [B, K, columns]."""
        batch, count, columns = logits.shape
        begin, end = self.tree.child_ranges(nodes.expand(batch, -1).flatten())
        lengths = end - begin
        row = torch.repeat_interleave(lengths)
        first = lengths.cumsum(0) - lengths
        child = torch.arange(len(row), device=row.device) - (first - begin)[row]
        values = logits.flatten()[row * columns + self.tree.node_tokens(child) - low]
        # Children of one node lie together: sums by segment, in a fixed order on every device.
        top = torch.segment_reduce(values, "max", lengths=lengths, initial=-torch.inf)
        shift = torch.where(top.isfinite(), top, 0.0)
        total = torch.segment_reduce((values - shift[row]).exp(), "sum", lengths=lengths, initial=0)
        return (total.log() + shift).view(batch, count)
