"""The baselines' objectives: DPO, S-DPO and GRPO, against a frozen reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import fused_dpo_loss, fused_grpo_loss
from ..ops.preference import k3_divergence, log_ratios
from .flow_settings import FlowSettings
from .objective import Head, positive_nll
from .reference import ReferenceStates

__all__ = ["preference_loss"]


def preference_loss(
    settings: FlowSettings,
    head: Head,
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor,
    reference: ReferenceStates,
    log_reward: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``sft_weight * L_GR + gfn_weight * L_preference``, and what is logged.

    Args:
        settings: objective and its constants.
        head: the output head.
        hidden: states [B, N, L, d] that predict ``tokens``.
        tokens: trajectories [B, N, L]; n = 0 is the observed positive.
        mask: true for real tokens [B, N, L].
        reference: what the reference makes of them.
        log_reward: log R [B, N]; ``"grpo"`` alone needs it.
    """
    ref_hidden, ref_weight, ref_bias = reference
    options: dict[str, Any] = {
        "mask": mask,
        "ref_bias": ref_bias,
        "beta": settings.reference_weight,
        "reduction": settings.reduction,
        "sft_weight": settings.sft_weight / settings.gfn_weight,
        "return_log_pf": True,
        **head,
    }
    inputs: dict[str, Any] = {
        "hidden": hidden,
        "tokens": tokens,
        "ref_hidden": ref_hidden,
        "ref_weight": ref_weight,
    }
    if settings.objective == "grpo":
        assert log_reward is not None
        reward = _reward(settings, log_reward, mask)
        loss, log_pf, ref_log_pf = fused_grpo_loss(**inputs, reward=reward, **options)
    else:
        loss, log_pf, ref_log_pf = fused_dpo_loss(**inputs, **options)
    logs = preference_logs(settings, log_pf, ref_log_pf, mask)
    nll = logs["loss_gr"]
    logs["loss_preference"] = loss.detach() - settings.sft_weight / settings.gfn_weight * nll
    return settings.gfn_weight * loss, logs


@torch.no_grad()
def preference_logs(
    settings: FlowSettings, log_pf: Tensor, ref_log_pf: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """The supervised term; how far policy and reference are apart per token; and how often, and by
    how much, the positive has gained more than the best of the others."""
    ratio = log_ratios(log_pf, ref_log_pf, mask)
    valid = mask.any(-1)
    gained = ratio.sum(-1)
    best = gained[:, 1:].masked_fill(~valid[:, 1:], -torch.inf).amax(-1)
    counted = valid[:, 0] & valid[:, 1:].any(-1)
    margin = (gained[:, 0] - best).masked_fill(~counted, 0.0)
    prompts = counted.sum().clamp(min=1)
    divergence = k3_divergence(ratio).masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)
    return {
        "loss_gr": positive_nll(settings, log_pf, mask),
        "reference_divergence": divergence,
        "preference_margin": margin.sum() / prompts,
        "preference_accuracy": (margin > 0).sum() / prompts,
    }


def _reward(settings: FlowSettings, log_reward: Tensor, mask: Tensor) -> Tensor:
    """``R ** beta``, floored as the flow objectives floor it; 0 for padding."""
    shaped = settings.beta * log_reward.detach()
    if settings.log_reward_floor is not None:
        shaped = shaped.clamp(min=settings.log_reward_floor)
    return shaped.exp().masked_fill(~mask.any(-1), 0.0)
