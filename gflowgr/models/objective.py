"""The joint objective ``L_GR + lambda * L_GFN`` from states, in one pass over the output head."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..extensions import load_outside
from ..ops import fused_flow_kl_loss, fused_flow_loss, fused_vargrad_loss, trajectory_logprobs
from ..ops.flow_loss.op import flow_loss
from ..ops.flow_loss.reference import (
    FlowOptions,
    Trajectories,
    prepare,
    reduce_trajectories,
    valid_mean,
)
from ..ops.precision import compute_dtype
from ..rewards.fusion import RewardFusion
from ..tree import ItemFlows, PrefixTree, item_flows
from .heads import partial_log_reward
from .monitor import residual_logs
from .settings import FlowSettings

__all__ = [
    "Head",
    "balance_loss",
    "flow_logs",
    "flow_start",
    "flow_statistics",
    "fusion_term",
    "group_log_z",
    "positive_nll",
    "supervised_loss",
    "term_counts",
    "with_reference",
]

Head = dict[str, Any]
"""The output head as the ops take it: weight, bias, tree, normalize."""


def fusion_term(
    settings: FlowSettings,
    fusion: RewardFusion,
    signals: Tensor,
    log_reward: Tensor,
    valid: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What keeps a learned fusion near the sum, weighted, and what is logged of the fusion.

    Args:
        settings: weight, reduction and names of the signals.
        fusion: the learned fusion.
        signals: [B, N, K].
        log_reward: what it made of them [B, N].
        valid: true for trajectories that are not padding [B, N].
    """
    departure = fusion.departure(signals, log_reward).masked_fill(~valid, 0.0)
    anchor = reduce_trajectories(departure, valid, settings.reduced_by)
    logs = {"loss_fusion": anchor.detach()}
    if fusion.mode == "weighted":
        weights = fusion.weights().detach()
        logs |= {f"fusion/{n}": w for n, w in zip(settings.signals, weights, strict=True)}
    return settings.fusion_anchor * anchor, logs


def supervised_loss(
    settings: FlowSettings,
    head: Head,
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    *,
    tree: PrefixTree,
    weights: Tensor | None = None,
) -> Tensor:
    """L_GR of the positives alone.

    Args:
        settings: reduction and label smoothing.
        head: the output head.
        hidden: states [B, 1, L, d] that predict ``tokens``.
        tokens: the positives [B, 1, L].
        mask: true for real tokens [B, 1, L]; None: all are.
        tree: of the identifiers, whose items label smoothing takes.
        weights: multiply the prompts' losses [B]; None: all alike.
    """
    reduction = settings.reduced_by if weights is None else "none"
    share = settings.label_smoothing
    if share > 0.0:
        loss = share * fused_flow_kl_loss(
            hidden,
            tokens=tokens,
            flows=_uniform_flows(tree, len(tokens)),
            mask=mask,
            reduction=reduction,
            nll_weight=(1.0 - share) / share,
            **head | {"tree": tree},
        )
    else:
        # VarGrad of a single trajectory is 0: what is left is the supervised term.
        loss = fused_vargrad_loss(
            hidden,
            tokens=tokens,
            log_reward=torch.zeros(tokens.shape[:2], device=tokens.device),
            mask=mask,
            nll_weight=1.0,
            reduction=reduction,
            **head,
        )
    if weights is None:
        return loss
    valid = torch.ones_like(loss, dtype=torch.bool) if mask is None else mask.any(-1)
    return reduce_trajectories(loss * weights.unsqueeze(-1), valid, settings.reduced_by)


def _uniform_flows(tree: PrefixTree, prompts: int) -> ItemFlows:
    """Flows of the reward 1 for every item of the catalogue, which no row of rewards is held for:
    the pool is empty, and all items are at the floor."""
    nothing = torch.full((prompts, 1), -1, device=tree.device)
    return item_flows(tree, torch.zeros_like(nothing).float(), items=nothing, log_reward_floor=0.0)


