"""Items drawn from the reward's own distribution, the softmax of the collaborative scores."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..transfer import to_device
from .base import Candidates, SampleRequest, TrajectorySampler
from .pool import CandidatePool

__all__ = ["TeacherSampler"]

_TEACHER = 9


class TeacherSampler(TrajectorySampler):
    """N - 1 admissible items, drawn from ``softmax(score / temperature)`` without replacement.

    Drawn is with replacement, and of equal identifiers the first is kept: that is successive
    sampling without replacement, the distribution of Gumbel top-k, without a random number per
    item. ``log_proposal`` of the set is the softmax's log-probability of the item, over the
    admissible ones. Where the draws do not suffice (a softmax with nearly all mass on fewer than
    N - 1 items), uniform draws fill up, without a ``log_proposal``.

    Args:
        pool: knows what may be sampled.
        num_trajectories: N, the positive included.
        temperature: divides the scores; that of the reward.

    Raises:
        ValueError: the temperature is out of range.
    """

    needs_scores = True

    def __init__(
        self, pool: CandidatePool, num_trajectories: int, temperature: float = 1.0
    ) -> None:
        super().__init__(pool, num_trajectories)
        if not 0 < temperature < math.inf:
            raise ValueError(f"teacher_temperature must be finite and > 0; got {temperature}")
        self.temperature = temperature

    def candidates(self, request: SampleRequest) -> Candidates:
        """The draws, in their order."""
        if request.scores is None:
            raise ValueError("TeacherSampler needs request.scores of a collaborative model")
        scores = self.pool.admissible_scores(request, -math.inf)
        log_p = (scores.float() / self.temperature).log_softmax(1)
        # NaN where everything is barred; nothing is drawn there that the rules admit.
        total = log_p.exp().double().nan_to_num_().cumsum_(1)
        width = 16 * self.num_trajectories + 16
        uniform = to_device(self.pool.uniform(request, _TEACHER, width), scores.device)
        items = torch.searchsorted(total, uniform * total[:, -1:], right=True)
        items = items.clamp_max(scores.shape[1] - 1)
        log_proposal = log_p.gather(1, items).cpu().numpy().astype(np.float32)
        return Candidates.augmented(items.cpu().numpy(), log_proposal)
