"""The baselines' objectives: DPO, S-DPO, GRPO and IPA's, against a frozen reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import dpo_loss, fused_preference_loss, trajectory_logprobs
from ..ops.preference.reference import k3_divergence, log_ratios
from .objective import Head, positive_nll
from .reference import ReferenceStates
from .settings import FlowSettings

__all__ = ["best_and_worst", "preference_loss"]


def preference_loss(
    settings: FlowSettings,
    head: Head,
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor,
    reference: ReferenceStates,
    log_reward: Tensor | None,
    *,
    flow_share: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``sft_weight * L_GR + gfn_weight * L_preference``, and what is logged.

    Args:
        settings: objective and its constants.
        head: the output head.
        hidden: states [B, N, L, d] that predict ``tokens``.
        tokens: trajectories [B, N, L]; n = 0 is the observed positive; for ``"ipa"`` the three of
            :func:`best_and_worst`.
        mask: true for real tokens [B, N, L].
        reference: the reference's states of them, and its head.
        log_reward: log R [B, N]; ``"grpo"`` alone needs it.
        flow_share: see :meth:`gflowgr.models.GFlowModel.forward`.
    """
    weight = settings.gfn_weight * flow_share
    if settings.objective == "ipa":
        return _alignment_loss(settings, head, hidden, tokens, mask, reference, weight)
    ref_hidden, ref_weight, ref_bias = reference
    options: dict[str, Any] = {
        "mask": mask,
        "ref_bias": ref_bias,
        "beta": settings.reference_weight,
        "reduction": settings.reduced_by,
        "nll_weight": settings.sft_weight / weight,
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
        made = fused_preference_loss("grpo", **inputs, reward=reward, **options)
    else:
        made = fused_preference_loss("dpo", **inputs, **options)
    loss, log_pf, ref_log_pf = made
    nll = positive_nll(settings, log_pf, mask)
    logs = {
        "loss_gr": nll,
        "loss_preference": loss.detach() - settings.sft_weight / weight * nll,
        **preference_logs(log_pf, ref_log_pf, mask),
    }
    return weight * loss, logs


def best_and_worst(tokens: Tensor, mask: Tensor, log_reward: Tensor) -> tuple[Tensor, Tensor]:
    """The positive, and of the others the ones with the best and the worst reward.

    Among equal rewards the first one is taken; where best and worst are equal there is no pair.

    Args:
        tokens: trajectories [B, N, L], n = 0 the positive.
        mask: true for real tokens [B, N, L].
        log_reward: log R [B, N].

    Returns:
        Tokens [B, 3, L] and mask [B, 3, L], which is false for the two of a prompt without a pair.

    Raises:
        ValueError: N < 3.
    """
    count = tokens.shape[1]
    if count < 3:
        raise ValueError(f"tokens must have N >= 3 trajectories for objective 'ipa'; got {count}")
    valid = mask.any(-1)
    valid[:, 0] = False
    order = torch.arange(count, device=tokens.device)
    chosen, extremes = [torch.zeros_like(tokens[:, 0, 0])], []
    for sign in (1, -1):
        score = (sign * log_reward.detach()).masked_fill(~valid, -torch.inf)
        extremes.append(sign * score.amax(-1))
        # Without any valid trajectory all rewards are equal, so there is no pair either.
        first = torch.where(score == score.amax(-1, keepdim=True), order, count - 1).amin(-1)
        chosen.append(first)
    index = torch.stack(chosen, 1)[..., None].expand(-1, -1, tokens.shape[-1])
    paired = extremes[0] > extremes[1]
    kept = torch.stack([torch.ones_like(paired), paired, paired], 1)
    return tokens.gather(1, index), mask.gather(1, index) & kept[..., None]


def _alignment_loss(
    settings: FlowSettings,
    head: Head,
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor,
    reference: ReferenceStates,
    weight: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """``L_GR + weight * L_DPO`` of the positive, and of trajectories 1 (chosen) and 2."""
    log_pf = trajectory_logprobs(hidden, tokens=tokens, mask=mask, **head)
    ref_hidden, ref_weight, ref_bias = reference
    ref_head = {**head, "weight": ref_weight, "bias": ref_bias}
    with torch.no_grad():
        ref_log_pf = trajectory_logprobs(ref_hidden, tokens=tokens, mask=mask, **ref_head)
    pair = (log_pf[:, 1:], ref_log_pf[:, 1:])
    options: dict[str, Any] = {"beta": settings.reference_weight, "reduction": settings.reduced_by}
    loss = dpo_loss(*pair, mask=mask[:, 1:], **options)
    nll = positive_nll(settings, log_pf, mask)
    logs = {
        "loss_gr": nll.detach(),
        "loss_preference": loss.detach(),
        **preference_logs(*pair, mask[:, 1:]),
    }
    return nll + weight * loss, logs


@torch.no_grad()
def preference_logs(log_pf: Tensor, ref_log_pf: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """How far policy and reference are apart per token; and how often, and by how much, trajectory
    0 has gained more than the best of the others."""
    ratio = log_ratios(log_pf, ref_log_pf, mask)
    valid = mask.any(-1)
    gained = ratio.sum(-1)
    best = gained[:, 1:].masked_fill(~valid[:, 1:], -torch.inf).amax(-1)
    counted = valid[:, 0] & valid[:, 1:].any(-1)
    margin = (gained[:, 0] - best).masked_fill(~counted, 0.0)
    prompts = counted.sum().clamp(min=1)
    divergence = k3_divergence(ratio).masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)
    return {
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
