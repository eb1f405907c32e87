"""Preference losses straight from the hidden states and heads of policy and reference.

Each is its loss on :func:`gflowgr.ops.trajectory_logprobs` of the policy and, without gradient, of
the reference, in one call, with the supervised term on request. All inputs are checked before
anything is computed. The reference may have another width than the policy; tokens, mask, tree,
temperature and normalisation are the same for both.

``nll_weight`` adds the token-summed negative log-likelihood NLL_b of each prompt's trajectory 0,
the observed positive: for reduction "prompt" and "mean" its mean over prompts with a valid
trajectory, for "sum" its sum, for "none" NLL_b at element [b]. A prompt whose trajectory 0 is
padding adds nothing.

Cost: :func:`gflowgr.ops.trajectory_logprobs` and its backward pass for the policy (four matrix
products with the head), and its forward pass for the reference (one). No logits are held.

Errors: those of :func:`gflowgr.ops.trajectory_logprobs` and of the loss; besides, ValueError for a
valid token that either bias forbids (-inf).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gflowgr.ops import checks
from gflowgr.ops.inputs import check_allowed, check_head_inputs
from gflowgr.ops.logprobs.trajectory import compute_logprobs
from gflowgr.ops.precision import as_autocast
from gflowgr.ops.preference.losses import check_rejected, check_reward
from gflowgr.ops.preference.reference import grpo_per_prompt, reduce_prompts, sdpo_per_prompt

if TYPE_CHECKING:
    from gflowgr.tree import PrefixTree

__all__ = ["FusedPreferenceLoss", "fused_dpo_loss", "fused_grpo_loss", "fused_preference_loss"]

KINDS = ("dpo", "grpo")


class FusedPreferenceLoss(NamedTuple):
    """A fused loss and the log-probabilities that it was made of.

    Attributes:
        loss: a scalar, or [B] for reduction "none".
        log_pf: [B, N, L] token log-probabilities of the policy, nats, detached.
        ref_log_pf: [B, N, L] the same of the reference.
    """

    loss: Tensor
    log_pf: Tensor
    ref_log_pf: Tensor


def fused_preference_loss(
    kind: str,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    reward: Tensor | None = None,
    *,
    beta: float,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    tree: PrefixTree | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    normalize: str | None = None,
    reduction: str = "prompt",
    nll_weight: float = 0.0,
    sparse_grad: bool = False,
) -> FusedPreferenceLoss:
    """Any of the fused losses, with the log-probabilities beside it: for trainers that log them.

    Args:
        kind: "dpo" (S-DPO where there are several rejected trajectories) or "grpo".
        reward: [B, N] of each trajectory for "grpo"; None for "dpo".

    The other arguments are those of :func:`fused_dpo_loss` and :func:`fused_grpo_loss`.

    Raises:
        ValueError: an unknown kind, or a reward for "dpo"; besides, what the losses raise.
    """
    kind = checks.check_choice("kind", kind, KINDS)
    if kind == "dpo":
        beta = checks.check_number("beta", beta, above=0.0)
    else:
        beta = checks.check_number("beta", beta, least=0.0)
    reduction = checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    nll_weight = checks.check_number("nll_weight", nll_weight, least=0.0)
    data = checks.DataChecks()
    policy = check_head_inputs(
        hidden,
        weight,
        tokens,
        bias=bias,
        tree=tree,
        mask=mask,
        temperature=temperature,
        normalize=normalize,
        sparse_grad=sparse_grad,
        data=data,
    )
    valid = policy.full_mask
    _check_reference(ref_hidden, ref_weight, ref_bias, hidden, weight)
    reference = replace(
        policy,
        hidden=as_autocast(ref_hidden.detach()),
        weight=as_autocast(ref_weight.detach()),
        bias=None if ref_bias is None else as_autocast(ref_bias.detach()),
        sparse_grad=False,
    )
    for name, forbids in (("bias", policy.bias), ("ref_bias", reference.bias)):
        check_allowed(name, forbids, policy.tokens, policy.mask, data)
    if kind == "dpo":
        check_rejected(hidden, "hidden")
        if reward is not None:
            raise ValueError(f'reward must be None for "dpo"; got {type(reward).__name__}')
    else:
        reward = check_reward(reward, valid, "hidden", data)
    data.run()
    log_pf = compute_logprobs(policy, look_up=data.enabled)
    with torch.no_grad():
        # The policy's walk has found the trajectories in the tree.
        ref_log_pf = compute_logprobs(reference, look_up=False)
    if reward is None:
        losses, counted = sdpo_per_prompt(log_pf, ref_log_pf, valid, beta)
    else:
        losses, counted = grpo_per_prompt(log_pf, ref_log_pf, reward, valid, beta)
    loss = reduce_prompts(losses, counted, reduction)
    if nll_weight > 0.0:
        nll = -log_pf[:, :1].sum((1, 2)).to(losses.dtype)
        present = valid.any(-1).any(-1)
        loss = loss + nll_weight * reduce_prompts(nll, present, reduction)
    return FusedPreferenceLoss(loss, log_pf.detach(), ref_log_pf)


def fused_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    tree: PrefixTree | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    normalize: str | None = None,
    beta: float = 0.1,
    reduction: str = "prompt",
    nll_weight: float = 0.0,
    sparse_grad: bool = False,
) -> Tensor:
    """DPO from hidden states, S-DPO where there are several rejected trajectories.

    :func:`gflowgr.ops.sdpo_loss` with log_pf and ref_log_pf computed here.

    Args:
        hidden: [B, N, L, d]; ``hidden[b, n, l]`` predicts ``tokens[b, n, l]``; N >= 2.
        weight: [V, d] output head.
        tokens: [B, N, L] integer token ids; trajectory 0 is chosen, the others are rejected.
        ref_hidden: [B, N, L, d'] states of the reference.
        ref_weight: [V, d'] head of the reference.
        bias, tree, mask, temperature, normalize, sparse_grad: as in
            :func:`gflowgr.ops.trajectory_logprobs`; ``ref_bias`` [V] is the reference's.
        beta: weight > 0 of the log-ratios.
        reduction: as in :func:`gflowgr.ops.sdpo_loss`.
        nll_weight: weight >= 0 of the supervised term; see the module's docstring.

    Returns:
        A scalar, or [B] for reduction "none"; float32, or float64 if any floating input is.
        For the log-probabilities beside the loss: :func:`fused_preference_loss`.

    Source: Rafailov et al. 2023 (arXiv 2305.18290); Chen et al. 2024 (arXiv 2406.09215).
    """
    return fused_preference_loss(
        "dpo",
        hidden,
        weight,
        tokens,
        ref_hidden,
        ref_weight,
        bias=bias,
        ref_bias=ref_bias,
        tree=tree,
        mask=mask,
        temperature=temperature,
        normalize=normalize,
        beta=beta,
        reduction=reduction,
        nll_weight=nll_weight,
        sparse_grad=sparse_grad,
    ).loss


def fused_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    reward: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    tree: PrefixTree | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    normalize: str | None = None,
    beta: float = 1e-3,
    reduction: str = "prompt",
    nll_weight: float = 0.0,
    sparse_grad: bool = False,
) -> Tensor:
    """GRPO from hidden states: :func:`gflowgr.ops.grpo_loss` with its log-probabilities made here.

    Args:
        hidden: [B, N, L, d]; ``hidden[b, n, l]`` predicts ``tokens[b, n, l]``.
        weight: [V, d] output head.
        tokens: [B, N, L] integer token ids, a prompt's group of N trajectories.
        ref_hidden: [B, N, L, d'] states of the reference.
        ref_weight: [V, d'] head of the reference.
        reward: [B, N] rewards of the trajectories, not their logs; finite where valid.
        bias, tree, mask, temperature, normalize, sparse_grad: as in
            :func:`gflowgr.ops.trajectory_logprobs`; ``ref_bias`` [V] is the reference's.
        beta: weight >= 0 of the divergence from the reference, in nats per token.
        reduction: as in :func:`gflowgr.ops.grpo_loss`.
        nll_weight: weight >= 0 of the supervised term; see the module's docstring.

    Returns:
        A scalar, or [B] for reduction "none"; float32, or float64 if any floating input is.

    Source: Shao et al. 2024 (arXiv 2402.03300).
    """
    return fused_preference_loss(
        "grpo",
        hidden,
        weight,
        tokens,
        ref_hidden,
        ref_weight,
        reward,
        bias=bias,
        ref_bias=ref_bias,
        tree=tree,
        mask=mask,
        temperature=temperature,
        normalize=normalize,
        beta=beta,
        reduction=reduction,
        nll_weight=nll_weight,
        sparse_grad=sparse_grad,
    ).loss


def _check_reference(
    ref_hidden: object, ref_weight: object, ref_bias: object, hidden: Tensor, weight: Tensor
) -> None:
    floating = checks.FLOAT_DTYPES
    states = checks.check_tensor(
        "ref_hidden",
        ref_hidden,
        (*hidden.shape[:3], None),
        "BNLd",
        dtypes=floating,
        device=hidden.device,
        source="hidden",
    )
    shape = (weight.shape[0], states.shape[-1])
    checks.check_tensor(
        "ref_weight",
        ref_weight,
        shape,
        "Vd",
        dtypes=floating,
        device=hidden.device,
        source="weight and ref_hidden",
    )
    if ref_bias is not None:
        checks.check_tensor(
            "ref_bias",
            ref_bias,
            shape[:1],
            "V",
            dtypes=floating,
            device=hidden.device,
            source="weight",
        )
