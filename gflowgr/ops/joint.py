"""What the fused losses share: check everything, then log-probabilities, loss, supervised term."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from gflowgr.ops import checks, logprobs, losses
from gflowgr.ops.definitions import logprobs_definition

if TYPE_CHECKING:
    from gflowgr.tree import PrefixTree


class JointCall:
    """The checked arguments that all fused losses share, and what they do with them."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        log_reward: Tensor,
        *,
        bias: Tensor | None,
        tree: PrefixTree | None,
        mask: Tensor | None,
        temperature: float,
        normalize: str | None,
        beta: float,
        log_reward_floor: float | None,
        reduction: str,
        sft_weight: float,
    ) -> None:
        self.options = losses.check_options(beta, log_reward_floor, reduction)
        self.sft_weight = checks.check_number("sft_weight", sft_weight, least=0.0)
        self.tree = tree
        self.data = checks.DataChecks()
        self.inputs = logprobs.check_head_inputs(
            hidden, weight, tokens, bias, tree, mask, temperature, normalize, self.data
        )
        self.mask = self.inputs.full_mask
        self.log_reward = checks.check_log_reward(
            log_reward, self.mask, self.options.floor, "hidden", self.data
        )
        if self.inputs.bias is not None:
            self._check_allowed(self.inputs.bias, self.inputs.tokens)

    def _check_allowed(self, bias: Tensor, tokens: Tensor) -> None:
        self.data.add(
            lambda: self.mask & (bias[tokens.clamp(0, len(bias) - 1)] == -math.inf),
            lambda i: (
                f"{checks.at('tokens', i)} = {tokens[i].item()} is forbidden, "
                f"bias[{tokens[i].item()}] = -inf: its log-probability is -inf, no loss is finite"
            ),
        )

    def run(
        self,
        per_trajectory: Callable[[losses.Trajectories], Tensor],
        *targets: Tensor,
        return_log_pf: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss, given its definition per trajectory; `targets` are log_z or log_flow."""
        logprobs.run_data_checks(self.inputs, self.tree, self.data)
        log_pf = logprobs_definition(self.inputs)
        dtype = losses.compute_dtype(log_pf, self.log_reward, *targets)
        batch = losses.prepare(log_pf, self.log_reward, self.mask, self.options, dtype)
        reduction = self.options.reduction
        loss = losses.reduce_trajectories(per_trajectory(batch), batch.valid, reduction)
        if self.sft_weight > 0.0:
            loss = loss + self.sft_weight * positive_nll(batch, reduction)
        return (loss, log_pf.detach()) if return_log_pf else loss


def positive_nll(batch: losses.Trajectories, reduction: str) -> Tensor:
    """Token-summed NLL of trajectory 0, reduced over prompts; [B, N] for "none"."""
    nll = -batch.log_pf[:, :1].sum((-2, -1))
    if reduction == "none":
        return F.pad(nll[:, None], (0, batch.valid.shape[1] - 1))
    if reduction == "sum":
        return nll.sum()
    return nll.sum() / batch.valid.any(-1).sum().clamp(min=1)
