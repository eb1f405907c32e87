"""Flow-matching losses from token log-probabilities: TB, DB, SubTB(lambda) and VarGrad-TB.

Shared by all of them:

- ``log_pf`` [B, N, L] is the log-probability of each token of N trajectories for each of B prompts;
  ``log_reward`` [B, N] is the log of each trajectory's reward; ``mask`` [B, N, L] (bool, None = all
  true) is a prefix of each row: true at real tokens. A row without a true entry is a padding
  trajectory.
- The reward is shaped first: ``beta * log_reward``, then ``max(., log_reward_floor)``. Without a
  floor a NaN or infinite log-reward of a valid trajectory (a reward that is not positive and
  finite) is an error. With one, -inf (reward zero) and NaN (log of a negative reward) become the
  floor, with zero gradient; +inf stays an error.
- Residuals are model minus target in nats, squared, with no factor 1/2. The backward policy of a
  prefix tree is 1, so its log is absent.
- ``reduction``: ``"none"`` -> [B, N], zero at padding trajectories; ``"sum"``; ``"mean"`` over
  valid trajectories; ``"prompt"`` (default) = mean over prompts of the sum over their trajectories,
  where only prompts with a valid trajectory count. Without any valid trajectory the loss is 0 with
  zero gradients.
- float16 and bfloat16 inputs are computed and returned in float32; float64 in any input makes it
  float64.
- Values under a false mask reach neither the loss nor a gradient, be they NaN or infinite.
  Gradients flow to every floating input that asks for one, log_reward included.
- A valid token with ``log_pf = -inf`` (a forbidden token) has an infinite loss and no usable
  gradient.

Errors: TypeError for a wrong type or dtype, ValueError for a wrong shape, device, range, a mask
that is not a prefix, or a bad reward. See :mod:`gflowgr.ops.checks` for the switch of the checks on
values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gflowgr.ops import checks


@dataclass(frozen=True)
class RewardOptions:
    """The checked keyword arguments shared by all losses."""

    beta: float
    floor: float | None
    reduction: str


@dataclass(frozen=True)
class Trajectories:
    """Clean inputs of a loss: one floating dtype, zeros wherever the mask is false."""

    log_pf: Tensor  # [B, N, L]
    log_reward: Tensor  # [B, N], shaped
    mask: Tensor  # [B, N, L]
    valid: Tensor  # [B, N]


def check_options(beta: object, log_reward_floor: object, reduction: object) -> RewardOptions:
    """Check the keyword arguments that every loss takes."""
    return RewardOptions(
        beta=checks.check_number("beta", beta, above=0.0),
        floor=None
        if log_reward_floor is None
        else checks.check_number("log_reward_floor", log_reward_floor),
        reduction=checks.check_choice("reduction", reduction, checks.REDUCTIONS),
    )


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def prepare(
    log_pf: Tensor, log_reward: Tensor, mask: Tensor, options: RewardOptions, dtype: torch.dtype
) -> Trajectories:
    """Clean checked inputs and shape the reward.

    Padding is replaced BEFORE anything is computed from it: `0 * NaN` in a backward pass would
    otherwise carry the NaN of a masked position into the gradient.
    """
    valid = mask.any(-1)
    reward = options.beta * log_reward.to(dtype).masked_fill(~valid, 0.0)
    if options.floor is not None:
        # A comparison with NaN is false, so NaN is floored too.
        reward = reward.masked_fill(~(reward > options.floor), options.floor)
        reward = reward.masked_fill(~valid, 0.0)
    return Trajectories(log_pf.to(dtype).masked_fill(~mask, 0.0), reward, mask, valid)


def reduce_trajectories(losses: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Reduce losses [B, N] that are zero at padding trajectories."""
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    counted = valid if reduction == "mean" else valid.any(-1)
    return total / counted.sum().clamp(min=1)


def tb_definition(t: Trajectories, log_z: Tensor) -> Tensor:
    """Trajectory balance, squared residual of each trajectory [B, N]."""
    log_z = log_z.to(t.log_pf.dtype)[:, None].expand_as(t.valid).masked_fill(~t.valid, 0.0)
    return (log_z + t.log_pf.sum(-1) - t.log_reward).square()


def db_definition(t: Trajectories, log_flow: Tensor) -> Tensor:
    """Detailed balance, squared residuals summed over each trajectory's tokens [B, N]."""
    flow = log_flow.to(t.log_pf.dtype).masked_fill(~t.mask, 0.0)
    continues = _shift_left(t.mask)
    after = torch.where(
        t.mask & ~continues, t.log_reward[..., None], _shift_left(flow)
    )  # the flow of the state each token leads to: R at the last one
    return (flow + t.log_pf - after).square().sum(-1)


