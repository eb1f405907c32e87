"""Softmax cross-entropy over the whole catalogue without holding the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Elements of one block of logits. A block that stays in the processor's cache makes the step
# about twice as fast as one large matrix; an accelerator wants larger ones.
_BLOCK_CPU = 1 << 20
_BLOCK_DEVICE = 1 << 26


class _CatalogueCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(hidden @ weight.T)[target]; gradients come with the value."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        needs_grad = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight) if needs_grad else None
        total = hidden.new_zeros(())
        block = _BLOCK_CPU if hidden.device.type == "cpu" else _BLOCK_DEVICE
        rows = max(16, block // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            part, wanted = hidden[start : start + rows], targets[start : start + rows, None]
            logits = part @ weight.t()
            chosen = logits.gather(1, wanted)
            highest = logits.amax(1, keepdim=True)
            probabilities = logits.sub_(highest).exp_()
            normaliser = probabilities.sum(1, keepdim=True)
            total += (normaliser.log() + highest - chosen).sum()
            if grad_hidden is not None and grad_weight is not None:
                probabilities.div_(normaliser)
                probabilities.scatter_add_(1, wanted, probabilities.new_full(wanted.shape, -1.0))
                torch.mm(probabilities, weight, out=grad_hidden[start : start + rows])
                grad_weight.addmm_(probabilities.t(), part)
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None


def catalogue_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Mean over rows of ``-log softmax(hidden @ weight.T)[target]``.

    Works block by block, so memory is O(T d + V d) and not O(T V); each block of logits is
    computed once, and the gradients are formed while it is at hand.

    Args:
        hidden: float32 [T, d].
        weight: float32 [V, d].
        targets: int64 [T], ids in 0..V-1.

    Returns:
        float32 scalar; 0 when T is 0.
    """
    if hidden.shape[0] == 0:
        return (hidden.sum() + weight.sum()) * 0.0
    total: torch.Tensor = _CatalogueCrossEntropy.apply(hidden, weight, targets)
    return total / hidden.shape[0]


def sampled_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, negatives: torch.Tensor
) -> torch.Tensor:
    """The same loss with the other items' share of the normaliser estimated from a uniform sample.

    The normaliser is ``exp(s_target) + (V - 1) / S * sum over S negatives of exp(s)``; negatives
    that equal the row's target are left out (S counts the remaining ones), so the sum of
    exponentials is unbiased.

    Args:
        hidden: float32 [T, d].
        weight: float32 [V, d].
        targets: int64 [T].
        negatives: int64 [S], drawn uniformly from the catalogue, shared by all rows.

    Returns:
        float32 scalar, the mean over rows; 0 when T is 0.
    """
    if hidden.shape[0] == 0:
        return (hidden.sum() + weight.sum()) * 0.0
    chosen = (hidden * weight[targets]).sum(1, keepdim=True)
    logits = hidden @ weight[negatives].t()
    hit = targets[:, None] == negatives[None, :]
    kept = (~hit).sum(1, keepdim=True).clamp_min(1)
    correction = ((weight.shape[0] - 1) / kept).log()
    others = logits.masked_fill(hit, float("-inf")) + correction
    return (torch.cat([chosen, others], 1).logsumexp(1, keepdim=True) - chosen).mean()
