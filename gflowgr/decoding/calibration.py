"""How close a generator's flow is to its target: P(item | prompt) against R(item) / sum of R."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["FlowCalibration", "flow_calibration"]

_MEASURES = ("pearson", "spearman", "total_variation", "invalid_mass")


@dataclass(frozen=True)
class FlowCalibration:
    """Calibration of each prompt [B], float64 on the CPU; NaN where a measure has no value.

    A generator trained to the reward has correlations of 1 and a total variation of 0.

    Attributes:
        pearson: correlation of log P and log R over the items that have both.
        spearman: the same of their ranks (equal values share the mean of their ranks).
        total_variation: half the sum over the items of ``|P / sum P - R / sum R|``, in [0, 1].
        invalid_mass: 1 - sum of P: the probability of token sequences that are no item. It says
            something for log P normalised over the vocabulary; below 0 only by rounding.
        num_items: items that entered the correlations.
    """

    pearson: Tensor
    spearman: Tensor
    total_variation: Tensor
    invalid_mass: Tensor
    num_items: Tensor

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready summary: per measure mean, quartiles and the number of prompts it is had for.

        Numbers are None where no prompt has a value.
        """
        out: dict[str, Any] = {"prompts": len(self.pearson)}
        for name in _MEASURES:
            values: Tensor = getattr(self, name)
            values = values[~values.isnan()]
            summary: dict[str, float | int | None] = dict.fromkeys(("mean", "q25", "median", "q75"))
            if len(values):
                levels = torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)
                low, middle, high = values.quantile(levels).tolist()
                summary = {"mean": float(values.mean()), "q25": low, "median": middle, "q75": high}
            out[name] = summary | {"prompts": len(values)}
        return out


@torch.no_grad()
def flow_calibration(
    log_probs: Tensor,
    log_reward: Tensor,
    *,
    beta: float = 1.0,
    leaf_of: Tensor | None = None,
) -> FlowCalibration:
    """Compare the generator's distribution over items with the reward's.

    Args:
        log_probs: log P(identifier | prompt) of each item [B, items], as :func:`item_logprobs`
            gives them for the whole catalogue; -inf for items that cannot be had.
        log_reward: log R(item) [B, items] or [items]; -inf for no reward.
        beta: the reward's exponent in training; the target is R^beta.
        leaf_of: identifier of each item [items] (``PrefixTree.leaf_of``), -1 for none. Given it,
            the probability of an identifier is split evenly among its items; without it every item
            is taken to have an identifier of its own.

    Raises:
        TypeError: a number is not floating.
        ValueError: shapes do not agree, a number is NaN or +inf, or beta is not positive.
    """
    log_probs, log_reward = _check(log_probs, log_reward, beta, leaf_of)
    if leaf_of is not None:
        log_probs = log_probs - log_group_size(leaf_of.to(log_probs.device))
    log_reward = beta * log_reward
    both = log_probs.isfinite() & log_reward.isfinite()
    total_p = log_probs.logsumexp(1, keepdim=True)
    total_r = log_reward.logsumexp(1, keepdim=True)
    gap = (log_probs - total_p).exp() - (log_reward - total_r).exp()
    measures = (
        _pearson(log_probs, log_reward, both),
        _pearson(_ranks(log_probs, both), _ranks(log_reward, both), both),
        gap.abs().sum(1) / 2,  # NaN where either sum is zero
        -torch.expm1(total_p.squeeze(1)),
        both.sum(1),
    )
    return FlowCalibration(*(measure.cpu() for measure in measures))


def log_group_size(leaf_of: Tensor) -> Tensor:
    """Log of the number of items that share each item's identifier [items]; 0 without one."""
    sizes = leaf_of.clamp_min(0).bincount(weights=(leaf_of >= 0).double())
    return torch.where(leaf_of >= 0, sizes[leaf_of.clamp_min(0)], 1.0).log()


def _pearson(x: Tensor, y: Tensor, both: Tensor) -> Tensor:
    """Correlation along each row's entries that are in ``both``; NaN for fewer than two or if
    either does not vary."""
    count = both.sum(1, keepdim=True)

    def centred(values: Tensor) -> Tensor:
        values = values.masked_fill(~both, 0.0)
        return (values - values.sum(1, keepdim=True) / count).masked_fill(~both, 0.0)

    x, y = centred(x), centred(y)
    return (x * y).sum(1) / ((x * x).sum(1) * (y * y).sum(1)).sqrt()


def _ranks(values: Tensor, both: Tensor) -> Tensor:
    """Ranks from 1 along each row's entries in ``both``, the mean rank for equal values."""
    ordered = values.masked_fill(~both, torch.inf).sort(dim=1).values
    values = values.contiguous()
    first = torch.searchsorted(ordered, values)
    last = torch.searchsorted(ordered, values, right=True)
    return (first + last + 1).double() / 2


def _check(
    log_probs: Tensor, log_reward: Tensor, beta: float, leaf_of: Tensor | None
) -> tuple[Tensor, Tensor]:
    for name, values in (("log_probs", log_probs), ("log_reward", log_reward)):
        if not values.is_floating_point():
            raise TypeError(f"{name} must be floating; got {values.dtype}")
        if bool(values.isnan().any()) or bool((values == torch.inf).any()):
            raise ValueError(f"{name} must be finite or -inf; it holds NaN or +inf")
    if log_probs.dim() != 2 or log_probs.shape[1] == 0:
        raise ValueError(f"log_probs must be [B, items]; got {tuple(log_probs.shape)}")
    if log_reward.shape not in (log_probs.shape, log_probs.shape[1:]):
        raise ValueError(
            f"log_reward must be {tuple(log_probs.shape)}, as log_probs, or without prompts; "
            f"got {tuple(log_reward.shape)}"
        )
    if leaf_of is not None and leaf_of.shape != log_probs.shape[1:]:
        raise ValueError(
            f"leaf_of must be [items] = ({log_probs.shape[1]},); got {tuple(leaf_of.shape)}"
        )
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be finite and > 0; got {beta}")
    log_reward = log_reward.to(log_probs.device).double().expand(log_probs.shape)
    return log_probs.double(), log_reward
