"""A mixture: several samplers share the places of each set, by weight."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from torch import Tensor

from .base import (
    Candidates,
    SampleRequest,
    State,
    TrajectorySampler,
    TrajectorySet,
    nested,
    part_of,
)
from .keyed_random import systematic_counts

__all__ = ["MixtureSampler"]

_MIXTURE = 4


class MixtureSampler(TrajectorySampler):
    """The N - 1 items of a prompt come from several samplers, by weight.

    Of each prompt a sampler fills ``(N - 1) * weight / sum of weights`` places on average, and
    never a whole one more or less. Items that two samplers chose are taken once.

    Args:
        samplers: by name, all over the same pool and with the same N.
        weights: of each name, positive.
    """

    def __init__(
        self, samplers: Mapping[str, TrajectorySampler], weights: Mapping[str, float]
    ) -> None:
        first = next(iter(samplers.values()), None)
        if first is None or samplers.keys() != weights.keys():
            raise ValueError(
                f"weights must have an entry for each sampler: samplers {list(samplers)}, "
                f"weights {list(weights)}"
            )
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"weights[{name!r}] must be finite and > 0; got {weight}")
        super().__init__(first.pool, first.num_trajectories)
        self.samplers = dict(samplers)
        total = sum(weights.values())
        self.shares = np.array([weights[name] / total for name in samplers])
        self.needs_scores = any(sampler.needs_scores for sampler in samplers.values())

    def candidates(self, request: SampleRequest) -> Candidates:
        """Each sampler's share of its set, then what is left of all sets."""
        count = self.num_trajectories - 1
        sets = [Candidates.of(sampler.sample(request)) for sampler in self.samplers.values()]
        start = self.pool.uniform(request, _MIXTURE, 1)
        counts = systematic_counts(start, self.shares, count)
        everything = Candidates.concatenate(sets)
        wanted = np.arange(count)[None, None, :] < counts[:, :, None]
        order = (~wanted.reshape(len(counts), -1)).argsort(axis=1, kind="stable")
        return everything.take(order)

    def observe(self, request: SampleRequest, chosen: TrajectorySet, log_reward: Tensor) -> None:
        """All samplers learn the rewards."""
        for sampler in self.samplers.values():
            sampler.observe(request, chosen, log_reward)

    def state_dict(self) -> State:
        """The samplers' states."""
        return nested({name: sampler.state_dict() for name, sampler in self.samplers.items()})

    def load_state_dict(self, state: State) -> None:
        """See :class:`TrajectorySampler`."""
        for name, sampler in self.samplers.items():
            sampler.load_state_dict(part_of(state, name))
