"""Preference losses of each prompt in plain PyTorch, from log-probabilities.

What the arguments mean: :mod:`gflowgr.ops.preference.losses`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from gflowgr.ops import checks
from gflowgr.ops.precision import compute_dtype

__all__ = [
    "group_advantages",
    "grpo_per_prompt",
    "k3_divergence",
    "log_ratios",
    "reduce_prompts",
    "sdpo_per_prompt",
]

_STD_OFFSET = 1e-4
_K3_LINEAR_FROM = 20.0


def sdpo_per_prompt(
    log_pf: Tensor, ref_log_pf: Tensor, mask: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """S-DPO of each prompt [B], zero where it does not count, and which prompts count [B]."""
    scores = beta * log_ratios(log_pf, ref_log_pf, mask).sum(-1)
    valid = mask.any(-1)
    counted = valid[:, :1].any(-1) & valid[:, 1:].any(-1)
    # softplus(logsumexp_n beta (Delta_n - Delta_0)) is the cross-entropy of trajectory 0. In this
    # form the gradients keep their digits however large the scores are. Prompts that do not count
    # keep theirs, for the softmax of nothing would be NaN.
    scores = scores.masked_fill(~valid & counted[:, None], -math.inf)
    return -F.log_softmax(scores, -1)[:, 0].masked_fill(~counted, 0.0), counted


def grpo_per_prompt(
    log_pf: Tensor, ref_log_pf: Tensor, reward: Tensor, mask: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """GRPO of each prompt [B], zero where it does not count, and which prompts count [B]."""
    ratio = log_ratios(log_pf, ref_log_pf, mask)
    advantage = group_advantages(reward, mask.any(-1)).to(ratio.dtype)
    surrogate = (ratio - ratio.detach()).exp()  # 1; the reference cancels
    per_token = beta * k3_divergence(ratio) - surrogate * advantage[..., None]
    lengths = mask.sum(-1)
    losses = per_token.masked_fill(~mask, 0.0).sum(-1) / lengths.clamp(min=1)
    group = (lengths > 0).sum(-1)
    return losses.sum(-1) / group.clamp(min=1), group > 0


def group_advantages(reward: Tensor, valid: Tensor) -> Tensor:
    """``(R - mean) / (std + 1e-4)`` over each prompt's valid trajectories [B, N], in float64.

    ``std`` is the sample standard deviation (of n - 1). Zero for padding, for a group of one and
    for one whose rewards are all equal.
    """
    values = reward.detach().double().masked_fill(~valid, 0.0)
    count = valid.sum(-1, keepdim=True)
    mean = values.sum(-1, keepdim=True) / count.clamp(min=1)
    centred = (values - mean).masked_fill(~valid, 0.0)
    std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return centred / (std + _STD_OFFSET)


def k3_divergence(ratio: Tensor) -> Tensor:
    """``exp(-ratio) + ratio - 1`` >= 0 of log-ratios ``log_pf - ref_log_pf``.

    Where a token's probability is more than e^20 times below the reference's, the tangent at e^20
    continues the exponential, so that neither value nor gradient overflows.
    """
    beyond = (-ratio - _K3_LINEAR_FROM).clamp(min=0.0)
    capped = (-ratio).clamp(max=_K3_LINEAR_FROM)
    return torch.expm1(capped) + math.exp(_K3_LINEAR_FROM) * beyond + ratio


def log_ratios(log_pf: Tensor, ref_log_pf: Tensor, mask: Tensor) -> Tensor:
    """``log_pf - ref_log_pf`` [B, N, L] in at least float32, zero at padding."""
    dtype = compute_dtype(log_pf, ref_log_pf)
    if not checks.values_looked_at():  # a mask that is no prefix must not pass for one
        log_pf = log_pf.masked_fill(checks.mask_rises(mask), math.nan)
    reference = ref_log_pf.detach().to(dtype).masked_fill(~mask, 0.0)
    return log_pf.to(dtype).masked_fill(~mask, 0.0) - reference


def reduce_prompts(losses: Tensor, counted: Tensor, reduction: str) -> Tensor:
    """Reduce losses [B] that are zero at prompts that do not count."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / counted.sum().clamp(min=1)
