"""Preference and policy-gradient losses from token log-probabilities: DPO, S-DPO and GRPO.

Shared by all of them:

- ``log_pf`` [B, N, L] is the log-probability of each token of N trajectories for each of B prompts,
  ``ref_log_pf`` [B, N, L] the same under the frozen reference, which gets no gradient; ``mask``
  [B, N, L] (bool, None = all true) is a prefix of each row: true at real tokens. A row without a
  true entry is a padding trajectory.
- A loss is one number per prompt. ``reduction``: ``"none"`` -> [B], zero at prompts that do not
  count; ``"sum"``; ``"prompt"`` (default) and ``"mean"``, here the same: the mean over the prompts
  that count. Without any the loss is 0 with zero gradients.
- float16 and bfloat16 inputs are computed and returned in float32; float64 in any input makes it
  float64.
- Values under a false mask reach neither the loss nor a gradient, be they NaN or infinite.
- Gaps between policy and reference may be as large as their numbers: nothing overflows.
- A valid token with a log-probability of -inf (a forbidden token) has no finite loss.

They run in plain PyTorch; log-probabilities are small beside what makes them.

Errors: TypeError for a wrong type or dtype, ValueError for a wrong shape, device, range, a mask
that is not a prefix, or a reward that is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gflowgr.ops import checks
from gflowgr.ops.flow_loss.reference import full_mask
from gflowgr.ops.preference.reference import grpo_per_prompt, reduce_prompts, sdpo_per_prompt

__all__ = ["check_rejected", "check_reward", "dpo_loss", "grpo_loss", "sdpo_loss"]


def dpo_loss(
    log_pf: Tensor,
    ref_log_pf: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 0.1,
    reduction: str = "prompt",
) -> Tensor:
    """DPO: ``-log sigmoid(beta (Delta_0 - Delta_1))`` of a chosen and a rejected trajectory.

    ``Delta_n`` is ``sum_l (log_pf - ref_log_pf)`` of trajectory n. Trajectory 0 is the chosen one,
    trajectory 1 the rejected one; for several rejected ones: :func:`sdpo_loss`.

    Args:
        log_pf: [B, 2, L] token log-probabilities, nats: the chosen trajectory, the rejected one.
        ref_log_pf: [B, 2, L] of the reference.
        mask: [B, 2, L] bool, a prefix of each row; None = all true.
        beta: weight > 0 of the log-ratios.
        reduction: "none" ([B]), "sum", "mean" or "prompt"; see the module's docstring.

    Returns:
        A scalar, or [B] for "none".

    Source: Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.
    """
    log_pf = checks.check_tensor(
        "log_pf", log_pf, (None, None, None), "BNL", dtypes=checks.FLOAT_DTYPES
    )
    if log_pf.shape[1] != 2:
        raise ValueError(
            f"log_pf must have N = 2 trajectories, chosen and rejected; got N = {log_pf.shape[1]}; "
            "for several rejected ones: sdpo_loss"
        )
    return sdpo_loss(log_pf, ref_log_pf, mask=mask, beta=beta, reduction=reduction)


def sdpo_loss(
    log_pf: Tensor,
    ref_log_pf: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 1.0,
    reduction: str = "prompt",
) -> Tensor:
    """S-DPO: ``softplus(logsumexp_n beta (Delta_n - Delta_0))`` over the rejected trajectories n.

    ``Delta_n`` is ``sum_l (log_pf - ref_log_pf)`` of trajectory n. With one rejected trajectory it
    is DPO. Prompts count whose trajectory 0 and at least one other are valid.

    Args:
        log_pf: [B, N, L] token log-probabilities, nats; N >= 2. Trajectory 0 is the chosen one,
            the others are rejected.
        ref_log_pf: [B, N, L] of the reference.
        mask: [B, N, L] bool, a prefix of each row; None = all true.
        beta: weight > 0 of the log-ratios.
        reduction: "none" ([B]), "sum", "mean" or "prompt"; see the module's docstring.

    Returns:
        A scalar, or [B] for "none".

    Source: Chen et al. 2024 (arXiv 2406.09215), softmax-DPO.
    """
    beta = checks.check_number("beta", beta, above=0.0)
    reduction = checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    data = checks.DataChecks()
    mask = _check_inputs(log_pf, ref_log_pf, mask, data)
    check_rejected(log_pf, "log_pf")
    data.run()
    return reduce_prompts(*sdpo_per_prompt(log_pf, ref_log_pf, mask, beta), reduction)


def grpo_loss(
    log_pf: Tensor,
    ref_log_pf: Tensor,
    reward: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 1e-3,
    reduction: str = "prompt",
) -> Tensor:
    """GRPO: per token ``-(exp(log_pf - sg(log_pf)) * A - beta * k3)``, sg being a stopped gradient.

    ``k3 = exp(ref - log_pf) - (ref - log_pf) - 1`` estimates the divergence from the reference, see
    :func:`~gflowgr.ops.preference.reference.k3_divergence`; A is the trajectory's advantage in its
    group, see :func:`~gflowgr.ops.preference.reference.group_advantages`. A prompt's loss is the
    mean over its valid trajectories of the mean over their tokens; prompts with a valid trajectory
    count.

    The ratio is 1 and only its gradient matters: the loss is meant for trajectories drawn from the
    policy as it is. Its value tells little: the advantages of a group sum to zero.

    Args:
        log_pf: [B, N, L] token log-probabilities, nats, of a group of N trajectories.
        ref_log_pf: [B, N, L] of the reference.
        reward: [B, N] reward of each trajectory, not its log; no gradient flows into it.
        mask: [B, N, L] bool, a prefix of each row; None = all true.
        beta: weight >= 0 of the divergence.
        reduction: "none" ([B]), "sum", "mean" or "prompt"; see the module's docstring.

    Returns:
        A scalar, or [B] for "none".

    Source: Shao et al. 2024 (arXiv 2402.03300), GRPO with one update per group.
    """
    beta = checks.check_number("beta", beta, least=0.0)
    reduction = checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    data = checks.DataChecks()
    mask = _check_inputs(log_pf, ref_log_pf, mask, data)
    check_reward(reward, mask, "log_pf", data)
    data.run()
    return reduce_prompts(*grpo_per_prompt(log_pf, ref_log_pf, reward, mask, beta), reduction)


def check_rejected(trajectories: Tensor, name: str) -> None:
    """Check that there is a trajectory to compare the chosen one with."""
    if trajectories.shape[1] < 2:
        raise ValueError(
            f"{name} must have N >= 2 trajectories, a chosen and rejected ones; got shape "
            f"{list(trajectories.shape)}"
        )


def check_reward(reward: object, mask: Tensor, source: str, data: checks.DataChecks) -> Tensor:
    """Check reward [B, N]: finite at valid trajectories."""
    checked = checks.check_tensor(
        "reward",
        reward,
        mask.shape[:2],
        "BN",
        dtypes=checks.FLOAT_DTYPES,
        device=mask.device,
        source=source,
    )
    data.add(
        lambda: ~torch.isfinite(checked) & mask.any(-1),
        lambda i: f"{checks.at('reward', i)} must be finite; got {checked[i].item():g}",
    )
    return checked


def _check_inputs(
    log_pf: Tensor, ref_log_pf: Tensor, mask: Tensor | None, data: checks.DataChecks
) -> Tensor:
    """Check what all losses share; returns the mask."""
    log_pf = checks.check_tensor(
        "log_pf", log_pf, (None, None, None), "BNL", dtypes=checks.FLOAT_DTYPES
    )
    checks.check_tensor(
        "ref_log_pf",
        ref_log_pf,
        log_pf.shape,
        "BNL",
        dtypes=checks.FLOAT_DTYPES,
        device=log_pf.device,
        source="log_pf",
    )
    if mask is None:
        return full_mask(log_pf, None)
    return checks.check_mask(mask, log_pf.shape, log_pf.device, "log_pf", data)
