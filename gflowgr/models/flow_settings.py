"""What a :class:`~gflowgr.models.GFlowModel` computes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..rewards.fusion import FusionMode
from ..rewards.signals import check_signal_names
from .partition import PartitionMode

__all__ = ["FlowSettings", "Normalize", "Objective", "Reduction"]

Objective = Literal["sft", "tb", "db", "subtb"]
Normalize = Literal["vocab", "level", "children"]
Reduction = Literal["prompt", "mean", "sum"]


@dataclass(frozen=True)
class FlowSettings:
    """What :class:`GFlowModel` computes; saved with it.

    Attributes:
        objective: ``"sft"``: next-token prediction of the positive alone; joint with it over the
            prompt's trajectories: ``"tb"``, trajectory balance; ``"db"``, detailed balance;
            ``"subtb"``, balance of all sub-trajectories.
        partition: how ``"tb"`` has log Z: ``"learned"``, ``"scalar"`` or ``"vargrad"``. The others
            have it in the flow of the empty prefix.
        subtb_lambda: a sub-trajectory of m tokens has the weight ``subtb_lambda^m``.
        forward_looking: the state flow of ``"db"`` and ``"subtb"`` is a learned residual plus the
            partial reward ``beta * log(1 + r_sim of the prefix)``; see
            :func:`~gflowgr.models.state_flow.partial_log_reward`.
        gfn_weight: lambda of the joint loss ``L_GR + lambda * L_GFN``.
        signals: the reward's signals by name, see :mod:`gflowgr.rewards.signals`.
        fusion: how signals become a reward: ``"sum"``, ``"weighted"`` or ``"mlp"``; the latter two
            are learned, see :mod:`gflowgr.rewards.fusion`.
        fusion_anchor: weight that keeps a learned fusion near the sum.
        beta: exponent of the reward (``beta * log_reward``).
        log_reward_floor: least ``beta * log_reward``, nats; None: no floor.
        normalize: over what a token's probability is normalised. ``"vocab"``: the vocabulary;
            ``"level"``: the codebook of its position; ``"children"``: the children of the
            prefix-tree node.
        reduction: ``"prompt"``: mean over prompts of the sum over trajectories (the paper's);
            ``"mean"`` over trajectories; ``"sum"``.
        importance_clip: weigh each drawn trajectory's flow loss by ``P_F / proposal``, detached
            and at most this, to estimate the on-policy loss from off-policy samples; None: no
            weights (all these losses are valid off-policy as they are).
        max_history: items of a history that the prompt keeps.
    """

    objective: Objective = "sft"
    partition: PartitionMode = "learned"
    subtb_lambda: float = 0.9
    forward_looking: bool = False
    gfn_weight: float = 1.0
    signals: list[str] = field(default_factory=lambda: ["r_a", "r_yhat", "r_sim"])
    fusion: FusionMode = "sum"
    fusion_anchor: float = 1.0
    beta: float = 1.0
    log_reward_floor: float | None = None
    normalize: Normalize = "vocab"
    reduction: Reduction = "prompt"
    importance_clip: float | None = None
    max_history: int = 20

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("objective", self.objective, get_args(Objective)),
            ("partition", self.partition, get_args(PartitionMode)),
            ("fusion", self.fusion, get_args(FusionMode)),
            ("normalize", self.normalize, get_args(Normalize)),
            ("reduction", self.reduction, get_args(Reduction)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}; got {value!r}")
        for name in ("gfn_weight", "beta", "subtb_lambda", "importance_clip"):
            number: float | None = getattr(self, name)
            if number is not None and not (math.isfinite(number) and number > 0):
                hint = "; for no flow loss: objective 'sft'" if name == "gfn_weight" else ""
                raise ValueError(f"{name} must be finite and > 0; got {number}{hint}")
        if not (math.isfinite(self.fusion_anchor) and self.fusion_anchor >= 0):
            raise ValueError(f"fusion_anchor must be finite and >= 0; got {self.fusion_anchor}")
        if self.log_reward_floor is not None and not math.isfinite(self.log_reward_floor):
            raise ValueError(f"log_reward_floor must be finite; got {self.log_reward_floor}")
        if self.max_history < 1:
            raise ValueError(f"max_history must be >= 1; got {self.max_history}")
        object.__setattr__(self, "signals", check_signal_names(self.signals))
        if self.forward_looking and self.objective not in ("db", "subtb"):
            raise ValueError(
                f"forward_looking needs objective 'db' or 'subtb'; got {self.objective!r}"
            )
        if self.forward_looking and "r_sim" not in self.signals:
            raise ValueError(f"forward_looking needs the signal 'r_sim'; signals: {self.signals}")
