"""Objectives with exact flows: trajectories balanced against them, the divergence from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import fused_flow_kl, trajectory_logprobs
from ..ops.flow_loss.reference import reduce_trajectories
from ..tree import ItemFlows
from .monitor import kl_positive
from .objective import Head, balance_loss, positive_nll
from .settings import FlowSettings

__all__ = ["distillation_loss", "exact_loss", "exact_target", "flow_kl_loss"]


def exact_loss(
    settings: FlowSettings,
    head: Head,
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor,
    flows: ItemFlows,
    log_proposal: Tensor | None = None,
    log_reference: Tensor | None = None,
    *,
    flow_share: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The joint loss of any objective with exact flows, and what is logged of it.

    Trajectories without a reward have no flow loss. Arguments as in
    :func:`~gflowgr.models.objective.balance_loss`; ``flows`` of the B prompts.
    """
    if settings.objective == "flow_kl":
        given = (hidden, tokens, mask, flows)
        return flow_kl_loss(settings, head, *given, flow_share=flow_share)
    target, log_reward = exact_target(settings, flows, tokens, mask)
    counted = (log_reward > -math.inf) | ~mask.any(-1)
    # item_flows has synchronised already.
    rewarded = None if bool(counted.all()) else counted
    loss, logs = balance_loss(
        settings,
        head,
        hidden,
        tokens,
        mask,
        log_reward,
        target,
        log_proposal,
        log_reference,
        rewarded=rewarded,
        flow_share=flow_share,
    )
    logs["kl_positive"] = kl_positive(hidden, tokens, mask, flows, head)
    return loss, logs


def distillation_loss(
    settings: FlowSettings,
    head: Head,
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    flow_share: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_GR + gfn_weight * the mean NLL of each prompt's drawn trajectories, and what is logged.

    A prompt without draws adds 0 to the mean over prompts. Arguments as in :func:`flow_kl_loss`;
    trajectories n >= 1 are the draws.
    """
    log_pf = trajectory_logprobs(hidden, tokens=tokens, mask=mask, **head)
    drawn = mask.any(-1)
    prompts = drawn.any(-1).sum().clamp(min=1)
    nll = -log_pf[:, 1:].sum((1, 2)) / drawn[:, 1:].sum(-1).clamp(min=1)
    distilled = nll.sum() / prompts
    supervised = positive_nll(settings, log_pf, mask)
    loss = supervised + settings.gfn_weight * flow_share * distilled
    return loss, {"loss_gr": supervised.detach(), "loss_gfn": distilled.detach()}


def exact_target(
    settings: FlowSettings, flows: ItemFlows, tokens: Tensor, mask: Tensor
) -> tuple[Tensor | None, Tensor]:
    """What trajectories with exact flows are balanced against, and their log-rewards, nats.

    Args:
        settings: objective ``"tb"``, ``"db"`` or ``"subtb"``.
        flows: of the B prompts.
        tokens: trajectories [B, N, L].
        mask: true for real tokens [B, N, L].

    Returns:
        log Z [B], log F before each token [B, N, L], or None for VarGrad; and log R [B, N] of the
        identifiers, each the sum over the items that share it: -inf without a reward.
    """
    nodes = flows.tree.walk(tokens, mask=mask)
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
    if settings.objective == "tb":
        log_reward = flows.node_log_flow(nodes.gather(-1, last).squeeze(-1))
        return None if settings.is_vargrad else flows.log_z, log_reward
    visited = torch.cat([torch.zeros_like(nodes[..., :1]), nodes], -1)
    log_flow = flows.node_log_flow(visited)
    return log_flow[..., :-1].contiguous(), log_flow.gather(-1, last + 1).squeeze(-1)


def flow_kl_loss(
    settings: FlowSettings,
    head: Head,
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor,
    flows: ItemFlows,
    *,
    flow_share: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_GR + gfn_weight * the flow's divergence at the trajectories' prefixes, and what is logged.

    Args:
        settings: objective and its constants.
        head: the output head.
        hidden: states [B, N, L, d] that predict ``tokens``.
        tokens: trajectories [B, N, L]; n = 0 is the observed positive.
        mask: true for real tokens [B, N, L].
        flows: exact flows of the B prompts.
        flow_share: see :meth:`gflowgr.models.GFlowModel.forward`.
    """
    weight = settings.gfn_weight * flow_share
    loss, kl, log_pf = fused_flow_kl(
        hidden,
        tokens=tokens,
        flows=flows,
        mask=mask,
        reduction=settings.reduced_by,
        nll_weight=1.0 / weight,
        **head | {"tree": flows.tree},
    )
    of_flow = reduce_trajectories(kl.sum(-1), mask.any(-1), settings.reduced_by)
    logs = {"loss_gr": positive_nll(settings, log_pf, mask), "loss_gfn": of_flow}
    if tokens.shape[1] > 1:  # else it is all of the loss
        logs["kl_positive"] = kl[:, 0].sum() / mask[:, 0, 0].sum().clamp(min=1)
    return weight * loss, logs
