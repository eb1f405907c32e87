"""Flow calibration during evaluation: P(item | prompt) against R(item), over all items."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..collaborative import CollaborativeModel
from ..data import Split
from ..decoding import flow_calibration
from ..distributed import gathered, process
from ..models.gflow_model import GFlowModel
from ..rewards import BehaviourAwareReward
from .calibration import catalogue_flow

__all__ = ["catalogue_calibration"]


def catalogue_calibration(
    model: GFlowModel,
    reward: BehaviourAwareReward,
    split: Split,
    collaborative: CollaborativeModel | None,
    *,
    users: int,
    seed: int,
) -> dict[str, float]:
    """How close the generator is to its target on `users` validation users, drawn with `seed`.

    The probabilities are exact, of every item; the reward is that of training, with the validation
    item as the positive. Several processes divide the users. Items that share an identifier share
    its probability, see :func:`gflowgr.evaluation.calibration.catalogue_flow`.

    Returns:
        Means over users of ``calibration_pearson`` and ``calibration_spearman`` (log P with log R),
        ``calibration_tv`` (total variation) and ``calibration_invalid`` (probability of token
        sequences that are no item).
    """
    rows = np.arange(len(split.eval_users("valid")))
    if users < len(rows):
        rows = np.sort(np.random.default_rng(seed).choice(rows, users, replace=False))
    rank, processes = process()
    rows = rows[rank::processes]
    parts: list[Tensor] = []
    for log_probs, log_reward in catalogue_flow(model, reward, split, "valid", rows, collaborative):
        shaped = model.settings.beta * log_reward
        if model.settings.log_reward_floor is not None:
            shaped = shaped.clamp_min(model.settings.log_reward_floor)
        measured = flow_calibration(log_probs, shaped)
        names = ("pearson", "spearman", "total_variation", "invalid_mass")
        parts.append(torch.stack([getattr(measured, name) for name in names]))
    everyone = [part for of_process in gathered(parts) for part in of_process]
    means = torch.cat(everyone, dim=1).nanmean(dim=1).tolist()
    return dict(
        zip(
            (f"calibration_{name}" for name in ("pearson", "spearman", "tv", "invalid")),
            means,
            strict=True,
        )
    )
