"""The catalogue that a served model answers from: immutable, replaced as a whole by each change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from unicodedata import category

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data import Dataset
from ..errors import DataError, shown
from ..evaluation.generative import GenerativeRecommender
from ..item_ids import ItemIds
from ..models.gflow_model import GFlowModel
from ..tree import PrefixTree
from .requests import Add, Change, Remove, RequestError, SetAvailability, SwapModel

__all__ = ["Catalogue"]


@dataclass(frozen=True, eq=False)
class Catalogue:
    """A model, and the items that it may recommend.

    Item numbers are never used again: those of the dataset come first, then added ones in the order
    of their coming. A removed item keeps its number, so that histories with it stay readable.

    Attributes:
        model: the model.
        num_beams: beams of the search; at least as many as items are wanted are used.
        ids: the id of each number.
        numbers: the number of each id, as text.
        titles: the title of each number.
        identifiers: codes of the items that have others than in the model, by number.
        removed: numbers of the items that were taken out.
        unavailable: numbers of the items that are there, but not recommended for now.
        version: number of changes since the dataset.
    """

    model: GFlowModel
    num_beams: int
    ids: tuple[str | int, ...]
    numbers: Mapping[str, int]
    titles: tuple[str, ...]
    identifiers: Mapping[int, tuple[int, ...]]
    removed: frozenset[int] = frozenset()
    unavailable: frozenset[int] = frozenset()
    version: int = 0

    @classmethod
    def of(cls, model: GFlowModel, dataset: Dataset, num_beams: int) -> Catalogue:
        """The catalogue of a dataset before any change."""
        ids = tuple(dataset.item_id(item) for item in range(dataset.num_items))
        titles = tuple(dataset.title(item) for item in range(dataset.num_items))
        numbers = {str(each): number for number, each in enumerate(ids)}
        return cls(model, num_beams, ids, numbers, titles, {})

    # ---- what it holds ----

    @cached_property
    def tree(self) -> PrefixTree:
        """The identifiers of the items that are there.

        Raises:
            ValueError: none is left, or an identifier is not one of the model's.
        """
        tree = self.model.tree
        base = tree.num_items
        there = sorted(set(self.identifiers) - self.removed)
        if there:
            tokens = self.model.vocabulary.encode(self._rows(there))
            split = int(
                np.searchsorted(there, base)
            )  # those with a place in the model's tree first
            if split < len(there):
                tree = tree.with_items(tokens[split:], there[split:])
            if split:
                tree = tree.with_identifiers(tokens[:split], there[:split])
        gone = sorted(item for item in self.removed if item < base)
        return tree.without_items(gone) if gone else tree

    @cached_property
    def item_tokens(self) -> Tensor:
        """Identifiers of all numbers [items, L], also of removed ones, padded with -1."""
        base = self.model.item_tokens()
        length = self.model.vocabulary.length
        tokens = torch.full((len(self.ids), length), -1, dtype=base.dtype, device=base.device)
        tokens[: len(base), : base.shape[1]] = base
        changed = sorted(self.identifiers)
        if changed:
            rows = self.model.vocabulary.encode(self._rows(changed))
            tokens[changed] = torch.from_numpy(rows).to(tokens)
        return tokens

    def codes(self) -> npt.NDArray[np.int64]:
        """Codes of all numbers [items, levels], also of removed ones, padded with -1."""
        offsets = self.model.vocabulary.level_offsets
        codes = self.item_tokens.cpu().numpy()[:, : len(offsets)] - np.array(offsets)
        # Past an identifier's end stand -1 and, of several lengths, the end token: none is a code.
        sizes = np.array(self.model.vocabulary.codebook_sizes)
        return np.where((codes < 0) | (codes >= sizes), -1, codes)

    @cached_property
    def beginnings(self) -> PrefixTree:
        """The first two tokens of identifiers, each pair once, as the items of a tree."""
        identifiers = self.tree.identifiers(self.tree.item_ids)
        pairs = identifiers[:, :2].unique(dim=0).cpu()
        return PrefixTree.from_identifiers(pairs).to(self.model.device)

    @cached_property
    def available(self) -> npt.NDArray[np.bool_]:
        """Whether each item of the tree may be recommended [tree.num_items]."""
        mask = np.ones(self.tree.num_items, dtype=np.bool_)
        mask[[item for item in self.unavailable if item < len(mask)]] = False
        return mask

    def recommender(self, only: Sequence[int] | None = None) -> GenerativeRecommender:
        """What answers from this catalogue.

        Args:
            only: numbers of the items that may be recommended; None for all that are available.
        """
        mask = self.available
        if only is not None:
            chosen = np.zeros_like(mask)
            chosen[[item for item in only if item < len(mask)]] = True
            mask = mask & chosen
        return GenerativeRecommender(
            self.model,
            num_beams=self.num_beams,
            available=None if mask.all() else torch.from_numpy(mask),
            tree=self.tree,
            item_tokens=self.item_tokens,
        )

    def number(self, item: Any, field: str, *, there: bool = False) -> int:
        """The number of an item that a request names by its id.

        Args:
            item: the id; a whole number stands for its digits.
            field: the part of the request, for the error.
            there: whether a removed item is an error, too.

        Raises:
            RequestError: no item has this id.
        """
        named = isinstance(item, str | int) and not isinstance(item, bool)
        number = self.numbers.get(str(item).strip()) if named else None
        if number is None or (there and number in self.removed):
            raise RequestError(
                field,
                f"{field} must name items of the catalogue, such as {self.ids[0]!r}; got "
                f"{shown(item)}",
            )
        return number

    # ---- changes ----

    def after(self, change: Change, load: Callable[[str], GFlowModel]) -> Catalogue:
        """The catalogue after a change; this one stays as it is.

        Args:
            change: what is changed.
            load: reads the model of a folder.

        Raises:
            RequestError: it cannot be done; the field says why.
        """
        if isinstance(change, Add):
            changed = self._with(change)
        elif isinstance(change, Remove):
            number = self.number(change.id, "id", there=True)
            changed = replace(self, removed=self.removed | {number})
        elif isinstance(change, SetAvailability):
            number = self.number(change.id, "id", there=True)
            hidden = self.unavailable - {number}
            changed = replace(self, unavailable=hidden if change.available else hidden | {number})
        else:
            changed = self._of_model(change, load)
        changed = replace(changed, version=self.version + 1)
        try:
            # Made now: a change that cannot be carried out must change nothing.
            _ = changed.tree, changed.item_tokens
        except ValueError as error:
            field = {"add": "identifier", "remove": "id"}.get(change.kind, "model")
            raise RequestError(field, f"{field}: {error}") from None
        return changed

    def _with(self, change: Add) -> Catalogue:
        number = self.numbers.get(change.id)
        if number is not None and number not in self.removed:
            raise RequestError("id", f"id must be new; item {shown(change.id)} is there already")
        _check_id(change.id)
        codes, sizes = change.identifier, self.model.vocabulary.codebook_sizes
        fits = 1 <= len(codes) <= len(sizes) if self.model.vocabulary.ragged else False
        if not (fits or len(codes) == len(sizes)) or not all(
            0 <= code < size for code, size in zip(codes, sizes, strict=False)
        ):
            raise RequestError(
                "identifier",
                f"identifier must have {len(sizes)} codes, below {', '.join(map(str, sizes))}; "
                f"got {shown(codes)}",
            )
        tokens = self.model.vocabulary.encode(self._padded([codes]))
        leaf = int(self.tree.leaves(torch.from_numpy(tokens).to(self.tree.device))[0])
        if leaf >= 0 and not change.share:
            holder = self.ids[int(self.tree.items(leaf)[0])]
            raise RequestError(
                "identifier",
                f"identifier must be free, or share be true; item {shown(holder)} has "
                f"{shown(codes)}",
            )
        ids, titles, numbers = self.ids, self.titles, dict(self.numbers)
        if number is None:
            number = len(ids)
            ids, titles = (*ids, change.id), (*titles, change.title or change.id)
            numbers[change.id] = number
        elif change.title is not None:
            titles = (*titles[:number], change.title, *titles[number + 1 :])
        return replace(
            self,
            ids=ids,
            titles=titles,
            numbers=numbers,
            identifiers={**self.identifiers, number: codes},
            removed=self.removed - {number},
            unavailable=self.unavailable - {number},
        )

    def _of_model(self, change: SwapModel, load: Callable[[str], GFlowModel]) -> Catalogue:
        try:
            model = load(change.model)
        except (DataError, OSError) as error:
            raise RequestError("model", f"model: {error}") from None
        return self.with_model(model)

    def with_model(self, model: GFlowModel) -> Catalogue:
        """The same items and changes, answered for by another model.

        Raises:
            RequestError: items were added, and the model has other codebooks than they.
        """
        mine, its = self.model.vocabulary, model.vocabulary
        same = (mine.codebook_sizes, mine.ragged) == (its.codebook_sizes, its.ragged)
        if self.identifiers and not same:
            raise RequestError(
                "model",
                f"model must have the codebooks {mine.codebook_sizes}, which added items are in; "
                f"got {its.codebook_sizes}",
            )
        return replace(self, model=model)

    def _rows(self, items: Sequence[int]) -> npt.NDArray[np.int64]:
        return self._padded([self.identifiers[item] for item in items])

    def _padded(self, codes: Sequence[tuple[int, ...]]) -> npt.NDArray[np.int64]:
        """Codes [rows, levels], padded on the right with -1."""
        levels = len(self.model.vocabulary.codebook_sizes)
        return np.array([[*row, *[-1] * (levels - len(row))] for row in codes], dtype=np.int64)


def _check_id(id_: str) -> None:
    """Raise RequestError for an id that no item may have, or that an address cannot hold."""
    try:
        ItemIds([id_], "id")
    except DataError:
        fits = False
    else:
        # Clients shorten a path with such parts, and a router's pattern ends at a line's end.
        fits = not {".", ".."} & set(id_.split("/"))
        fits &= not any(category(character) == "Cc" for character in id_)
    if not fits:
        raise RequestError(
            "id",
            "id must be a text of 1 to 1,000 characters, without white space at its ends, control "
            f"characters, and parts between slashes that are . or ..; got {shown(id_)}",
        )