def subtb_definition(t: Trajectories, log_flow: Tensor, lam: float) -> Tensor:
    """SubTB(lambda), weighted squared residuals over all sub-trajectories [B, N].

    With potentials g_i = log F(s_i) - sum_{l<i} log_pf_l the residual of (i, j) is g_i - g_j, so
    all pairs come from one outer difference of L+1 numbers per trajectory.
    """
    dtype, device = t.log_pf.dtype, t.log_pf.device
    steps = t.log_pf.shape[-1]
    zero = t.log_pf.new_zeros((*t.valid.shape, 1))
    length = t.mask.sum(-1)  # [B, N]
    position = torch.arange(steps + 1, device=device)

    flow = torch.cat([log_flow.to(dtype).masked_fill(~t.mask, 0.0), zero], -1)
    flow = torch.where(position == length[..., None], t.log_reward[..., None], flow)
    potential = flow - torch.cat([zero, t.log_pf.cumsum(-1)], -1)
    squared = (potential[..., :, None] - potential[..., None, :]).square()  # [B, N, L+1, L+1]

    # Weights lambda^(j-i) over their sum, in logs, so that no power under- or overflows.
    distance = position[None, :] - position[:, None]  # j - i
    pair = (distance > 0) & (position <= length[..., None])[..., None, :]
    log_power = distance.to(dtype) * math.log(lam)
    scale = _subtb_log_normaliser(steps, lam, dtype, device)[length]
    exponent = torch.where(pair, log_power - scale[..., None, None], -math.inf)
    return torch.where(pair, exponent.exp() * squared, 0.0).sum((-2, -1))


