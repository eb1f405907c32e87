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
- ``residual_clip`` c bounds the pull of single outliers (TB, DB and VarGrad): a residual r counts
  ``r^2`` up to c nats and ``c (2 |r| - c)`` beyond, the tangent (Huber 1964, times 2). VarGrad's
  estimate is made first, of unclipped numbers. SubTB has no such form: its residuals overlap, and
  the sums of squares over all of them are what makes it O(L).
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

from torch import Tensor

from gflowgr.ops import checks
from gflowgr.ops.flow_loss.op import flow_loss
from gflowgr.ops.flow_loss.reference import FlowOptions, prepare, valid_mean
from gflowgr.ops.precision import compute_dtype

__all__ = [
    "check_options",
    "db_loss",
    "subtb_loss",
    "tb_loss",
    "vargrad_log_z",
    "vargrad_loss",
]


def check_options(
    kind: str,
    beta: object,
    log_reward_floor: object,
    reduction: object,
    *,
    lam: float = 1.0,
    nll_weight: float = 0.0,
    residual_clip: object = None,
) -> FlowOptions:
    """Check the keyword arguments that losses take, and add those checked by the caller."""
    clip = None
    if residual_clip is not None:
        clip = checks.check_number("residual_clip", residual_clip, above=0.0)
        if kind == "subtb":
            raise ValueError(f'residual_clip must be None for "subtb"; got {clip:g}')
    return FlowOptions(
        kind,
        lam,
        checks.check_number("beta", beta, above=0.0),
        None
        if log_reward_floor is None
        else checks.check_number("log_reward_floor", log_reward_floor),
        checks.check_choice("reduction", reduction, checks.REDUCTIONS),
        nll_weight,
        clip,
    )


def tb_loss(
    log_pf: Tensor,
    log_reward: Tensor,
    log_z: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 1.0,
    log_reward_floor: float | None = None,
    residual_clip: float | None = None,
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
        residual_clip: residual > 0 from which the loss is linear, nats; None: squared throughout.
        reduction: "none" ([B, N]), "sum", "mean" or "prompt"; see the module's docstring.

    Returns:
        A scalar, or [B, N] for "none".

    Source: GFlowGR (arXiv 2506.16114), trajectory balance; Malkin et al. 2022 (arXiv 2201.13259).
    """
    options = check_options("tb", beta, log_reward_floor, reduction, residual_clip=residual_clip)
    _check_inputs(log_pf, log_reward, mask, options)
    log_z = checks.check_log_z(log_z, log_pf, "log_pf")
    return flow_loss(options, log_pf, log_reward, log_z, mask)


def db_loss(
    log_pf: Tensor,
    log_reward: Tensor,
    log_flow: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 1.0,
    log_reward_floor: float | None = None,
    residual_clip: float | None = None,
    reduction: str = "prompt",
) -> Tensor:
    """Detailed balance: ``sum_l (log_flow_l + log_pf_l - log_flow_{l+1})^2`` per trajectory.

    ``log_flow`` [B, N, L] is the log-flow of the state before each token, nats; the flow after a
    trajectory's last valid token is its shaped reward. Other arguments, reductions and errors as in
    :func:`tb_loss`.

    Source: GFlowGR (arXiv 2506.16114), detailed balance; Bengio et al. 2023 (arXiv 2111.09266).
    """
    options = check_options("db", beta, log_reward_floor, reduction, residual_clip=residual_clip)
    _check_inputs(log_pf, log_reward, mask, options)
    log_flow = checks.check_log_flow(log_flow, log_pf, "log_pf")
    return flow_loss(options, log_pf, log_reward, log_flow, mask)


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

    Extra memory: B N numbers; 2 B N (L+1)^2 of them where the PyTorch reference runs.

    Source: Madan et al. 2023, SubTB(lambda) (arXiv 2209.12782), with weights normalised per
        trajectory.
    """
    lam = checks.check_number("lam", lam, above=0.0)
    options = check_options("subtb", beta, log_reward_floor, reduction, lam=lam)
    _check_inputs(log_pf, log_reward, mask, options)
    log_flow = checks.check_log_flow(log_flow, log_pf, "log_pf")
    return flow_loss(options, log_pf, log_reward, log_flow, mask)


def vargrad_loss(
    log_pf: Tensor,
    log_reward: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 1.0,
    log_reward_floor: float | None = None,
    residual_clip: float | None = None,
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
    options = check_options(
        "vargrad", beta, log_reward_floor, reduction, residual_clip=residual_clip
    )
    _check_inputs(log_pf, log_reward, mask, options)
    return flow_loss(options, log_pf, log_reward, None, mask)


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
    options = check_options("vargrad", beta, log_reward_floor, "none")
    _check_inputs(log_pf, log_reward, mask, options)
    batch = prepare(
        log_pf,
        log_reward,
        mask,
        beta=options.beta,
        floor=options.floor,
        dtype=compute_dtype(log_pf, log_reward),
    )
    estimate = valid_mean(batch.log_reward - batch.log_pf.sum(-1), batch.valid)
    return estimate.masked_fill(~batch.valid.any(-1), math.nan)


def _check_inputs(
    log_pf: object, log_reward: object, mask: Tensor | None, options: FlowOptions
) -> None:
    """Check what all losses share."""
    log_pf = checks.check_tensor(
        "log_pf", log_pf, (None, None, None), "BNL", dtypes=checks.FLOAT_DTYPES
    )
    data = checks.DataChecks()
    if mask is not None:
        mask = checks.check_mask(mask, log_pf.shape, log_pf.device, "log_pf", data)
    like = log_pf if mask is None else mask
    log_reward = checks.check_log_reward(log_reward, like, options.floor, "log_pf", data)
    if not (data.enabled and checks.flow_inputs_ok(log_reward, mask, options.floor)):
        data.run()
