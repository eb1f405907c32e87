"""Reading and writing data set folders; every fault is named with file, user and value."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gflowgr.data.bundle as bundle_module
from gflowgr.data import Dataset, Ragged, load_dataset, pad_histories, save_dataset
from gflowgr.errors import DataError, OutputError
from gflowgr.identifiers import from_codes

WriteBundle = Callable[..., Path]
ITEMS = {str(i): {"title": f"Item {i}", "price": i} for i in range(6)}
INTER = {"0": [0, 1, 2, 3], "1": [4, 0], "7": [5, 4, 3]}


def test_a_whole_folder(write_bundle: WriteBundle) -> None:
    folder = write_bundle(
        inter=INTER,
        item=ITEMS,
        rating={"0": [5, 4, 3.5, 1], "1": [2, 2], "7": [1, 1, 1]},
        time={"0": [1, 2, 2, 3], "1": [9, 10], "7": [1, 2, 3]},
        behaviour={
            "0": ["view", "buy", "view", "view"],
            "1": ["buy", "buy"],
            "7": ["view", "view", "buy"],
        },
        cart={"7": [0, 1], "1": []},
        index_tiny={str(i): [f"<a_{i % 2}>", f"<b_{i}>"] for i in range(6)},
    )
    data = load_dataset(folder)
    assert (data.name, data.num_users, data.num_items) == ("shop", 3, 6)
    assert data.user_ids == ["0", "1", "7"]
    assert [row.tolist() for row in data.sequences] == list(INTER.values())
    assert data.sequences.values.dtype == np.int32
    assert data.behaviour_names == ("buy", "view")
    assert data.behaviours is not None
    assert data.behaviours.tolist() == [1, 0, 1, 1, 0, 0, 1, 1, 0]
    assert data.ratings is not None
    assert data.ratings[2] == 3.5
    assert data.times is not None
    assert data.times.tolist()[:4] == [1, 2, 2, 3]
    assert [row.tolist() for row in data.side["cart"]] == [[], [], [0, 1]]
    assert data.title(3) == "Item 3"
    assert data.texts is not None
    assert data.texts[3] == {"title": "Item 3", "price": "3"}
    assert data.index_names() == ["tiny"]
    assert data.identifiers("tiny").codes.tolist()[3] == [1, 3]
    assert data.summary()["interactions"] == 9


def test_without_items_or_index_the_largest_id_counts(write_bundle: WriteBundle) -> None:
    assert load_dataset(write_bundle(inter={"0": [1, 5]}, cart={"0": [8]})).num_items == 9


def test_without_items_the_index_counts(write_bundle: WriteBundle) -> None:
    index = {str(i): ["<a_1>"] for i in range(12)}
    assert load_dataset(write_bundle(inter={"0": [1, 5]}, index_x=index)).num_items == 12


def test_titles_without_texts(write_bundle: WriteBundle) -> None:
    assert load_dataset(write_bundle(inter={"0": [1, 5]})).title(5) == "item 5"
    folder = write_bundle(inter={"0": [0]}, item={"0": {"asin": "B00"}})
    assert load_dataset(folder).title(0) == "B00"


def test_side_pairs_that_give_the_answer_away_are_dropped(write_bundle: WriteBundle) -> None:
    # User "0" has valid 2 and test 3; user "1" has two events, so nothing of theirs is held out.
    folder = write_bundle(inter=INTER, item=ITEMS, cart={"0": [3, 5, 2, 1, 3], "1": [0]})
    data = load_dataset(folder)
    assert [row.tolist() for row in data.side["cart"]] == [[5, 1], [0], []]
    assert data.side_dropped == {"cart": 3}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"inter": {}}, "there are no users"),
        ({"inter": {"3": []}}, r"inter\.json\.gz: user '3' has no interactions"),
        ({"inter": {"3": 5}}, r"inter\.json\.gz: user '3' must have a list; got 5"),
        ({"inter": {"3": [1, "x"]}}, "user '3', position 1: 'x' .str. is not integer"),
        ({"inter": {"3": [1, 2.0]}}, "position 1: 2.0 .float. is not integer"),
        ({"inter": {"3": [True]}}, "position 0: True .bool. is not integer"),
        ({"inter": {"3": [0, 6]}}, "user '3', position 1: item 6 is unknown, items are 0 .. 5"),
        ({"inter": {"3": [-1]}}, "item -1 is unknown"),
        ({"inter": {"3": [10**30]}}, "does not fit 64 bits"),
        ({"inter": {"3": [0, 2**32]}}, "user '3', position 1: item 4294967296 is unknown"),
        ({"rating": {"0": [10**400, 1, 1, 1], "1": [1, 1], "7": [1] * 3}}, "of 1,329 bits"),
        ({"rating": {"0": [1e39, 1, 1, 1], "1": [1, 1], "7": [1] * 3}}, "has the value inf"),
        (
            {"behaviour": {"0": ["x" * 2000] * 4, "1": ["a", "a"], "7": ["a"] * 3}},
            r"behaviour\.json\.gz: a behaviour must have at most 1,000 characters; got 2,000",
        ),
        ({"item": '{"0": {"title": "\\ud800"}}'}, r"item\.json\.gz: .* got a lone surrogate"),
        ({"cart": {"0": [6]}}, r"cart\.json\.gz: user '0', position 0: item 6 is unknown"),
        ({"cart": {"5": [0]}}, r"cart\.json\.gz: user '5' is not in inter\.json\.gz"),
        ({"rating": {"0": [1] * 4, "7": [1] * 3}}, r"rating.*user '1' of inter.* is missing"),
        (
            {"rating": {"0": [1] * 4, "1": [1], "7": [1] * 3}},
            r"rating\.json\.gz: user '1' has 1 values, but 2 interactions",
        ),
        (
            {"rating": {"0": [1, 1, "5", 1], "1": [1, 1], "7": [1] * 3}},
            "rating.*user '0', position 2: '5' .str. is not integer or number",
        ),
        (
            {"rating": '{"0": [1,1,1,1], "1": [1, NaN], "7": [1,1,1]}'},
            r"rating\.json\.gz: user '1' has the value nan",
        ),
        (
            {"time": {"0": [1, 2, 3, 2], "1": [1, 1], "7": [1] * 3}},
            "user '0': time 2 follows 3; sequences must be oldest first",
        ),
        (
            {"behaviour": {"0": [1] * 4, "1": ["a", "a"], "7": ["a"] * 3}},
            "behaviour.*user '0', position 0: 1 .int. is not text",
        ),
        ({"item": {"0": {}, "2": {}}}, r"item\.json\.gz: item 1 is missing"),
        ({"item": {"0": "title"}}, r"item\.json\.gz: item 0 must have"),
        ({"item": {"0": {"title": ["a"]}}}, "item 0, field 'title': .* is not text"),
        ({"inter": "[1, 2]"}, r"inter\.json\.gz: the top level must be an object"),
        ({"inter": '{"0": [1, 2'}, r"inter\.json\.gz: not valid JSON, line 1 column 12"),
    ],
)
def test_bad_input_is_named(write_bundle: WriteBundle, files: dict[str, Any], message: str) -> None:
    good = {"inter": INTER, "item": ITEMS}
    assert load_dataset(write_bundle(**good)).num_users == 3
    with pytest.raises(DataError, match=message):
        load_dataset(write_bundle(**{**good, **files}))


def test_too_many_behaviours(write_bundle: WriteBundle) -> None:
    inter = {"0": [0] * 128}
    kinds = {"0": [f"b{i}" for i in range(128)]}
    with pytest.raises(DataError, match="128 different behaviours, at most 127"):
        load_dataset(write_bundle(inter=inter, behaviour=kinds))


def test_a_truncated_file(write_bundle: WriteBundle) -> None:
    folder = write_bundle(inter=INTER)
    file = folder / "inter.json.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"inter\.json\.gz: the gzip file is truncated"):
        load_dataset(folder)


def test_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no inter\.json\.gz"):
        load_dataset(tmp_path)


def test_a_missing_index_lists_those_there_are(write_bundle: WriteBundle) -> None:
    index = {str(i): ["<a_1>"] for i in range(6)}
    data = load_dataset(write_bundle(inter=INTER, item=ITEMS, index_x=index))
    with pytest.raises(DataError, match=r"no file index\.y\.json\.gz; identifiers at hand: x"):
        data.identifiers("y")


def test_an_index_of_other_items_is_refused(write_bundle: WriteBundle) -> None:
    index = {str(i): ["<a_1>"] for i in range(5)}
    data = load_dataset(write_bundle(inter=INTER, item=ITEMS, index_x=index))
    with pytest.raises(DataError, match="1 of 6 items have no identifier: 5"):
        data.identifiers("x")


# ---- writing ----


def example() -> Dataset:
    return Dataset(
        name="made",
        user_ids=["ann", "bob"],
        sequences=Ragged.from_lists([[0, 1, 2, 3], [2]]),
        num_items=5,
        behaviours=np.array([0, 1, 1, 0, 0], dtype=np.int8),
        behaviour_names=("buy", "view"),
        ratings=np.array([0.1, 4.5, 3, 2, 1], dtype=np.float32),
        times=np.array([10, 20, 20, 30, 5]),
        side={"cart": Ragged.from_lists([[4], [0, 1]])},
        texts=[{"title": f"Thing {i}"} for i in range(5)],
        indexes={"mem": from_codes(np.array([[0, 1], [0, 2], [5, 1], [5, 2], [5, 3]]))},
        truth=np.arange(10, dtype=np.float16).reshape(2, 5),
    )


def assert_same(one: Dataset, two: Dataset) -> None:
    assert one.user_ids == two.user_ids
    assert one.num_items == two.num_items
    np.testing.assert_array_equal(one.sequences.offsets, two.sequences.offsets)
    np.testing.assert_array_equal(one.sequences.values, two.sequences.values)
    for name in ("behaviours", "ratings", "times", "truth"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
    assert one.behaviour_names == two.behaviour_names
    assert one.texts == two.texts
    assert list(one.side) == list(two.side)
    for name, rows in one.side.items():
        assert [r.tolist() for r in rows] == [r.tolist() for r in two.side[name]]
    for name in one.index_names():
        np.testing.assert_array_equal(one.identifiers(name).codes, two.identifiers(name).codes)
        assert one.identifiers(name).level_tokens == two.identifiers(name).level_tokens


def test_round_trip(tmp_path: Path) -> None:
    saved = save_dataset(example(), tmp_path / "out")
    assert (saved.name, saved.path) == ("out", tmp_path / "out")
    again = load_dataset(tmp_path / "out")
    assert_same(example(), again)
    assert again.index_names() == ["mem"]


def test_an_existing_data_set_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    save_dataset(example(), tmp_path)
    with pytest.raises(FileExistsError, match=r"overwrite=True .--overwrite on the command line"):
        save_dataset(example(), tmp_path)


def test_overwriting_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    save_dataset(example(), tmp_path)
    smaller = replace(example(), side={}, truth=None, ratings=None)
    save_dataset(smaller, tmp_path, overwrite=True)
    assert_same(smaller, load_dataset(tmp_path))


def test_a_data_set_can_replace_itself(tmp_path: Path) -> None:
    save_dataset(example(), tmp_path)
    save_dataset(load_dataset(tmp_path), tmp_path, overwrite=True)
    assert_same(example(), load_dataset(tmp_path))


def test_a_save_that_fails_leaves_no_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OutputError(errno.ENOSPC, "cannot write: no space left on the device", "truth.npy")

    monkeypatch.setattr(bundle_module, "save_npy", full)
    with pytest.raises(OutputError, match="no space"):
        save_dataset(example(), tmp_path)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    with pytest.raises(FileNotFoundError, match="not a data set"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("name", ["inter", "rating", "index.x", "a/b"])
def test_reserved_names_of_side_behaviours(tmp_path: Path, name: str) -> None:
    data = replace(example(), side={name: Ragged.from_lists([[4], []])})
    with pytest.raises(ValueError, match="reserved or not a file name"):
        save_dataset(data, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_ids": ["ann"]}, "2 sequences, 1 users"),
        ({"num_items": 3}, "user 'ann', position 3: item 3 is unknown"),
        ({"ratings": np.ones(4, dtype=np.float32)}, "ratings must have shape"),
        ({"behaviours": np.full(5, 2, dtype=np.int8)}, "codes run from 2 to 2"),
        ({"texts": [{}]}, "1 texts for 5 items"),
        ({"truth": np.zeros((2, 4))}, r"truth must be \[users, items\]"),
        ({"side": {"cart": Ragged.from_lists([[4]])}}, "side cart: 1 rows, 2 users"),
        ({"ratings": np.array([1, 2, 3, 4, np.inf])}, "user 'bob' has the rating inf"),
    ],
)
def test_a_data_set_made_in_memory_is_checked_too(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(example(), **change)


def test_ragged_refuses_offsets_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="rise from 0 to len"):
        Ragged(np.array([0, 3]), np.arange(2))
    with pytest.raises(IndexError, match="row 2 of 2"):
        Ragged.from_lists([[1], [2]]).row(2)


def test_other_files_in_the_folder_are_never_deleted(tmp_path: Path) -> None:
    raw = tmp_path / "reviews.json.gz"
    raw.write_bytes(b"raw data")
    dataset = example()
    with pytest.raises(FileExistsError, match=r"reviews\.json\.gz is there"):
        save_dataset(dataset, tmp_path, overwrite=True)
    assert raw.read_bytes() == b"raw data"


def test_what_an_interrupted_save_left_is_replaced(tmp_path: Path) -> None:
    dataset = example()
    save_dataset(dataset, tmp_path)
    (tmp_path / "inter.json.gz").unlink()  # written last, so an interrupted save has none
    save_dataset(dataset, tmp_path)
    assert_same(dataset, load_dataset(tmp_path))


@pytest.mark.parametrize("top", [1_700_000_000, 2**31, 2**40 + 7, 2**62])
@pytest.mark.parametrize("side", [False, True])
def test_item_numbers_that_are_times_or_hashes_are_refused(
    write_bundle: WriteBundle, top: int, side: bool
) -> None:
    # Nothing else says how many items there are; a table with a row for each would not fit.
    rows: dict[str, Any] = {"inter": {"u": [0, 1, 2]}, "cart": {"u": [0]}}
    rows["cart" if side else "inter"]["u"].append(top)
    with pytest.raises(DataError, match=f"numbered from 0 without large gaps; got item {top:,} "):
        load_dataset(write_bundle(**rows))


def test_a_million_numbers_may_have_gaps(write_bundle: WriteBundle) -> None:
    assert load_dataset(write_bundle(inter={"u": [0, 1, 999_999]})).num_items == 1_000_000
    with pytest.raises(DataError, match="got item 1,000,000 among 3 different ones"):
        load_dataset(write_bundle(inter={"u": [0, 1, 1_000_000]}))


@pytest.mark.parametrize("name", ["inter", "item", "rating", "cart", "truth"])
def test_what_is_no_file_is_not_taken_for_missing(write_bundle: WriteBundle, name: str) -> None:
    folder = write_bundle(inter=INTER)
    path = folder / ("truth.npy" if name == "truth" else f"{name}.json.gz")
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(DataError, match=f"{path.name} must be a regular file; got a pipe"):
        load_dataset(folder)
    path.unlink()
    path.symlink_to(folder / "gone")
    with pytest.raises(FileNotFoundError, match=path.name):
        load_dataset(folder)


def test_behaviours_keep_every_character(write_bundle: WriteBundle) -> None:
    rows = {"0": ["a", "a\0", "b", "a"], "1": ["a\0", "b"], "7": ["a", "a", "a"]}
    data = load_dataset(write_bundle(inter=INTER, item=ITEMS, behaviour=rows))
    assert data.behaviour_names == ("a", "a\0", "b")
    assert data.behaviours is not None
    assert data.behaviours.tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 0]


def _made(**changes: Any) -> Dataset:
    values: dict[str, Any] = {
        "name": "x",
        "user_ids": ["u"],
        "sequences": Ragged(np.array([0, 3]), np.array([0, 1, 2])),
        "num_items": 3,
    }
    return Dataset(**values | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": 2**31}, "num_items must be in 1 .. 2,147,483,647; got 2,147,483,648"),
        ({"sequences": Ragged(np.array([0, 1]), np.array([0.5]))}, "items must be integers"),
        ({"sequences": Ragged(np.array([0, 1]), np.array([np.nan]))}, "items must be integers"),
        (
            {"behaviours": np.array([0, 256, 0]), "behaviour_names": ("a",)},
            r"behaviours\[1\] must be in -128 .. 127; got 256",
        ),
        ({"times": np.array([1.0, 2.0, 3.0])}, "times must be integers; got float64"),
        ({"times": np.array([1, 2, 2**63], np.uint64)}, r"times\[2\] must be in .*; got 9223372"),
        ({"times": np.array([3, 2, 1], np.uint64)}, "time 2 follows 3"),
        ({"user_ids": ["\ud800"]}, "user_ids must be valid Unicode"),
        ({"texts": [{}, {"t": "\udfff"}, {}]}, r"texts\[1\] must be valid Unicode; got .*udfff"),
    ],
)
def test_what_would_wrap_or_be_cut_off_in_memory_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    assert _made().num_items == 3
    with pytest.raises(DataError, match=message):
        _made(**changes)


def test_unsigned_side_items_are_compared_exactly() -> None:
    side = Ragged(np.array([0, 2]), np.array([0, 2], np.uint64))
    data = _made(side={"cart": side})
    assert data.side["cart"].values.tolist() == [0]
    assert data.side["cart"].values.dtype == np.int32


def test_lists_that_do_not_fit_are_refused() -> None:
    assert Ragged.from_lists([[1], [], [2, 3]]).values.dtype == np.int32
    for value, message in (
        (2**31, r"values\[1\] must be in -2147483648 .. 2147483647; got 2147483648"),
        (np.int64(2**40), "got 1099511627776"),
        (0.5, "values must be integers; got float64"),
        (2**70, "values must be integers; got object"),
    ):
        with pytest.raises(ValueError, match=message):
            Ragged.from_lists([[0, value]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="histories must be integers; got float64"):
        pad_histories([np.array([1.5])])
    with pytest.raises(ValueError, match=r"histories\[0\] must be in .*; got 9223372036854775808"):
        pad_histories([np.array([2**63], np.uint64)])


# ---- ids of items ----


def test_item_ids_are_a_part_of_the_folder_and_count_the_items(
    write_bundle: WriteBundle, tmp_path: Path
) -> None:
    ids = ["B00A", "café, 1", "007", "never seen"]
    data = load_dataset(write_bundle(inter={"ann": [0, 2, 1]}, item_ids=ids))
    assert data.num_items == 4  # no texts, no index
    assert data.item_ids is not None
    again = load_dataset(save_dataset(data, tmp_path / "copy").path or "")
    assert again.item_ids == data.item_ids
    assert [again.item_id(item) for item in range(4)] == ids
    assert data.item_ids.item("007") == 2
    assert data.item_ids.item("7") is None
    assert (data.title(1), data.label(1)) == ("café, 1", "café, 1")
    titled = replace(data, texts=[{"title": f"T{item}"} for item in range(4)])
    assert (titled.title(0), titled.label(0)) == ("T0", "B00A: T0")
    save_dataset(replace(data, item_ids=None), tmp_path / "copy", overwrite=True)
    assert not (tmp_path / "copy" / "item_ids.json.gz").exists()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b", "a"], "ids must differ; got 'a' for the items 0 and 2"),
        (["a", "b", 3], "the id of item 2 must be a text of 1 to 1,000 characters"),
        (["a", " b", "c"], "item 1 must be a text .* without white space at its ends; got ' b'"),
        (["a", "", "c"], "item 1 must be a text"),
        (["a", "b"], r"item 2 is unknown, items are 0 .. 1"),
        ({"a": 0}, r"the top level must be an array"),
        ('["a", "b", ', "not valid JSON"),
    ],
)
def test_item_ids_that_cannot_name_the_items_are_refused(
    ids: object, message: str, write_bundle: WriteBundle
) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(write_bundle(inter={"ann": [0, 2, 1]}, item_ids=ids))


def test_item_ids_and_texts_must_have_the_same_items(write_bundle: WriteBundle) -> None:
    folder = write_bundle(inter={"ann": [0, 1]}, item={"0": {}, "1": {}}, item_ids=["a"])
    with pytest.raises(DataError, match="item_ids must have one id for each of 2 items; got 1"):
        load_dataset(folder)