def balance_loss(
    settings: FlowSettings,
    head: Head,
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor,
    log_reward: Tensor,
    target: Tensor | None,
    log_proposal: Tensor | None = None,
    log_reference: Tensor | None = None,
    *,
    rewarded: Tensor | None = None,
    flow_share: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The joint loss of TB, DB, SubTB or an objective from outside, and what is logged of it.

    Three matrix products with the head for the loss and all gradients (over the vocabulary), no
    logits held. With importance weights, which depend on log P_F, or trajectories without a reward
    it takes four products.

    Args:
        settings: objective and its constants.
        head: the output head.
        hidden: states [B, N, L, d] that predict ``tokens``.
        tokens: trajectories [B, N, L].
        mask: true for real tokens [B, N, L].
        log_reward: log R [B, N].
        target: log Z [B], log F [B, N, L], or None for VarGrad.
        log_proposal: see :meth:`gflowgr.models.GFlowModel.forward`.
        log_reference: see :func:`with_reference`.
        rewarded: false where a trajectory's reward is 0 [B, N], of which the flow loss says
            nothing; None: all have one.
        flow_share: see :meth:`gflowgr.models.GFlowModel.forward`.

    Raises:
        ValueError: no ``log_proposal``, though the settings ask for importance weights.
    """
    log_reward = with_reference(settings, log_reward, log_reference)
    weight = settings.gfn_weight * flow_share
    weights: Tensor | None = None
    if settings.is_outside or settings.importance_clip is not None or rewarded is not None:
        log_pf = trajectory_logprobs(hidden, tokens=tokens, mask=mask, **head)
        balanced = (settings, log_pf, log_reward, target, mask)
        if settings.is_outside:
            flow = _flow_loss(*balanced)
        else:
            weights = _importance(settings, log_pf, log_proposal)
            flow = _flow_loss(*balanced, weights, rewarded)
        loss = weight * flow + positive_nll(settings, log_pf, mask)
        log_pf = log_pf.detach()
    else:
        loss, log_pf = fused_flow_loss(
            _kind(settings, target),
            hidden,
            tokens=tokens,
            log_reward=log_reward,
            balance=target,
            mask=mask,
            lam=settings.subtb_lambda,
            beta=settings.beta,
            log_reward_floor=settings.log_reward_floor,
            residual_clip=settings.clip,
            reduction=settings.reduced_by,
            nll_weight=1.0 / weight,
            **head,
        )
        loss = weight * loss
    logs = flow_logs(settings, log_pf, log_reward, target, mask, rewarded)
    if weights is not None:
        valid = mask.any(-1)
        logs["importance"] = weights.masked_fill(~valid, 0.0).sum() / valid.sum()
    return loss, logs


def _importance(
    settings: FlowSettings, log_pf: Tensor, log_proposal: Tensor | None
) -> Tensor | None:
    """Clipped ratios [B, N] of the policy to what drew the trajectories; None without a clip."""
    if settings.importance_clip is None:
        return None
    if log_proposal is None:
        raise ValueError("log_proposal is required: settings.importance_clip is set")
    ratio = (log_pf.detach().sum(-1) - log_proposal).exp()
    return ratio.clamp(max=settings.importance_clip).masked_fill(log_proposal.isnan(), 1.0)


def with_reference(
    settings: FlowSettings, log_reward: Tensor, log_reference: Tensor | None
) -> Tensor:
    """log R [B, N] with the reference's log P [B, N], so that its ``beta``-fold is
    ``beta * log R + log pi_ref``.

    Source: Trajectory Balance with Asynchrony (arXiv 2503.18929), FlowRL (arXiv 2509.15207).
    """
    return log_reward if log_reference is None else log_reward + log_reference / settings.beta


@torch.no_grad()
def flow_logs(
    settings: FlowSettings,
    log_pf: Tensor,
    log_reward: Tensor,
    target: Tensor | None,
    mask: Tensor,
    rewarded: Tensor | None = None,
) -> dict[str, Tensor]:
    """The loss's terms, residuals, and log Z beside its group estimate, from what the loss has made
    anyway; arguments as in :func:`balance_loss`."""
    batch = _prepared(settings, log_pf, log_reward, _flow_mask(mask, rewarded))
    group = _group_log_z(batch)
    logs = {
        "loss_gr": positive_nll(settings, log_pf, mask),
        "loss_gfn": _flow_loss(settings, log_pf, log_reward, target, mask, None, rewarded),
        "log_z_group": group.nanmean(),
        **residual_logs(batch, target),
    }
    if target is None:
        return logs | {"log_z": logs["log_z_group"]}
    # The flow of the empty prefix is log Z: all branches agree on it.
    log_z = target if target.dim() == 1 else target[:, 0, 0]
    gap = (log_z - group).square().nanmean().sqrt()
    return logs | {"log_z": log_z.mean(), "log_z_gap_rms": gap}


def group_log_z(settings: FlowSettings, log_pf: Tensor, log_reward: Tensor, mask: Tensor) -> Tensor:
    """Each prompt's estimate of log Z from its own trajectories [B]; NaN without one.

    :func:`gflowgr.vargrad_log_z`, without checking again what the loss has checked.
    """
    return _group_log_z(_prepared(settings, log_pf, log_reward, mask))


def _prepared(
    settings: FlowSettings, log_pf: Tensor, log_reward: Tensor, mask: Tensor
) -> Trajectories:
    return prepare(
        log_pf,
        log_reward,
        mask,
        beta=settings.beta,
        floor=settings.log_reward_floor,
        dtype=compute_dtype(log_pf, log_reward),
    )


def _group_log_z(batch: Trajectories) -> Tensor:
    estimate = valid_mean(batch.log_reward - batch.log_pf.sum(-1), batch.valid)
    return estimate.masked_fill(~batch.valid.any(-1), math.nan)


@torch.no_grad()
def flow_statistics(
    settings: FlowSettings, log_pf: Tensor, log_reward: Tensor, tokens: Tensor, mask: Tensor
) -> Tensor:
    """What :func:`flow_start` needs of a batch, as sums [3, L + 1] in float64 that may be added up
    over the parts of a larger batch.

    By position of a token: sum of log P_F, number of tokens, sum of the partial rewards; in the
    last column: sum of the prompts' group estimates of log Z, number of prompts, nothing.
    """
    sums = log_pf.new_zeros((3, log_pf.shape[-1] + 1), dtype=torch.float64)
    group = group_log_z(settings, log_pf, log_reward, mask)
    sums[0, :-1] = log_pf.masked_fill(~mask, 0.0).sum((0, 1), dtype=torch.float64)
    sums[1, :-1] = mask.sum((0, 1))
    sums[0, -1] = group.nansum(dtype=torch.float64)
    sums[1, -1] = (~group.isnan()).sum()
    if settings.forward_looking:
        partial = partial_log_reward(tokens, mask, settings.beta).masked_fill(~mask, 0.0)
        sums[2, :-1] = partial.sum((0, 1), dtype=torch.float64)
    return sums


def flow_start(statistics: Tensor) -> Tensor:
    """A start [L] for log Z (its first entry) or log F of prefixes of each length.

    At the empty prefix the mean of the prompts' group estimates of log Z; from there each token
    adds the mean of its position's log P_F, so that the residuals of every step are zero on average
    for identifiers of one length. With a forward-looking flow it is the start of what is learned.

    Args:
        statistics: of the whole batch, see :func:`flow_statistics`.
    """
    count = statistics[1].clamp(min=1)
    steps = statistics[0, :-1] / count[:-1]
    log_z = statistics[0, -1] / count[-1]
    return log_z + steps.cumsum(0) - steps - statistics[2, :-1] / count[:-1]


@torch.no_grad()
def term_counts(settings: FlowSettings, mask: Tensor, log_reward: Tensor | None) -> Tensor:
    """How many prompts a batch has, and how many things the second term of its loss is a mean over
    (trajectories, pairs, or prompts again), as float64 [2].

    Args:
        settings: objective and reduction.
        mask: true for real tokens [B, N, L].
        log_reward: log R [B, N]; ``"ipa"`` alone needs it.
    """
    valid = mask.any(-1)
    prompts = valid.any(-1).sum()
    terms = prompts
    if settings.has_reference and settings.objective != "grpo":
        if settings.objective == "ipa" and mask.shape[1] > 1:
            assert log_reward is not None
            others = valid.clone()
            others[:, 0] = False
            best, worst = (
                (sign * log_reward).masked_fill(~others, -torch.inf).amax(-1) for sign in (1, -1)
            )
            terms = (best > -worst).sum()
        elif mask.shape[1] > 1:
            terms = (valid[:, 0] & valid[:, 1:].any(-1)).sum()
    elif settings.reduced_by == "mean" and not settings.has_reference:
        terms = valid.sum()
    return torch.stack([prompts, terms]).double()


def _kind(settings: FlowSettings, target: Tensor | None) -> str:
    """The flow loss, as :mod:`gflowgr.ops` calls it."""
    return "vargrad" if target is None else settings.objective


def _flow_loss(
    settings: FlowSettings,
    log_pf: Tensor,
    log_reward: Tensor,
    target: Tensor | None,
    mask: Tensor,
    weights: Tensor | None = None,
    rewarded: Tensor | None = None,
) -> Tensor:
    """L_GFN from log-probabilities; ``weights`` [B, N] multiply the trajectories' losses, and those
    that are not ``rewarded`` [B, N] have none. A mean counts them all the same, so that it is over
    what the batch says and not over what its rewards are.

    Raises:
        ValueError: an objective from outside gives something else than losses [B, N].
    """
    if settings.is_outside:
        scaled = settings.beta * log_reward
        if settings.log_reward_floor is not None:
            scaled = scaled.clamp(min=settings.log_reward_floor)
        made = load_outside(settings.objective, "objective")(log_pf, scaled, target, mask)
        if not isinstance(made, Tensor) or made.shape != log_reward.shape:
            found = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(
                f"objective {settings.objective!r} must give losses [B, N] = "
                f"{tuple(log_reward.shape)}; got {found}"
            )
        valid = mask.any(-1)
        return reduce_trajectories(made.masked_fill(~valid, 0.0), valid, settings.reduced_by)
    flow = FlowOptions(
        _kind(settings, target),
        lam=settings.subtb_lambda,
        beta=settings.beta,
        floor=settings.log_reward_floor,
        reduction="none",
        clip=settings.clip,
    )
    losses = flow_loss(flow, log_pf, log_reward, target, _flow_mask(mask, rewarded))
    if weights is not None:
        losses = losses * weights
    return reduce_trajectories(losses, mask.any(-1), settings.reduced_by)


def _flow_mask(mask: Tensor, rewarded: Tensor | None) -> Tensor:
    return mask if rewarded is None else mask & rewarded.unsqueeze(-1)


def positive_nll(settings: FlowSettings, log_pf: Tensor, mask: Tensor) -> Tensor:
    """L_GR: token-summed NLL of the positives; mean over prompts, or their sum."""
    total = -log_pf[:, 0].sum()
    if settings.reduced_by == "sum":
        return total
    return total / mask.any(-1).any(-1).sum().clamp(min=1)
