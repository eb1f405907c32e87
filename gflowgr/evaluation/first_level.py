"""The first level of the tree: a generator's policy there, beside the policy of the exact flows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FirstLevel", "first_level"]

_DIGITS = 5


@dataclass(frozen=True)
class FirstLevel:
    """P(first token | prompt) of a few users, over the tokens that any identifier begins with.

    Attributes:
        users: the users.
        tokens: the tokens, ascending.
        target: of the exact flows, by user and token: ``F(t) / Z``, the reward of the items whose
            identifier begins with t over that of all items.
        model: of the generator, likewise.
    """

    users: list[int]
    tokens: list[int]
    target: list[list[float]]
    model: list[list[float]]


def first_level(users: list[int], log_p: Tensor, log_r: Tensor, first: Tensor) -> FirstLevel:
    """Sum the probabilities and the rewards of items by the first token of their identifiers.

    Args:
        users: B users, for the record.
        log_p: log P of every item [B, items], an identifier's shared among its items.
        log_r: log R of every item [B, items], not all -inf.
        first: first token of each item's identifier [items], -1 for none.
    """
    tokens, place = first.unique(return_inverse=True)
    sums = torch.zeros(2, len(users), len(tokens), dtype=torch.float64)
    parts = torch.stack([log_p.double().exp(), log_r.double().softmax(dim=-1)])
    sums.index_add_(2, place.cpu(), parts.cpu())
    model, target = sums[..., tokens.cpu() >= 0].tolist()

    def rounded(rows: list[list[float]]) -> list[list[float]]:
        return [[round(value, _DIGITS) for value in row] for row in rows]

    return FirstLevel(users, tokens[tokens >= 0].tolist(), rounded(target), rounded(model))
