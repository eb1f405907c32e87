"""Item numbers that stay as they were in an earlier dataset."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gflowgr.data import Dataset, Ragged, with_items_of
from gflowgr.errors import DataError
from gflowgr.item_ids import ItemIds


def a_dataset(rows: list[list[str]], ids: list[str]) -> Dataset:
    return Dataset(
        name="tiny",
        user_ids=[f"u{row}" for row in range(len(rows))],
        sequences=Ragged.from_lists([[ids.index(item) for item in row] for row in rows]),
        num_items=len(ids),
        item_ids=ItemIds(ids),
        texts=[{"title": f"{item} of {len(rows)}"} for item in ids],
        side={"cart": Ragged.from_lists([[ids.index(rows[0][0])], *([] for _ in rows[1:])])},
    )


def named(dataset: Dataset, rows: Ragged) -> list[list[str | int]]:
    return [[dataset.item_id(item) for item in row] for row in rows]


def test_old_items_keep_their_numbers_and_new_ones_come_after_them() -> None:
    earlier = a_dataset([["a", "b", "c", "a"]], ["b", "a", "c"])
    rows = [["x", "c", "b", "x"], ["y", "b", "x", "y"]]
    later = a_dataset(rows, ["x", "y", "c", "b"])
    kept = with_items_of(later, earlier)
    assert kept.item_ids is not None
    assert list(kept.item_ids) == ["b", "a", "c", "x", "y"]
    assert named(kept, kept.sequences) == rows
    assert named(kept, kept.side["cart"]) == named(later, later.side["cart"])
    titles = ["b of 2", "a of 1", "c of 2", "x of 2", "y of 2"]  # item a is an earlier one's alone
    assert [kept.title(item) for item in range(5)] == titles
    assert (kept.user_ids, kept.num_interactions) == (later.user_ids, later.num_interactions)
    without = with_items_of(replace(later, texts=None), earlier)
    assert without.texts is None
    again = with_items_of(kept, earlier)
    np.testing.assert_array_equal(again.sequences.values, kept.sequences.values)


def test_numbers_are_kept_by_ids_alone() -> None:
    earlier = a_dataset([["a", "b", "c"]], ["b", "a", "c"])
    for later, first in ((earlier, replace(earlier, item_ids=None)), (earlier, earlier)):
        if first is earlier:
            later = replace(earlier, item_ids=None)
        with pytest.raises(DataError, match="item_ids must be there to keep numbers; got none"):
            with_items_of(later, first)
