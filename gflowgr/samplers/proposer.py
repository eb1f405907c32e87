"""Items that the current backbone generates, as proposals for samplers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np
import torch

from ..decoding import constrained_beam_search, item_logprobs, sample_items
from ..models.backbone import evaluating
from .base import Floats, Ints, SampleRequest

if TYPE_CHECKING:
    from ..models.gflow_model import GFlowModel
    from ..tree import PrefixTree

__all__ = ["BackboneProposer", "ProposalMethod", "Proposals", "Proposer"]

ProposalMethod = Literal["beam", "sample", "sample_without_replacement"]


@dataclass(frozen=True)
class Proposals:
    """Items that a backbone proposes.

    Attributes:
        items: item ids [B, K], -1 for none.
        log_probs: their log-probabilities [B, K]: of the identifier with beam search, of the
            distribution that was drawn from with sampling.
    """

    items: Ints
    log_probs: Floats


class Proposer(Protocol):
    """The interface between on-policy samplers and a backbone."""

    def propose(self, request: SampleRequest, count: int, exclude: Ints) -> Proposals:
        """``count`` items per prompt, none of ``exclude`` [B, E] (padded with -1)."""
        ...

    def log_probs(self, request: SampleRequest, items: Ints) -> Floats:
        """Log-probability of each item's identifier [B, M], -inf for padding (-1)."""
        ...


class BackboneProposer:
    """Proposes by constrained decoding with a :class:`~gflowgr.models.GFlowModel` as it is now.

    Args:
        model: the model; it is asked in evaluation mode and left as it was.
        method: ``"beam"``: the most probable items; ``"sample"``: drawn with replacement;
            ``"sample_without_replacement"``.
        temperature: divides the logits.
        seed: of the draws, which depend on the example and the step besides.
    """

    def __init__(
        self,
        model: GFlowModel,
        method: ProposalMethod = "beam",
        *,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        if method not in get_args(ProposalMethod):
            raise ValueError(f"method must be one of {get_args(ProposalMethod)}; got {method!r}")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be finite and > 0; got {temperature}")
        self.model = model
        self.method = method
        self.temperature = temperature
        self.seed = seed

    def propose(self, request: SampleRequest, count: int, exclude: Ints) -> Proposals:
        """See :class:`Proposer`."""
        model = self.model
        input_ids, attention_mask = _prompts(request)
        barred = torch.from_numpy(exclude).to(input_ids.device)
        tree = _tree(model, input_ids.device)
        normalize, temperature = model.settings.normalize, self.temperature
        with evaluating(model):
            if self.method == "beam":
                found = constrained_beam_search(
                    model.backbone,
                    input_ids,
                    attention_mask,
                    tree,
                    num_beams=count,
                    normalize=normalize,
                    temperature=temperature,
                    exclude=barred,
                )
                items, log_probs = found.items, found.scores
            else:
                drawn = sample_items(
                    model.backbone,
                    input_ids,
                    attention_mask,
                    tree,
                    count,
                    # Another step of the same epoch never asks for the same example again.
                    seed=self.seed + 0x9E3779B1 * (request.epoch + 1),
                    replacement=self.method == "sample",
                    normalize=normalize,
                    temperature=temperature,
                    exclude=barred,
                    keys=torch.from_numpy(request.examples),
                )
                items, log_probs = drawn.items, drawn.log_probs
        return Proposals(items.cpu().numpy(), log_probs.float().cpu().numpy())

    def log_probs(self, request: SampleRequest, items: Ints) -> Floats:
        """See :class:`Proposer`."""
        input_ids, attention_mask = _prompts(request)
        scores = item_logprobs(
            self.model.backbone,
            input_ids,
            attention_mask,
            _tree(self.model, input_ids.device),
            torch.from_numpy(items).to(input_ids.device),
            normalize=self.model.settings.normalize,
            temperature=self.temperature,
        )
        return scores.float().cpu().numpy().astype(np.float32)


def _prompts(request: SampleRequest) -> tuple[torch.Tensor, torch.Tensor]:
    if request.input_ids is None or request.attention_mask is None:
        raise ValueError("on-policy samplers need request.input_ids and request.attention_mask")
    return request.input_ids, request.attention_mask


def _tree(model: GFlowModel, device: torch.device) -> PrefixTree:
    if model.tree.device != device:  # moved once, and not for every call
        model.tree = model.tree.to(device)
    return model.tree
