"""The behaviour-aware reward R = r_a + r_yhat + r_sim (GFlowGR, reward section).

R > 0 by construction: ``r_a >= 0`` (checked), ``r_sim >= 0`` (a count), and ``r_yhat > 0``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BehaviourAwareReward", "RewardOutput", "default_behaviour_values"]

_TINY = 1e-6
_LIKED = 10.0
_PAPER = {"purchase": _LIKED, "buy": _LIKED, "like": _LIKED, "cart": 3.0, "click": 1.0}


def default_behaviour_values(names: Sequence[str]) -> dict[str, float]:
    """r_a of behaviours for which nobody gave one.

    Liked or bought 10 and clicked 1 are the paper's example; cart 3 is ours, between the two. Names
    that are numbers (stars) are scaled so that the highest counts 10.

    Raises:
        ValueError: a name is neither known nor a number >= 0; the message says what to give.
    """
    stars = {name: float(name) for name in names if name.replace(".", "", 1).isdigit()}
    highest = max(stars.values(), default=0.0)
    values = {name: _LIKED * star / highest if highest else 0.0 for name, star in stars.items()}
    values.update({name: _PAPER[name] for name in names if name in _PAPER})
    unknown = [name for name in names if name not in values]
    if unknown:
        raise ValueError(
            f"no reward is known for the behaviours {unknown}; give behaviour_values, such as "
            f"{{{unknown[0]!r}: 5.0}}"
        )
    return values


@dataclass(frozen=True)
class RewardOutput:
    """Rewards of a batch of trajectories.

    Attributes:
        log_reward: log R [B, N]; 0 at padding trajectories.
        parts: each component [B, N], not in logs.
    """

    log_reward: Tensor
    parts: dict[str, Tensor]


class BehaviourAwareReward:
    """Sum of the three signals of the paper.

    - ``r_a``, interaction level: the value of the positive's behaviour; 0 for augmented items.
    - ``r_yhat``, estimated score: ``softplus(z)`` with z the collaborative model's score,
      standardised over the user's catalogue (mean 0, variance 1). The softplus is ours: the
      paper says "standardised", and a sum of standardised scores could be negative. It is z
      itself for the items that matter (within 0.05 from z = 3 on).
      Without a model the signal is absent, and a constant 1e-6 keeps R positive.
    - ``r_sim``, format similarity: positions at which the tokens equal the positive's.

    Args:
        behaviour_values: behaviour name -> value, such as ``{"purchase": 10, "click": 1}``; None:
            :func:`default_behaviour_values`.
        behaviour_names: names by behaviour code, as the dataset has them.
        default_value: value of a positive whose behaviour is not recorded.

    Raises:
        ValueError: a value is negative or not finite, or a behaviour has none.
    """

    def __init__(
        self,
        behaviour_values: Mapping[str, float] | None,
        behaviour_names: Sequence[str] = (),
        *,
        default_value: float = 10.0,
    ) -> None:
        if behaviour_values is None:
            behaviour_values = default_behaviour_values(behaviour_names)
        values = {**behaviour_values, "default_value": default_value}
        for name, value in values.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"behaviour_values[{name!r}] must be finite and >= 0; got {value}")
        missing = [name for name in behaviour_names if name not in behaviour_values]
        if missing:
            raise ValueError(
                f"behaviour_values has no value for {missing}; the data has {list(behaviour_names)}"
            )
        table = [behaviour_values[name] for name in behaviour_names]
        # The default sits last, so that the code -1 (not recorded) finds it.
        self._table = torch.tensor([*table, default_value], dtype=torch.float32)

    def __call__(
        self,
        tokens: Tensor,
        mask: Tensor,
        behaviours: Tensor,
        items: Tensor,
        scores: Tensor | None,
    ) -> RewardOutput:
        """Rewards of trajectories.

        Args:
            tokens: [B, N, L]; n = 0 is the positive.
            mask: true for real tokens [B, N, L].
            behaviours: behaviour code of the positive [B], -1 if not recorded.
            items: item of each trajectory [B, N], -1 for padding.
            scores: the collaborative model's scores of the whole catalogue [B, items], or None.

        Raises:
            ValueError: a score is NaN or infinite.
        """
        present = items >= 0
        r_a = torch.zeros(items.shape, dtype=torch.float32, device=tokens.device)
        r_a[:, 0] = self._table.to(tokens.device)[behaviours]
        same = (tokens == tokens[:, :1]) & mask & mask[:, :1]
        r_sim = same.sum(-1).float()
        if scores is None:
            r_yhat = torch.full_like(r_a, _TINY)
        else:
            std, mean = torch.std_mean(scores.float(), dim=1, keepdim=True, correction=0)
            if not bool(torch.isfinite(mean).all()):
                row = int((~torch.isfinite(mean)).nonzero()[0, 0])
                raise ValueError(f"scores[{row}] of the collaborative model are not finite")
            chosen = scores.float().gather(1, items.clamp_min(0))
            z = (chosen - mean) / std.clamp_min(_TINY)
            r_yhat = torch.nn.functional.softplus(z).clamp_min(_TINY)
        reward = r_a + r_yhat + r_sim
        log_reward = torch.where(present, reward, 1.0).log()
        return RewardOutput(log_reward, {"r_a": r_a, "r_yhat": r_yhat, "r_sim": r_sim})
