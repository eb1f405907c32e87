"""Sampling items from the model, with and without replacement.

The sampling distribution q walks down the tree: at each node it is the softmax of the children's
logits over ``temperature``, cut to the nucleus ``top_p``, among the children that lead to an
admissible item. An identifier of several items gives each admissible one an equal share. The sum of
q over the admissible items is 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.backbone import evaluating, real_prompt
from ..models.normalization import chosen_normalize
from ..models.settings import Normalize
from ..models.wrapped import unwrapped
from ..ops.checks import values_looked_at
from ..ops.precision import compute_dtype
from ..tree import PrefixTree
from ..tree.admissible import admissible_for
from .decoders import decoder_for
from .keyed_noise import prompt_keys
from .random_walk import TreeWalk, log1mexp, nothing
from .tree_head import TreeHead, check_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SampledItems", "sample_items"]


@dataclass(frozen=True)
class SampledItems:
    """Items drawn for each prompt.

    Attributes:
        items: item ids [B, S]; -1 where there is none (no admissible item; without replacement,
            fewer than S of them).
        log_probs: log q(item | prompt) [B, S] of the distribution that was sampled from:
            temperature, nucleus, admissible items, the share of an item among those of its
            identifier. Without replacement, of a single draw. -inf where ``items`` is -1.
        model_log_probs: log P(identifier | prompt) [B, S] of the model as it is: temperature 1,
            under ``normalize``; what :func:`item_logprobs` gives. -inf where ``items`` is -1.
        tokens: identifiers [B, S, L], -1 beyond an identifier's end and where ``items`` is -1.
        perturbed: without replacement, the perturbed log-probabilities G [B, S] by which the items
            are ordered, largest first; None with replacement.
        threshold: without replacement, kappa [B]: the largest perturbed log-probability that was
            not drawn; -inf if every item was. None with replacement.
    """

    items: Tensor
    log_probs: Tensor
    model_log_probs: Tensor
    tokens: Tensor
    perturbed: Tensor | None = None
    threshold: Tensor | None = None

    def log_weights(self, target: Tensor | None = None) -> Tensor:
        """Log of weights w [B, S] with which ``(w * f).sum(1)`` estimates an expectation unbiased.

        The expectation is of f(item) under ``target``. With replacement w = target / (S q).
        Without, w = target / P(G > kappa) with P(G > kappa) = 1 - exp(-exp(log q - kappa)), the
        chance to be drawn given the threshold (Kool et al., 2019, section 4.1). Dividing the
        weights by their sum trades the lack of bias for less variance.

        Args:
            target: log-probabilities [B, S] of the drawn items, such as ``model_log_probs`` or a
                later model's; default ``log_probs``, the sampling distribution itself. It must
                be zero wherever q is.

        Returns:
            -inf where ``items`` is -1.
        """
        target = self.log_probs if target is None else target
        if self.threshold is None:
            chance = self.log_probs + math.log(max(1, self.items.shape[1]))
        else:
            chance = log1mexp(-(self.log_probs - self.threshold.unsqueeze(1)).exp())
        return torch.where(self.items >= 0, target - chance, -torch.inf)


@torch.no_grad()
def sample_items(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    tree: PrefixTree,
    num_samples: int,
    *,
    seed: int | torch.Generator,
    replacement: bool = True,
    temperature: float = 1.0,
    top_p: float = 1.0,
    normalize: Normalize | None = None,
    available: Tensor | None = None,
    exclude: Tensor | None = None,
    keys: Tensor | None = None,
    batch_bytes: int = 2**28,
) -> SampledItems:
    """Draw items for each prompt; every one is valid and admissible.

    With replacement: independent walks down the tree, that share the decoding of what they have in
    common. Without: stochastic beam search (Kool, van Hoof and Welling, 2019, arXiv 1903.06059),
    which is exact: the S items with the largest log q + Gumbel noise, as if noise had been drawn
    for the whole catalogue.

    Args:
        model: any that :func:`constrained_beam_search` takes; runs in evaluation mode and is left
            as it was.
        input_ids: prompts [B, S']; padding may be on either side and hold any value.
        attention_mask: 1 for real tokens [B, S']; None: every token is real.
        tree: prefix tree in the model's token ids, on the model's device, without an identifier
            that is a prefix of another (a model gives no probability to stop).
        num_samples: items S per prompt.
        seed: the same seed gives a prompt the same items, whatever else is in the batch; a
            generator draws a seed. Without replacement more samples continue fewer ones.
        replacement: whether an item may be drawn again.
        temperature: divides the logits that are sampled from.
        top_p: at each node only the most probable admissible children that together reach this
            probability are kept (at least one; ties by ascending token).
        normalize: the normaliser of ``model_log_probs``, as in :func:`constrained_beam_search`. The
            draws do not depend on it.
        available: true for items that may be drawn [items].
        exclude: items [B, E] that a prompt may not get, -1 for padding.
        keys: what makes prompts' draws differ [B] int64, such as example numbers; by default a hash
            of the prompt's tokens, so that equal prompts get equal items.
        batch_bytes: logits held at a time; a model that runs by whole sequences holds those of all
            samples [B, S, V].

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range or of a wrong shape, or an identifier of the tree is
            a prefix of another.
        FloatingPointError: the model's scores are NaN.
    """
    model = unwrapped(model)
    normalize = chosen_normalize(model, normalize)
    input_ids, attention_mask = real_prompt(model, input_ids, attention_mask)
    _check(input_ids, tree, num_samples, normalize, temperature, top_p, keys)
    batch, device = input_ids.shape[0], input_ids.device
    admissible = admissible_for(tree, batch, available, exclude, look=values_looked_at())
    if isinstance(seed, torch.Generator):
        seed = int(torch.randint(2**62, (), generator=seed, device=seed.device))
    rows = prompt_keys(input_ids, attention_mask) if keys is None else keys.to(device).long()
    # One more than asked for: the first that is not drawn sets the threshold.
    count = num_samples if replacement else num_samples + 1
    if batch == 0:
        drawn = nothing(0, count, device)
    else:
        with evaluating(model):
            decoder = decoder_for(model, input_ids, attention_mask)
            head = TreeHead(
                decoder.head, tree, normalize=normalize, temperature=1.0, block_bytes=batch_bytes
            )
            walk = TreeWalk(head, admissible, seed, rows, temperature=temperature, top_p=top_p)
            draw = walk.with_replacement if replacement else walk.without_replacement
            drawn = draw(decoder, count)
    if bool(drawn.log_q.isnan().any()):
        row = int(drawn.log_q.isnan().any(1).nonzero()[0])
        raise FloatingPointError(f"the model's scores are NaN (first in prompt {row})")
    dtype = compute_dtype(model.dtype)
    items = drawn.ids[:, :num_samples]
    tokens = tree.identifiers(items.clamp_min(0)).masked_fill((items < 0).unsqueeze(-1), -1)
    noise = None if replacement or drawn.noise is None else drawn.noise.to(dtype)
    return SampledItems(
        items,
        drawn.log_q[:, :num_samples].to(dtype),
        drawn.log_model[:, :num_samples].to(dtype),
        tokens,
        None if noise is None else noise[:, :num_samples],
        None if noise is None else noise[:, num_samples],
    )


def _check(
    input_ids: Tensor,
    tree: PrefixTree,
    num_samples: int,
    normalize: str,
    temperature: float,
    top_p: float,
    keys: Tensor | None,
) -> None:
    check_options(normalize, temperature)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1]; got {top_p}")
    if tree.device != input_ids.device:
        raise ValueError(f"tree is on {tree.device}, input_ids on {input_ids.device}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be >= 1; got {num_samples}")
    if keys is not None:
        if keys.dtype == torch.bool or keys.is_floating_point() or keys.is_complex():
            raise TypeError(f"keys must hold integers; got {keys.dtype}")
        if keys.shape != input_ids.shape[:1]:
            raise ValueError(f"keys must be [B] = ({input_ids.shape[0]},); got {tuple(keys.shape)}")
    if tree.layout.leaf_rank:
        inner = torch.arange(tree.layout.num_inner, device=tree.device)
        begin, end = tree.child_ranges(inner)
        both = (tree.terminal(inner) >= 0) & (end > begin)
        if bool(both.any()):
            leaf = tree.terminal(inner[both][:1])
            raise ValueError(
                f"the identifier of item {int(tree.item_ids[tree.leaf_items(leaf)[0]])} is a "
                "prefix of another: a model gives no probability to stopping there, so sampling "
                "needs identifiers that end with a token of their own"
            )
