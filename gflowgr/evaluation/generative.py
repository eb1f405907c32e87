"""A trained generator as a recommender: histories in, items out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data import pad_histories
from ..decoding import BeamSearchOutput, GraphedSearch, constrained_beam_search
from ..models.backbone import evaluating
from ..models.gflow_model import GFlowModel
from ..models.prompts import prompt_tokens
from ..models.settings import Normalize
from ..tree import PrefixTree

__all__ = ["GenerativeRecommender"]


class GenerativeRecommender:
    """Recommends by beam search over the whole catalogue.

    Args:
        model: the trained model; evaluated in ``eval`` mode and left as it was.
        num_beams: beams per prompt.
        name: how tables call it.
        normalize: see :func:`constrained_beam_search`; by default the model's own setting.
        temperature: divides the logits.
        available: true for items that may be recommended [items]; by default all may.
        tree: the catalogue, where it is no longer that of the model (items added or removed since).
        item_tokens: identifiers [items, L] of all items that histories may hold, also of those that
            are no longer in ``tree``; by default the model's.
        graphs: search by a :class:`~gflowgr.decoding.GraphedSearch`, which is for many batches of
            few shapes on a GPU; the model's parameters must stay where they are.
    """

    def __init__(
        self,
        model: GFlowModel,
        *,
        num_beams: int = 20,
        name: str = "generator",
        normalize: Normalize | None = None,
        temperature: float = 1.0,
        available: Tensor | None = None,
        tree: PrefixTree | None = None,
        item_tokens: Tensor | None = None,
        graphs: bool = False,
    ) -> None:
        self.model = model
        self.num_beams = num_beams
        self.name = name
        self.normalize: Normalize = model.settings.normalize if normalize is None else normalize
        self.temperature, self.available = temperature, available
        self._item_tokens = model.item_tokens() if item_tokens is None else item_tokens
        self._tree = tree
        self._searches: dict[int, GraphedSearch] | None = {} if graphs else None  # by k

    def recommend(
        self,
        histories: Sequence[npt.NDArray[np.integer]],
        k: int,
        exclude: Sequence[npt.NDArray[np.integer]] | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The ``k`` best items of each history.

        Args:
            histories: items, oldest first; only the last ``max_history`` are read.
            k: items to return.
            exclude: items that each user may not get.

        Returns:
            items [B, k] (-1 where there are fewer) and log-probabilities [B, k].
        """
        model = self.model
        padded = pad_histories(histories, max_length=model.settings.max_history).to(model.device)
        input_ids, attention_mask = prompt_tokens(padded, self._item_tokens, model.prompt)
        barred = None
        if exclude is not None:
            barred = pad_histories(exclude).to(model.device)
        with evaluating(model):
            output = self._search(k)(input_ids, attention_mask, exclude=barred)
        return output.items.cpu().numpy(), output.scores.float().cpu().numpy()

    def _search(self, k: int) -> Callable[..., BeamSearchOutput]:
        options: dict[str, Any] = {
            "tree": self.model.tree if self._tree is None else self._tree,
            "num_beams": max(self.num_beams, k),
            "num_return": k,
            "normalize": self.normalize,
            "temperature": self.temperature,
            "available": self.available,
        }
        if self._searches is None:
            return partial(constrained_beam_search, self.model.backbone, **options)
        if k not in self._searches:
            self._searches[k] = GraphedSearch(self.model.backbone, **options)
        return self._searches[k]

    def leaf_of(self) -> npt.NDArray[np.int64]:
        """Identifier (leaf) of each item [items], for the ``string`` collision rule."""
        tree = self.model.tree if self._tree is None else self._tree
        return tree.leaf_of(torch.arange(tree.num_items, device=tree.device)).cpu().numpy()