def _subtb_log_normaliser(
    steps: int, lam: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """log sum_{i<j<=K} lambda^(j-i) for every length K = 0..L [L+1]; 0 for K = 0.

    A trajectory of K tokens has K + 1 - d sub-trajectories of d tokens.
    """
    size = torch.arange(steps + 1, device=device)
    count = (size[:, None] + 1 - size[None, :]).clamp(min=1).to(dtype)
    present = (size[None, :] >= 1) & (size[None, :] <= size[:, None])
    terms = torch.where(present, count.log() + size.to(dtype) * math.log(lam), -math.inf)
    return torch.where(size > 0, torch.logsumexp(terms, -1), 0.0)


def vargrad_definition(t: Trajectories) -> Tensor:
    """VarGrad-TB, squared residual of each trajectory against its prompt's own estimate [B, N]."""
    gap = t.log_reward - t.log_pf.sum(-1)
    estimate = _valid_mean(gap, t.valid)
    return (estimate[:, None] - gap).masked_fill(~t.valid, 0.0).square()


def _valid_mean(gap: Tensor, valid: Tensor) -> Tensor:
    """Mean over each prompt's valid trajectories [B] (`gap` is zero elsewhere); 0 without one."""
    return gap.sum(-1) / valid.sum(-1).clamp(min=1)


def _shift_left(x: Tensor) -> Tensor:
    """x[..., 1:] followed by a zero."""
    return torch.cat([x[..., 1:], torch.zeros_like(x[..., :1])], -1)


def tb_loss(
    log_pf: Tensor,
    log_reward: Tensor,
    log_z: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 1.0,
    log_reward_floor: float | None = None,
    reduction: str = "prompt",
) -> Tensor:
    """Trajectory balance: ``(log_z + sum_l log_pf - log_reward)^2`` per trajectory.

    Args:
        log_pf: [B, N, L] token log-probabilities, nats.
        log_reward: [B, N], nats, before shaping.
        log_z: [B] log partition function of each prompt, or a zero-dimensional tensor for all.
        mask: [B, N, L] bool, a prefix of each row; None = all true.
        beta: reward temper, > 0.
        log_reward_floor: least shaped log-reward, nats.
        reduction: "none" ([B, N]), "sum", "mean" or "prompt"; see the module's docstring.

    Returns:
        A scalar, or [B, N] for "none".

    Source: GFlowGR (arXiv 2506.16114), trajectory balance; Malkin et al. 2022 (arXiv 2201.13259).
    """
    options = check_options(beta, log_reward_floor, reduction)
    mask = _check_inputs(log_pf, log_reward, mask, options)
    log_z = checks.check_log_z(log_z, mask, "log_pf")
    dtype = compute_dtype(log_pf, log_reward, log_z)
    batch = prepare(log_pf, log_reward, mask, options, dtype)
    return reduce_trajectories(tb_definition(batch, log_z), batch.valid, reduction)


def db_loss(
    log_pf: Tensor,
    log_reward: Tensor,
    log_flow: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 1.0,
    log_reward_floor: float | None = None,
    reduction: str = "prompt",
) -> Tensor:
    """Detailed balance: ``sum_l (log_flow_l + log_pf_l - log_flow_{l+1})^2`` per trajectory.

    ``log_flow`` [B, N, L] is the log-flow of the state before each token, nats; the flow after a
    trajectory's last valid token is its shaped reward. Other arguments, reductions and errors as in
    :func:`tb_loss`.

    Source: GFlowGR (arXiv 2506.16114), detailed balance; Bengio et al. 2023 (arXiv 2111.09266).
    """
    options = check_options(beta, log_reward_floor, reduction)
    mask = _check_inputs(log_pf, log_reward, mask, options)
    log_flow = checks.check_log_flow(log_flow, mask, "log_pf")
    dtype = compute_dtype(log_pf, log_reward, log_flow)
    batch = prepare(log_pf, log_reward, mask, options, dtype)
    return reduce_trajectories(db_definition(batch, log_flow), batch.valid, reduction)


def subtb_loss(
    log_pf: Tensor,
    log_reward: Tensor,
    log_flow: Tensor,
    *,
    lam: float = 0.9,
    mask: Tensor | None = None,
    beta: float = 1.0,
    log_reward_floor: float | None = None,
    reduction: str = "prompt",
) -> Tensor:
    """Sub-trajectory balance over all sub-trajectories i < j of each trajectory.

    ``r_ij = log_flow_i + sum_{i<=l<j} log_pf_l - log_flow_j`` with the shaped reward as the flow
    after the last valid token; the squares are averaged with weights ``lam^(j-i)`` normalised
    within the trajectory. ``lam`` > 0: towards 0 it is DB divided by the length, towards infinity
    TB with ``log_flow_0`` for log Z. Other arguments, reductions and errors as in :func:`db_loss`.

    Extra memory: 2 B N (L+1)^2 numbers for the pairs and their weights.

    Source: Madan et al. 2023, SubTB(lambda) (arXiv 2209.12782), with weights normalised per
        trajectory.
    """
    options = check_options(beta, log_reward_floor, reduction)
    lam = checks.check_number("lam", lam, above=0.0)
    mask = _check_inputs(log_pf, log_reward, mask, options)
    log_flow = checks.check_log_flow(log_flow, mask, "log_pf")
    dtype = compute_dtype(log_pf, log_reward, log_flow)
    batch = prepare(log_pf, log_reward, mask, options, dtype)
    return reduce_trajectories(subtb_definition(batch, log_flow, lam), batch.valid, reduction)


def vargrad_loss(
    log_pf: Tensor,
    log_reward: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 1.0,
    log_reward_floor: float | None = None,
    reduction: str = "prompt",
) -> Tensor:
    """VarGrad trajectory balance: TB with each prompt's log Z estimated from its own trajectories.

    ``log_z`` of :func:`tb_loss` is :func:`vargrad_log_z`, the mean over the prompt's valid
    trajectories, so summed over a prompt the loss is their number times the variance of
    ``log_reward - sum log_pf``, and a prompt with a single valid trajectory has loss 0. The
    gradient is that of the value returned: the estimate is not detached. For "sum", "mean" and
    "prompt" detaching it would give the same gradient, since a prompt's residuals sum to zero; for
    "none" under unequal upstream gradients only the undetached one is the derivative. Arguments,
    reductions and errors as in :func:`tb_loss`.

    Source: Richter et al. 2020 (arXiv 2010.10436); Zhang et al. 2023 (arXiv 2302.05446).
    """
    options = check_options(beta, log_reward_floor, reduction)
    mask = _check_inputs(log_pf, log_reward, mask, options)
    batch = prepare(log_pf, log_reward, mask, options, compute_dtype(log_pf, log_reward))
    return reduce_trajectories(vargrad_definition(batch), batch.valid, reduction)


def vargrad_log_z(
    log_pf: Tensor,
    log_reward: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 1.0,
    log_reward_floor: float | None = None,
) -> Tensor:
    """The group estimate of log Z [B]: each prompt's mean of ``log_reward - sum_l log_pf``, nats.

    The mean runs over the prompt's valid trajectories, with the shaped reward; a prompt without one
    has no estimate and gets NaN. Differentiable: detach it for logs and for the initialisation of a
    learned log Z. Arguments and errors as in :func:`tb_loss`.
    """
    options = check_options(beta, log_reward_floor, "none")
    mask = _check_inputs(log_pf, log_reward, mask, options)
    batch = prepare(log_pf, log_reward, mask, options, compute_dtype(log_pf, log_reward))
    estimate = _valid_mean(batch.log_reward - batch.log_pf.sum(-1), batch.valid)
    return estimate.masked_fill(~batch.valid.any(-1), math.nan)


def _check_inputs(
    log_pf: object, log_reward: object, mask: object, options: RewardOptions
) -> Tensor:
    """Check what all losses share; returns the mask."""
    log_pf = checks.check_tensor(
        "log_pf", log_pf, (None, None, None), "BNL", dtypes=checks.FLOAT_DTYPES
    )
    data = checks.DataChecks()
    mask = checks.check_mask(mask, log_pf.shape, log_pf.device, "log_pf", data)
    checks.check_log_reward(log_reward, mask, options.floor, "log_pf", data)
    data.run()
    return mask
