"""Preference losses straight from the hidden states and heads of policy and reference.

Each is its loss on :func:`gflowgr.ops.trajectory_logprobs` of the policy and, without gradient, of
the reference, in one call, with the supervised term on request. All inputs are checked before
anything is computed. The reference may have another width than the policy; tokens, mask, tree,
temperature and normalisation are the same for both.

``sft_weight`` adds the token-summed negative log-likelihood NLL_b of each prompt's trajectory 0,
the observed positive: for reduction "prompt" and "mean" its mean over prompts with a valid
trajectory, for "sum" its sum, for "none" NLL_b at element [b]. A prompt whose trajectory 0 is
padding adds nothing.

Cost: :func:`gflowgr.ops.trajectory_logprobs` and its backward pass for the policy (four matrix
products with the head), and its forward pass for the reference (one). No logits are held.

Errors: those of :func:`gflowgr.ops.trajectory_logprobs` and of the loss; besides, ValueError for a
valid token that either bias forbids (-inf).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from gflowgr.ops import checks
from gflowgr.ops.flow_loss.joint import check_allowed
from gflowgr.ops.logprobs import trajectory as logprobs
from gflowgr.ops.preference.losses import (
    check_rejected,
    check_reward,
    grpo_definition,
    reduce_prompts,
    sdpo_definition,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from gflowgr.tree import PrefixTree

__all__ = ["fused_dpo_loss", "fused_grpo_loss"]

Logged = tuple[Tensor, Tensor, Tensor]


class _Options(TypedDict, total=False):
    """Keyword arguments of the fused losses, for the overloads on `return_log_pf`."""

    bias: Tensor | None
    ref_bias: Tensor | None
    tree: PrefixTree | None
    mask: Tensor | None
    temperature: float
    normalize: str | None
    beta: float
    reduction: str
    sft_weight: float
    sparse_grad: bool


@overload
def fused_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    return_log_pf: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def fused_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    *,
    return_log_pf: Literal[True],
    **options: Unpack[_Options],
) -> Logged: ...


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
    sft_weight: float = 0.0,
    sparse_grad: bool = False,
    return_log_pf: bool = False,
) -> Tensor | Logged:
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
        sft_weight: weight >= 0 of the supervised term; see the module's docstring.
        return_log_pf: return ``(loss, log_pf, ref_log_pf)``, both [B, N, L] detached, for logs.

    Returns:
        A scalar, or [B] for reduction "none"; float32, or float64 if any floating input is.

    Source: Rafailov et al. 2023 (arXiv 2305.18290); Chen et al. 2024 (arXiv 2406.09215).
    """
    beta = checks.check_number("beta", beta, above=0.0)
    call = _Call(
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
        reduction=reduction,
        sft_weight=sft_weight,
        sparse_grad=sparse_grad,
    )
    check_rejected(hidden, "hidden")
    return call.run(lambda p, r: sdpo_definition(p, r, call.mask, beta), return_log_pf)


@overload
def fused_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    reward: Tensor,
    *,
    return_log_pf: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...


@overload
def fused_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    reward: Tensor,
    *,
    return_log_pf: Literal[True],
    **options: Unpack[_Options],
) -> Logged: ...


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
    sft_weight: float = 0.0,
    sparse_grad: bool = False,
    return_log_pf: bool = False,
) -> Tensor | Logged:
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
        sft_weight: weight >= 0 of the supervised term; see the module's docstring.
        return_log_pf: return ``(loss, log_pf, ref_log_pf)``, both [B, N, L] detached, for logs.

    Returns:
        A scalar, or [B] for reduction "none"; float32, or float64 if any floating input is.

    Source: Shao et al. 2024 (arXiv 2402.03300).
    """
    beta = checks.check_number("beta", beta, least=0.0)
    call = _Call(
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
        reduction=reduction,
        sft_weight=sft_weight,
        sparse_grad=sparse_grad,
    )
    checked = check_reward(reward, call.mask, "hidden", call.data)
    return call.run(lambda p, r: grpo_definition(p, r, checked, call.mask, beta), return_log_pf)


class _Call:
    """The checked arguments that the fused losses share, and what they do with them."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        *,
        bias: Tensor | None,
        ref_bias: Tensor | None,
        tree: PrefixTree | None,
        mask: Tensor | None,
        temperature: float,
        normalize: str | None,
        reduction: str,
        sft_weight: float,
        sparse_grad: bool,
    ) -> None:
        self.reduction = checks.check_choice("reduction", reduction, checks.REDUCTIONS)
        self.sft_weight = checks.check_number("sft_weight", sft_weight, least=0.0)
        self.tree = tree
        self.data = checks.DataChecks()
        self.policy = logprobs.check_head_inputs(
            hidden, weight, tokens, bias, tree, mask, temperature, normalize, sparse_grad, self.data
        )
        self.mask = self.policy.full_mask
        _check_reference(ref_hidden, ref_weight, ref_bias, hidden, weight)
        self._none = checks.DataChecks(enabled=False)  # the values were looked at above
        self.reference = logprobs.check_head_inputs(
            ref_hidden.detach(),
            ref_weight.detach(),
            tokens,
            None if ref_bias is None else ref_bias.detach(),
            tree,
            mask,
            temperature,
            normalize,
            False,
            self._none,
        )
        self.reference = replace(self.reference, looked_at=self.policy.looked_at)
        for name, inputs in (("bias", self.policy), ("ref_bias", self.reference)):
            if inputs.bias is not None:
                check_allowed(name, inputs.bias, inputs.tokens, self.mask, self.data)

    def run(
        self, definition: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], return_log_pf: bool
    ) -> Tensor | Logged:
        """The reduced loss of what ``definition`` makes of both log-probabilities."""
        log_pf = logprobs.checked_logprobs(self.policy, self.tree, self.data)
        with torch.no_grad():
            # Without `tree`, in which the trajectories were found already.
            ref_log_pf = logprobs.checked_logprobs(self.reference, None, self._none)
        losses, counted = definition(log_pf, ref_log_pf)
        loss = reduce_prompts(losses, counted, self.reduction)
        if self.sft_weight > 0.0:
            nll = -log_pf[:, :1].sum((1, 2)).to(losses.dtype)
            present = self.mask.any(-1).any(-1)
            loss = loss + self.sft_weight * reduce_prompts(nll, present, self.reduction)
        return (loss, log_pf.detach(), ref_log_pf) if return_log_pf else loss


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
