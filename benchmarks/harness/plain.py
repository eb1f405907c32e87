"""Plain PyTorch: what the peers are put together with, and the float64 they are judged by.

Nothing here calls the package's ops, except that the reductions' definitions are the package's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.inputs import Catalogue, Inputs
from benchmarks.harness.shapes import CODES, Shape
from gflowgr.ops.flow_loss import reference as flow_definitions

SFT_WEIGHT = 1.0
LAM = 0.9

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [T, d], weight [V, d], targets [T]) -> log-probabilities [T]."""

# Logits that a reference holds at once (float64: 512 MiB, and about three times that in all).
_REFERENCE_ELEMENTS = 2**26


def joint_loss(log_pf: Tensor, log_reward: Tensor, log_z: Tensor) -> Tensor:
    """Joint TB + SFT loss of log_pf [B, N, L], reduction "prompt"."""
    residual = log_z[:, None] + log_pf.sum(-1) - log_reward
    nll = -log_pf[:, 0].sum(-1)
    return (residual.square().sum(-1) + SFT_WEIGHT * nll).mean()


def token_logprobs(inputs: Inputs, logprobs: LogProbs) -> Tensor:
    """log_pf [B, N, L] by a function over rows."""
    tokens = inputs["tokens"]
    flat = logprobs(inputs["hidden"].flatten(0, -2), inputs["weight"], tokens.flatten())
    return flat.view(tokens.shape)


def log_softmax_gather(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What most code does: all logits, log-softmax in float32 at least, the target's entry."""
    logits = hidden @ weight.T
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


class PlainRestriction:
    """The tree restriction as careful plain PyTorch writes it.

    The tree is a table [nodes, 256] of child nodes, -1 = none, made once. Per level: one product of
    all rows with the codebook's slice of the head, the table's row as a mask, log-softmax. The
    codebooks are cut from the head once, so that the dense gradient is filled with zeros once.
    """

    def __init__(self, items: Catalogue, shape: Shape, device: torch.device) -> None:
        codes = items.tokens - shape.first_code - CODES * np.arange(shape.L)
        nodes = [np.zeros(len(codes), np.int64)]
        total = 1
        for level in range(shape.L):
            _, inverse = np.unique(codes[:, : level + 1], axis=0, return_inverse=True)
            nodes.append(total + inverse.reshape(-1))
            total += int(inverse.max()) + 1
        table = np.full((total, CODES), -1, np.int32)
        for level in range(shape.L):
            table[nodes[level], codes[:, level]] = nodes[level + 1]
        self.table = torch.from_numpy(table).to(device)
        self.counts = (table >= 0).sum(1)
        self.first = shape.first_code
        self.codebooks = torch.arange(shape.first_code, shape.V, device=device)

    def __call__(self, inputs: Inputs, *, sparse: bool = False) -> Tensor:
        """log_pf [B, N, L]; `sparse`: the gradient of the head is row-sparse."""
        hidden, weight, tokens = inputs["hidden"], inputs["weight"], inputs["tokens"]
        if sparse:
            head = F.embedding(self.codebooks, weight, sparse=True)
        else:
            head = weight[self.first :]
        node = torch.zeros(tokens.shape[:2], dtype=torch.int32, device=tokens.device).flatten()
        values = []
        for level, slice_ in enumerate(head.split(CODES)):
            code = tokens[..., level].flatten() - self.first - CODES * level
            children = self.table[node]
            logits = hidden[:, :, level].flatten(0, 1) @ slice_.T
            if logits.dtype != torch.float64:
                logits = logits.float()
            logits = logits.masked_fill(children < 0, -torch.inf)
            values.append(logits.log_softmax(-1).gather(1, code[:, None]))
            node = children.gather(1, code[:, None]).squeeze(1)
        return torch.cat(values, 1).view(tokens.shape)

    def children(self, tokens: Tensor) -> int:
        """Sum over all tokens of the children of their nodes, only children not counted."""
        codes = tokens.flatten(0, 1).cpu().numpy() - self.first
        node, total = np.zeros(len(codes), np.int64), 0
        table = self.table.cpu().numpy()
        for level in range(tokens.shape[-1]):
            count = self.counts[node]
            total += int(count[count > 1].sum())
            node = table[node, codes[:, level] - CODES * level]
        return total


def reduction_definition(inputs: Inputs, kind: str) -> Tensor:
    """A pure reduction by its definition in plain PyTorch, without checks; reduction "prompt"."""
    log_pf, log_reward = inputs["log_pf"], inputs["log_reward"]
    mask = torch.ones(log_pf.shape, dtype=torch.bool, device=log_pf.device)
    options = flow_definitions.RewardOptions(beta=1.0, floor=None, reduction="prompt")
    batch = flow_definitions.prepare(
        log_pf, log_reward, mask, options, flow_definitions.compute_dtype(log_pf, log_reward)
    )
    if kind == "tb":
        values = flow_definitions.tb_definition(batch, inputs["log_z"])
    elif kind == "db":
        values = flow_definitions.db_definition(batch, inputs["log_flow"])
    elif kind == "subtb":
        values = flow_definitions.subtb_definition(batch, inputs["log_flow"], LAM)
    else:
        values = flow_definitions.vargrad_definition(batch)
    return flow_definitions.reduce_trajectories(values, batch.valid, "prompt")


# ---- references ----

Reference = tuple[Tensor, dict[str, Tensor]]
"""Result and gradients by name, float64."""


def whole_reference(inputs: Inputs, forward: Callable[[Inputs], Tensor]) -> Reference:
    """Result and gradients of one float64 pass over everything."""
    wide = inputs.double()
    result = forward(wide)
    result.backward(wide.upstream)
    return result.detach(), _gradients(wide)


def vocabulary_reference(inputs: Inputs) -> Reference:
    """The full-vocabulary result in float64, a few whole prompts at a time."""
    wide = inputs.double()
    prompts = len(wide["tokens"])
    parts = []
    for part in _prompt_blocks(wide):
        block = Inputs({**wide.tensors, **{k: wide[k][part] for k in ("hidden", "tokens")}})
        log_pf = token_logprobs(block, log_softmax_gather)
        if wide.upstream is not None:
            log_pf.backward(wide.upstream[part])
            parts.append(log_pf.detach())
            continue
        loss = joint_loss(log_pf, wide["log_reward"][part], wide["log_z"][part])
        loss = loss * (len(log_pf) / prompts)
        loss.backward()
        parts.append(loss.detach())
    result = torch.stack(parts).sum() if wide.upstream is None else torch.cat(parts)
    return result, _gradients(wide)


def _prompt_blocks(inputs: Inputs) -> Iterator[slice]:
    prompts, branches, steps = inputs["tokens"].shape
    columns = len(inputs["weight"])
    step = max(1, _REFERENCE_ELEMENTS // (columns * branches * steps))
    for start in range(0, prompts, step):
        yield slice(start, start + step)


def _gradients(inputs: Inputs) -> dict[str, Tensor]:
    found = {name: leaf.grad for name, leaf in inputs.leaves.items()}
    return {name: grad for name, grad in found.items() if grad is not None}
