"""Plain PyTorch code that the peers are built from, and the float64 references.

Nothing here calls the package's ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness.inputs import Inputs

NLL_WEIGHT = 1.0

LogProbs = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden [T, d], weight [V, d], targets [T]) -> log-probabilities [T]."""

# Logits that a reference holds at once (float64: 512 MiB, and about three times that in all).
_REFERENCE_ELEMENTS = 2**26


def tb_nll_loss(log_pf: Tensor, log_reward: Tensor, log_z: Tensor) -> Tensor:
    """TB + NLL loss of log_pf [B, N, L], reduction "prompt"."""
    residual = log_z[:, None] + log_pf.sum(-1) - log_reward
    nll = -log_pf[:, 0].sum(-1)
    return (residual.square().sum(-1) + NLL_WEIGHT * nll).mean()


def token_logprobs(inputs: Inputs, logprobs: LogProbs) -> Tensor:
    """log_pf [B, N, L] by a function over rows."""
    tokens = inputs["tokens"]
    flat = logprobs(inputs["hidden"].flatten(0, -2), inputs["weight"], tokens.flatten())
    return flat.view(tokens.shape)


def log_softmax_gather(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The usual way: all logits, log-softmax in float32 at least, the target's entry."""
    return gather_log_softmax(hidden @ weight.T, targets)


def gather_log_softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [T] of targets [T] from logits [T, V], in float32 at least."""
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


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
        loss = tb_nll_loss(log_pf, wide["log_reward"][part], wide["log_z"][part])
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
