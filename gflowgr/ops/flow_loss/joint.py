"""What the fused losses share: check everything, then log-probabilities, loss, supervised term."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from gflowgr.ops import checks, transforms
from gflowgr.ops.flow_loss import dense_op as head_loss
from gflowgr.ops.flow_loss import losses
from gflowgr.ops.flow_loss import op as flow
from gflowgr.ops.logprobs import dense as head
from gflowgr.ops.logprobs import trajectory as logprobs

if TYPE_CHECKING:
    from gflowgr.tree import PrefixTree


def check_allowed(
    name: str, bias: Tensor, tokens: Tensor, mask: Tensor, data: checks.DataChecks
) -> None:
    """Register the check that the bias `name` forbids no valid token."""
    data.add(
        lambda: mask & (bias[tokens.clamp(0, len(bias) - 1)] == -math.inf),
        lambda i: (
            f"{checks.at('tokens', i)} = {tokens[i].item()} is forbidden, "
            f"{name}[{tokens[i].item()}] = -inf: its log-probability is -inf, no loss is finite"
        ),
    )


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
        sparse_grad: bool,
    ) -> None:
        self.options = losses.check_options(beta, log_reward_floor, reduction)
        self.sft_weight = checks.check_number("sft_weight", sft_weight, least=0.0)
        self.tree = tree
        self.data = checks.DataChecks()
        self.inputs = logprobs.check_head_inputs(
            hidden, weight, tokens, bias, tree, mask, temperature, normalize, sparse_grad, self.data
        )
        self.mask = self.inputs.full_mask
        self.log_reward = checks.check_log_reward(
            log_reward, self.mask, self.options.floor, "hidden", self.data
        )
        if self.inputs.bias is not None:
            check_allowed("bias", self.inputs.bias, self.inputs.tokens, self.mask, self.data)

    def run(
        self, kind: str, target: Tensor | None, *, lam: float = 1.0, return_log_pf: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of a kind, balanced against `target` (log_z, log_flow or None)."""
        options = self.options
        in_one_op = self.inputs.normalize == "vocab" and options.reduction != "none"
        if in_one_op and not transforms.definition_only("head_flow_loss"):
            logprobs.run_data_checks(self.inputs, self.tree, self.data)
            loss, log_pf = self._in_three_products(kind, target, lam)
        else:
            log_pf = logprobs.checked_logprobs(self.inputs, self.tree, self.data)
            loss = flow.flow_loss(
                kind,
                log_pf,
                self.log_reward,
                target,
                self.mask,
                lam=lam,
                beta=options.beta,
                floor=options.floor,
                reduction=options.reduction,
                sft_weight=self.sft_weight,
            )
        return (loss, log_pf.detach()) if return_log_pf else loss

    def _in_three_products(
        self, kind: str, target: Tensor | None, lam: float
    ) -> tuple[Tensor, Tensor]:
        inputs, options = self.inputs, self.options
        tensors = [t for t in (self.log_reward, target) if t is not None]
        dtype = head.result_dtype(inputs.hidden, inputs.weight, inputs.bias, *tensors)
        return head_loss.head_flow_loss(
            inputs.hidden,
            inputs.weight,
            inputs.bias,
            inputs.targets,
            inputs.temperature,
            self.log_reward.to(dtype),
            None if target is None else target.to(dtype),
            kind,
            lam,
            options.beta,
            options.floor,
            options.reduction,
            self.sft_weight,
        )
