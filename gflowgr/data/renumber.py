"""A dataset with the item numbers of an earlier one, so that what was made for those still fits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gflowgr.data.dataset import Dataset
from gflowgr.data.ragged import Ragged
from gflowgr.errors import DataError
from gflowgr.item_ids import ItemIds

__all__ = ["with_items_of"]


def with_items_of(dataset: Dataset, earlier: Dataset) -> Dataset:
    """``dataset`` with every item of ``earlier`` under its number there, and new items after them.

    Models, identifiers and vectors that were made for ``earlier`` then name the same items. Items
    that ``dataset`` does not have stay without events, with the texts of ``earlier``.

    Args:
        dataset: later events, with ids of items.
        earlier: whose numbers are kept, with ids of items.

    Returns:
        A new dataset, without identifiers and true utilities, which are by number.

    Raises:
        DataError: one of the two has no ids of items.
    """
    for each in (dataset, earlier):
        if each.item_ids is None:
            raise DataError(f"{each.name}: item_ids must be there to keep numbers; got none")
    assert dataset.item_ids is not None
    assert earlier.item_ids is not None
    known = earlier.item_ids
    new = [name for name in dataset.item_ids if known.item(name) is None]
    ids = ItemIds([*known, *new], f"{dataset.name}: item_ids")
    number = np.array([ids.item(name) for name in dataset.item_ids], dtype=np.int32)
    texts = None
    if dataset.texts is not None:
        old = earlier.texts if earlier.texts is not None else [{}] * len(known)
        texts = [*old, *({} for _ in new)]
        for item, fields in zip(number.tolist(), dataset.texts, strict=True):
            texts[item] = fields
    return replace(
        dataset,
        path=None,
        num_items=len(ids),
        sequences=Ragged(dataset.sequences.offsets, number[dataset.sequences.values]),
        side={
            name: Ragged(rows.offsets, number[rows.values]) for name, rows in dataset.side.items()
        },
        texts=texts,
        item_ids=ids,
        indexes={},
        truth=None,
    )
