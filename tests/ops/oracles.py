"""The losses and log-probabilities as plain float64 Python loops that follow the method's text.

Nothing here shares code with the package: scalars, lists and `math` only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Identifiers = Sequence[Sequence[int]]


def length(mask: Tensor, b: int, n: int) -> int:
    """Real tokens of trajectory n of prompt b."""
    return sum(bool(x) for x in mask[b, n])


def shaped(log_reward: float, beta: float, floor: float | None) -> float:
    """beta * log R, then at least the floor; no reward (-inf) or no number (NaN) is the floor."""
    if floor is None:
        return beta * log_reward
    if math.isnan(log_reward) or log_reward == -math.inf:
        return floor
    return max(beta * log_reward, floor)


def huber(residual: float, clip: float | None) -> float:
    """The square up to the clip; beyond, the line that goes on from there with its slope."""
    if clip is None or -clip <= residual <= clip:
        return residual**2
    return clip**2 + 2 * clip * (abs(residual) - clip)


def tb(pf: list[float], reward: float, log_z: float, clip: float | None) -> float:
    return huber(log_z + sum(pf) - reward, clip)


def db(pf: list[float], reward: float, flow: list[float], clip: float | None) -> float:
    flows = [*flow, reward]
    return sum(huber(flows[i] + pf[i] - flows[i + 1], clip) for i in range(len(pf)))


def subtb(pf: list[float], reward: float, flow: list[float], lam: float) -> float:
    flows = [*flow, reward]
    total = weights = 0.0
    for i in range(len(pf)):
        for j in range(i + 1, len(pf) + 1):
            residual = flows[i] + sum(pf[i:j]) - flows[j]
            total += lam ** (j - i) * residual**2
            weights += lam ** (j - i)
    return total / weights


def losses(
    kind: str,
    log_pf: Tensor,
    log_reward: Tensor,
    target: Tensor | None,
    mask: Tensor,
    *,
    lam: float = 0.9,
    beta: float = 1.0,
    floor: float | None = None,
    clip: float | None = None,
) -> list[list[float | None]]:
    """Loss of every trajectory; None where it is padding. `target` is log_z or log_flow."""
    prompts, branches, _ = log_pf.shape
    result: list[list[float | None]] = []
    for b in range(prompts):
        rows: dict[int, tuple[list[float], float]] = {}
        for n in range(branches):
            steps = length(mask, b, n)
            if steps:
                pf = [log_pf[b, n, i].double().item() for i in range(steps)]
                rows[n] = pf, shaped(log_reward[b, n].double().item(), beta, floor)
        estimates = [reward - sum(pf) for pf, reward in rows.values()]
        row: list[float | None] = []
        for n in range(branches):
            if n not in rows:
                row.append(None)
                continue
            pf, reward = rows[n]
            if kind == "vargrad":
                row.append(tb(pf, reward, sum(estimates) / len(estimates), clip))
                continue
            assert target is not None
            if kind == "tb":
                row.append(tb(pf, reward, target[b].double().item(), clip))
                continue
            flow = [target[b, n, i].double().item() for i in range(len(pf))]
            db_loss = kind == "db"
            row.append(db(pf, reward, flow, clip) if db_loss else subtb(pf, reward, flow, lam))
        result.append(row)
    return result


def reduce(rows: list[list[float | None]], reduction: str) -> Tensor:
    """The four reductions of a table of per-trajectory losses."""
    if reduction == "none":
        table = [[x or 0.0 for x in row] for row in rows]
        return torch.tensor(table, dtype=torch.float64)
    kept = [[x for x in row if x is not None] for row in rows]
    total = sum(sum(row) for row in kept)
    trajectories = sum(len(row) for row in kept)
    prompts = sum(1 for row in kept if row)
    count = {"sum": 1, "mean": trajectories, "prompt": prompts}[reduction]
    return torch.tensor(total / count if total else 0.0, dtype=torch.float64)


def children(identifiers: Identifiers, prefix: list[int]) -> list[int]:
    """Tokens that continue the prefix in the set of identifiers."""
    depth = len(prefix)
    return sorted({i[depth] for i in identifiers if len(i) > depth and list(i[:depth]) == prefix})


def logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None,
    identifiers: Identifiers,
    normalize: str,
    mask: Tensor,
    temperature: float,
) -> Tensor:
    """log P_F of every token over the vocabulary, its position's codebook or its prefix's children.

    A codebook goes from the smallest to the largest token that an identifier has at the position.
    """
    prompts, branches, steps, width = hidden.shape
    states, head = hidden.double().tolist(), weight.double().tolist()
    result = torch.zeros(prompts, branches, steps, dtype=torch.float64)
    for b in range(prompts):
        for n in range(branches):
            row = tokens[b, n].tolist()
            for i in range(length(mask, b, n)):
                candidates: Sequence[int] = range(len(head))
                if normalize == "children":
                    candidates = children(identifiers, row[:i])
                elif normalize == "level":
                    there = [x[i] for x in identifiers if len(x) > i]
                    candidates = range(min(there), max(there) + 1)
                logit = {}
                for v in candidates:
                    value = sum(states[b][n][i][k] * head[v][k] for k in range(width))
                    value += 0.0 if bias is None else bias[v].double().item()
                    logit[v] = value / temperature
                top = max(logit.values())
                log_sum = top + math.log(sum(math.exp(x - top) for x in logit.values()))
                result[b, n, i] = logit[row[i]] - log_sum
    return result
