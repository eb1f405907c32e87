"""Token log-probabilities where the rows of the output head are spread over processes.

Each process holds a shard of the vocabulary. It computes, with the kernels of the dense head, the
log-sum-exp of its own logits and its own target logits; two all-reduces make them those of the
whole vocabulary. The logits never exist on any process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gflowgr.ops import checks, transforms

_MASKED = -1
_NO_TOKEN = -2


def partial_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    first_token: int,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and target logit of one shard of the vocabulary, without gradients.

    Args:
        hidden: [T, d] states.
        weight: [V_shard, d] the rows of the head for tokens first_token .. first_token + V_shard.
        targets: [T] int64 token ids of the whole vocabulary; -1 = masked row.
        first_token: the token of the first row.
        bias: [V_shard].
        temperature: divides the logits, bias included; > 0.

    Returns:
        (lse [T], target_logit [T]) in nats: the log-sum-exp of the shard's logits, and the target's
        logit, 0 where the target is in another shard. Both 0 at masked rows.

    Over the shards, ``target_logit.sum() - lse.logsumexp()`` is the log-probability.
    """
    log_pf, lse, _ = torch.ops.gflowgr.dense_logprobs(
        hidden.detach(),
        weight.detach(),
        None if bias is None else bias.detach(),
        _local_targets(targets, first_token, weight.shape[0]),
        temperature,
        False,
    )
    forbidden = log_pf == -torch.inf
    return lse, torch.where(forbidden, log_pf, log_pf + lse)


def _local_targets(targets: Tensor, first_token: int, size: int) -> Tensor:
    """Targets counted from the shard's first row; `size` where they are in another shard."""
    local = targets - first_token
    elsewhere = (local < 0) | (local >= size)
    return local.masked_fill(elsewhere, size).masked_fill(targets == _MASKED, -1)


class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        first_token: int,
        temperature: float,
        group: Any,
    ) -> Tensor:
        lse, target_logit = partial_logprobs(
            hidden, weight, targets, first_token=first_token, bias=bias, temperature=temperature
        )
        top = lse.clone()
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
        finite = torch.where(top == -torch.inf, 0.0, top)
        local = _local_targets(targets, first_token, weight.shape[0])
        held = ((local >= 0) & (local < weight.shape[0])).to(lse.dtype)
        sums = torch.stack([torch.exp(lse - finite), target_logit, held])
        dist.all_reduce(sums, group=group)
        total = finite + sums[0].log()
        masked = targets == _MASKED
        total = total.masked_fill(masked, 0.0)
        # Where all logits are -inf the difference would be NaN; the probability is zero.
        log_pf = torch.where(sums[1] == -torch.inf, -torch.inf, sums[1] - total)
        log_pf = log_pf.masked_fill(masked, 0.0).clamp(max=0.0)
        nowhere = (sums[2] != 1) & ~masked
        log_pf = log_pf.masked_fill(nowhere, torch.nan)
        local = local.masked_fill(nowhere, weight.shape[0] + 1)
        ctx.save_for_backward(hidden, weight, bias, local, log_pf, total)
        ctx.temperature, ctx.group = temperature, group
        return log_pf

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, targets, log_pf, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        d_hidden, d_weight, d_bias = torch.ops.gflowgr.dense_backward(
            grad, hidden, weight, bias, targets, log_pf, lse, ctx.temperature, *needs
        )
        if needs[0]:
            # Every shard adds its part; summed in float32 whatever the states are.
            wide = d_hidden.to(lse.dtype)
            dist.all_reduce(wide, group=ctx.group)
            d_hidden = wide.to(hidden.dtype)
        found = (g if n else None for g, n in zip((d_hidden, d_weight, d_bias), needs, strict=True))
        return (*found, None, None, None, None)


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    first_token: int,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """:func:`gflowgr.ops.trajectory_logprobs` with the head sharded over a process group.

    Args:
        hidden: [B, N, L, d], the same on every process.
        weight: [V_shard, d], this process's rows of the head, those of tokens `first_token` and on.
            The shards together must cover the vocabulary once.
        tokens: [B, N, L] integer token ids of the whole vocabulary, the same on every process.
        first_token: the token of the first row of `weight`.
        bias: [V_shard].
        mask: [B, N, L] bool, a prefix of each row; None = all true.
        temperature: divides the logits, bias included; > 0.
        group: the processes that share the vocabulary; None = all.

    Returns:
        log_pf [B, N, L] in nats, the same on every process; 0 under a false mask. Gradients of
        `hidden` are those of the whole (summed over the shards), those of `weight` and `bias` of
        this shard. Use it with :func:`gflowgr.tb_loss` and the like; two all-reduces of 2 T numbers
        forward, one of the states' gradient backward.

    Errors: TypeError and ValueError as in trajectory_logprobs, except that a token which no
    shard or several shards hold is not detected: its log-probability is NaN. RuntimeError for
    forward-mode derivatives and under the transforms of torch.func.
    """
    data = checks.DataChecks()
    floating = checks.FLOAT_DTYPES
    checks.check_tensor("hidden", hidden, (None,) * 4, "BNLd", dtypes=floating)
    *batch, width = hidden.shape
    device = hidden.device
    checks.check_tensor(
        "weight", weight, (None, width), "Vd", dtypes=floating, device=device, source="hidden"
    )
    checks.check_tensor(
        "tokens",
        tokens,
        batch,
        "BNL",
        dtypes=checks.INTEGER_DTYPES,
        device=device,
        source="hidden",
    )
    if bias is not None:
        checks.check_tensor(
            "bias", bias, weight.shape[:1], "V", dtypes=floating, device=device, source="weight"
        )
    temperature = checks.check_number("temperature", temperature, above=0.0)
    full_mask = checks.check_mask(mask, batch, device, "hidden", data)
    data.run()
    transforms.refuse("vocab_parallel_logprobs", hidden, weight, bias, tokens, mask)
    # Only the shards together know how many tokens there are.
    none = tokens < 0
    if not data.enabled:
        none = none | checks.mask_rises(full_mask)
    targets = tokens.long().masked_fill(none, _NO_TOKEN).masked_fill(~full_mask, _MASKED).flatten()
    log_pf: Tensor = _VocabParallel.apply(
        hidden.flatten(0, 2), weight, bias, targets, first_token, temperature, group
    )
    return log_pf.view(tokens.shape)
