"""Samplers that take trajectories from the current backbone, and keep them between refreshes."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import torch

from .base import (
    Candidates,
    SampleRequest,
    State,
    TrajectorySampler,
    TrajectorySet,
    nested,
    part_of,
)
from .proposer import Proposals, Proposer
from .replay import ReplayBuffer, kept_candidates

__all__ = ["ConfidenceSampler", "OnPolicySampler"]

_ON_POLICY, _CONFIDENCE = 6, 7


class _ProposedSampler(TrajectorySampler):
    """Items that a backbone chooses, anew every few steps.

    Decoding may cost as much as a training step. So the backbone generates only in every
    ``refresh_steps``-th step, for the prompts of that step; its proposals are kept per user. In
    between, a user's latest proposals are used again, in another order each epoch, and a user
    without any gets the items of ``fallback``, as most do in the first epoch.

    Args:
        proposer: the backbone.
        fallback: for users without proposals.
        num_proposals: items asked for per prompt.
        refresh_steps: k; 1 asks in every step.
        capacity: users whose proposals are kept.
    """

    stream: int

    def __init__(
        self,
        proposer: Proposer,
        fallback: TrajectorySampler,
        *,
        num_proposals: int | None = None,
        refresh_steps: int = 10,
        capacity: int = 100_000,
    ) -> None:
        super().__init__(fallback.pool, fallback.num_trajectories)
        others = fallback.num_trajectories - 1
        self.num_proposals = max(1, 2 * others) if num_proposals is None else num_proposals
        if self.num_proposals < max(1, others):
            raise ValueError(
                f"num_proposals must be >= num_trajectories - 1 = {others}; got {num_proposals}"
            )
        if refresh_steps < 1:
            raise ValueError(f"refresh_steps must be >= 1; got {refresh_steps}")
        self.proposer = proposer
        self.fallback = fallback
        self.needs_scores = fallback.needs_scores
        self.refresh_steps = refresh_steps
        self.buffer = ReplayBuffer(fallback.pool.num_users, self.num_proposals, capacity)

    @abstractmethod
    def _propose(self, request: SampleRequest) -> Proposals:
        """Ask the backbone; the best proposals first."""

    def candidates(self, request: SampleRequest) -> Candidates:
        """New proposals, or those of earlier steps and then the fallback's items."""
        if request.step % self.refresh_steps == 0:
            found = self._propose(request)
            # The newest proposals of a user replace the others.
            newest = np.full(found.items.shape, float(request.step))
            self.buffer.add(
                request.step,
                request.users,
                request.examples,
                found.items,
                found.log_probs,
                newest,
            )
            return Candidates.augmented(found.items, found.log_probs)
        held = self.buffer.lookup(request.step, request.users)
        noise = self.pool.uniform(request, self.stream, held.items.shape[1])
        kept = kept_candidates(request, held).take(noise.argsort(axis=1, kind="stable"))
        return Candidates.concatenate([kept, Candidates.of(self.fallback.sample(request))])

    def observe(
        self, request: SampleRequest, chosen: TrajectorySet, log_reward: torch.Tensor
    ) -> None:
        """The fallback learns the rewards, if it wants them."""
        self.fallback.observe(request, chosen, log_reward)

    def state_dict(self) -> State:
        """The kept proposals and the fallback's state."""
        return nested({"buffer": self.buffer.state_dict(), "fallback": self.fallback.state_dict()})

    def load_state_dict(self, state: State) -> None:
        """See :class:`TrajectorySampler`."""
        self.buffer.load_state_dict(part_of(state, "buffer"))
        self.fallback.load_state_dict(part_of(state, "fallback"))


class OnPolicySampler(_ProposedSampler):
    """Unobserved items that the backbone generates: by beam search, or by sampling.

    ``log_proposal`` of the set tells with which log-probability. See :class:`BackboneProposer` for
    the ways to generate.

    Args:
        proposer: the backbone.
        fallback: for users without proposals.
        num_proposals: items asked for per prompt, beams of the search (default ``2 (N - 1)``).
        refresh_steps: the backbone is asked in every ``refresh_steps``-th step.
        capacity: users whose proposals are kept.
    """

    stream = _ON_POLICY

    def _propose(self, request: SampleRequest) -> Proposals:
        exclude = self.pool.barred(request)
        return self.proposer.propose(request, self.num_proposals, exclude)


class ConfidenceSampler(_ProposedSampler):
    """Of the collaborative model's best items, those that the backbone finds least probable.

    A pool of the ``pool_size`` admissible items with the highest collaborative scores is ordered by
    the backbone's probability, the lowest first: items that should be good and that the backbone
    would not find by itself.

    Args:
        proposer: the backbone.
        fallback: for users without proposals.
        pool_size: items of the pool.
        num_proposals: of them, how many are kept for later steps (default ``2 (N - 1)``, at most
            ``pool_size``).
        refresh_steps: the backbone is asked in every ``refresh_steps``-th step.
        capacity: users whose proposals are kept.
    """

    stream = _CONFIDENCE

    def __init__(
        self,
        proposer: Proposer,
        fallback: TrajectorySampler,
        *,
        pool_size: int = 32,
        num_proposals: int | None = None,
        refresh_steps: int = 10,
        capacity: int = 100_000,
    ) -> None:
        others = fallback.num_trajectories - 1
        if pool_size < max(1, others):
            raise ValueError(
                f"pool_size must be >= num_trajectories - 1 = {others}; got {pool_size}"
            )
        if num_proposals is None:
            num_proposals = min(pool_size, max(1, 2 * others))
        super().__init__(
            proposer,
            fallback,
            num_proposals=num_proposals,
            refresh_steps=refresh_steps,
            capacity=capacity,
        )
        self.pool_size = pool_size
        self.needs_scores = True

    def _propose(self, request: SampleRequest) -> Proposals:
        if request.scores is None:
            raise ValueError("ConfidenceSampler needs request.scores of a collaborative model")
        scores = self.pool.admissible_scores(request, -torch.inf)
        best = scores.topk(min(self.pool_size, scores.shape[1]), dim=1)
        items = best.indices.masked_fill(best.values == -torch.inf, -1).cpu().numpy()
        log_probs = self.proposer.log_probs(request, items)
        # Padding, at -inf, comes last; equal probabilities by ascending item.
        sure = np.where(items < 0, np.inf, log_probs)
        order = np.lexsort((items, sure), axis=1)[:, : self.num_proposals]
        return Proposals(
            np.take_along_axis(items, order, axis=1), np.take_along_axis(log_probs, order, axis=1)
        )
