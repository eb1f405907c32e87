"""Where probability goes in the first two levels of the tree: the model's, and the reward's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..collaborative import CollaborativeModel
from ..data import Dataset, LeaveOneOut, pad_histories
from ..decoding import item_logprobs
from ..models.prompts import prompt_tokens
from ..models.settings import FlowSettings
from ..rewards import CatalogueReward
from ..tree import item_flows
from .catalogue import Catalogue

__all__ = ["TargetPolicy", "beginnings"]

_MOST = 256
"""Beginnings of identifiers in an answer."""


@dataclass(frozen=True)
class TargetPolicy:
    """The policy of the exact flows, whose reward is the collaborative model's softmax.

    Attributes:
        collaborative: scores items.
        reward: of every item, without an observed one.
    """

    collaborative: CollaborativeModel
    reward: CatalogueReward

    @classmethod
    def of(
        cls, collaborative: CollaborativeModel, dataset: Dataset, settings: FlowSettings
    ) -> TargetPolicy:
        """With the signals, temperature and seen items of a model's settings.

        Without a temperature there it is chosen as in training, by the likelihood of the dataset's
        validation items, each user's last but one.

        Raises:
            ValueError: it is to be chosen, and there is no user to do so.
        """
        temperature = settings.reward_temperature
        if temperature is None:
            from ..training import calibrate_temperature

            split = LeaveOneOut(dataset, max_history=settings.max_history)
            temperature = calibrate_temperature(
                collaborative, split, seen=settings.seen_items
            ).temperature
        reward = CatalogueReward(
            settings.catalogue_signals, temperature=temperature, seen=settings.seen_items
        )
        return cls(collaborative, reward)

    @torch.no_grad()
    def shares(
        self, catalogue: Catalogue, history: npt.NDArray[np.int64], tokens: Tensor
    ) -> list[float] | None:
        """F(beginning) / Z of each beginning [pairs, 2]; None where no item has any reward.

        Items that came later than the collaborative model have no score: they are left out of the
        history, and have no reward.
        """
        tree, known = catalogue.tree, self.collaborative.num_items
        read = history[-catalogue.model.settings.max_history :]
        past = read[read < known]
        if self.reward.seen == "zero" and len(np.unique(past)) == known:
            return None
        padded = pad_histories([past])
        scores = self.collaborative.score(padded)
        log_reward = torch.full((1, tree.num_items), -math.inf, device=tree.device)
        log_reward[:, :known] = self.reward(scores, padded.to(scores.device)).to(tree.device)
        flows = item_flows(tree, log_reward)
        if math.isinf(float(flows.log_z)):
            return None
        nodes = tree.walk(tokens, mask=tokens >= 0)
        last = (tokens >= 0).sum(1, keepdim=True) - 1
        log_flow = flows.node_log_flow(nodes.gather(1, last).reshape(1, -1))
        shares: list[float] = (log_flow - flows.log_z[:, None]).exp()[0].tolist()
        return shares


def beginnings(
    catalogue: Catalogue, history: npt.NDArray[np.int64], target: TargetPolicy | None
) -> list[dict[str, Any]]:
    """The first two codes of identifiers, the model's most probable first.

    Args:
        catalogue: the model and its items.
        history: numbers of items, oldest first.
        target: the policy to show beside the model's.

    Returns:
        At most 256 records, chosen by the larger of both: ``codes``, ``probability``, normalised
        over the children of each node, and ``target`` where there is one. Each sums to 1 over all
        beginnings that there are.
    """
    model, tree = catalogue.model, catalogue.beginnings
    tokens = tree.identifiers(tree.item_ids)
    padded = pad_histories([history], max_length=model.settings.max_history).to(model.device)
    log_p = item_logprobs(
        model.backbone,
        *prompt_tokens(padded, catalogue.item_tokens, model.prompt),
        tree,
        normalize="children",
    )
    probability: list[float] = log_p[0].exp().tolist()
    wanted = None if target is None else target.shares(catalogue, history, tokens)
    order = sorted(
        range(len(tokens)), key=lambda row: -max(probability[row], wanted[row] if wanted else 0.0)
    )
    offsets = model.vocabulary.level_offsets
    rows = tokens.tolist()
    records = []
    for row in sorted(order[:_MOST], key=lambda row: -probability[row]):
        # Past an identifier's end stand -1 and, of several lengths, the end token: none is a code.
        pairs = zip(rows[row], offsets, strict=False)
        record: dict[str, Any] = {
            "codes": [token - offset for token, offset in pairs if token >= offset],
            "probability": probability[row],
        }
        if wanted is not None:
            record["target"] = wanted[row]
        records.append(record)
    return records
