"""What is logged of a flow beside its loss: the first token's entropy, prefixes, residuals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops import fused_flow_kl
from ..ops.flow_loss.reference import Trajectories, db_residual, tb_residual, vargrad_residual

if TYPE_CHECKING:
    from ..tree import ItemFlows, PrefixTree
    from .objective import Head

__all__ = [
    "distinct_prefixes",
    "entropy_first_token",
    "kl_positive",
    "measurements",
    "residual_logs",
]


def measurements(
    tree: PrefixTree,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    tokens: Tensor,
    mask: Tensor,
) -> dict[str, Tensor]:
    """``entropy_first_token``; ``distinct_prefixes`` where a prompt has several trajectories."""
    logs = {"entropy_first_token": entropy_first_token(hidden, mask, weight, bias, tree)}
    if tokens.shape[1] > 1:
        logs["distinct_prefixes"] = distinct_prefixes(tree, tokens, mask)
    return logs


@torch.no_grad()
def entropy_first_token(
    hidden: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, tree: PrefixTree
) -> Tensor:
    """Mean over prompts of the entropy of P_F at the empty prefix, over the root's children, nats.

    It falls to 0 where the model recommends one corner of the tree to a user.

    Args:
        hidden: states [B, N, L, d] that predict the tokens; those of trajectory 0 are read.
        mask: true for real tokens [B, N, L]; prompts without trajectory 0 are left out.
        weight: [V, d] output head.
        bias: [V].
        tree: on their device.
    """
    begin = tree.layout.node_begin
    nodes = torch.arange(begin[1], begin[2], device=weight.device)
    tokens = tree.node_tokens(nodes, level=0)
    logits = hidden[:, 0, 0].float() @ weight[tokens].float().T
    if bias is not None:
        logits = logits + bias[tokens].float()
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    present = mask[:, 0, 0]
    return torch.where(present, entropy, 0.0).sum() / present.sum().clamp(min=1)


@torch.no_grad()
def distinct_prefixes(tree: PrefixTree, tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean over prompts of the number of different prefixes, at least a token long, among the
    trajectories [B, N, L]: N L where they part at once, L where they are one."""
    nodes = tree.walk(tokens, mask=mask).flatten(1).sort(-1).values
    first = torch.ones_like(nodes, dtype=torch.bool)
    first[:, 1:] = nodes[:, 1:] != nodes[:, :-1]
    return (first & (nodes >= 0)).sum(-1).double().mean().float()


@torch.no_grad()
def kl_positive(
    hidden: Tensor, tokens: Tensor, mask: Tensor, flows: ItemFlows, head: Head
) -> Tensor:
    """Mean over prompts of the sum over the positive's prefixes of KL(P*_F || P_F), nats.

    What ``"flow_kl"`` minimises, whatever the objective; hidden [B, N, L, d], tokens and mask
    [B, N, L].
    """
    _, kl, _ = fused_flow_kl(
        hidden[:, :1].detach(),
        tokens=tokens[:, :1],
        flows=flows,
        mask=mask[:, :1],
        reduction="none",
        **head | {"tree": flows.tree},
    )
    return kl.sum() / mask[:, 0, 0].sum().clamp(min=1)


def residual_logs(batch: Trajectories, target: Tensor | None) -> dict[str, Tensor]:
    """Mean and root mean square of the residuals, nats: of trajectories for TB and VarGrad, of
    single tokens where the target is a flow of states (DB and SubTB).

    Args:
        batch: trajectories with their shaped log-reward.
        target: log Z [B], log F [B, N, L], or None for VarGrad.
    """
    counted = batch.valid
    if target is None:
        residual = vargrad_residual(batch)
    elif target.dim() == 1:
        residual = tb_residual(batch, target)
    else:
        residual, counted = db_residual(batch, target), batch.mask
    count = counted.sum().clamp(min=1)
    residual = residual.masked_fill(~counted, 0.0)
    return {
        "residual_mean": residual.sum() / count,
        "residual_rms": (residual.square().sum() / count).sqrt(),
    }
