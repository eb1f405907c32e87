"""Index files of token strings."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gflowgr.errors import DataError
from gflowgr.identifiers import from_codes, read_index, write_index


def write(path: Path, content: Any) -> Path:
    path.write_bytes(gzip.compress(json.dumps(content).encode()))
    return path


def test_codes_are_ranks_in_natural_order(tmp_path: Path) -> None:
    rows = {"0": ["<a_10>", "<b_0>"], "1": ["<a_2>", "<b_0>"], "2": ["<a_10>", "<b_7>"]}
    got = read_index(write(tmp_path / "index.x.json.gz", rows), num_items=3)
    assert got.level_tokens == [["<a_2>", "<a_10>"], ["<b_0>", "<b_7>"]]
    assert got.codes.tolist() == [[1, 0], [0, 0], [1, 1]]
    assert got.codes.dtype == np.int32
    assert got.strings(2) == ["<a_10>", "<b_7>"]
    assert (got.num_items, got.level_sizes, got.num_unique()) == (3, [2, 2], 3)


def test_items_in_any_order_and_of_different_lengths(tmp_path: Path) -> None:
    rows = {"1": ["x"], "0": ["y", "z", "z"]}
    got = read_index(write(tmp_path / "i.json.gz", rows))
    assert got.codes.tolist() == [[1, 0, 0], [0, -1, -1]]
    assert got.strings(1) == ["x"]


def test_tokens_that_only_look_alike_stay_apart(tmp_path: Path) -> None:
    rows = {"0": ["<a_1>"], "1": ["<a_01>"]}
    assert read_index(write(tmp_path / "i.json.gz", rows)).level_sizes == [2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"0": ["a"], "2": ["a"]}, r"1 of 3 items have no identifier: 1"),
        ({}, "3 of 3 items have no identifier: 0, 1, 2"),
        ({"0": ["a"], "1": ["a"], "2": ["a"], "3": ["a"]}, "item '3' is unknown.* 0 .. 2"),
        ({"0": ["a"], "1": [], "2": ["a"]}, "item 1 must have a non-empty list"),
        (
            {"0": ["a"], "1": "a", "2": ["a"]},
            "item 1 must have a non-empty list of tokens; got 'a'",
        ),
        ({"0": ["a"], "1": ["a"], "2": [7]}, "item 2 has a token that is not text"),
        ([["a"]], "the top level must be an object"),
    ],
)
def test_bad_index_files_are_named(tmp_path: Path, rows: Any, message: str) -> None:
    path = write(tmp_path / "index.bad.json.gz", rows)
    with pytest.raises(DataError, match=rf"index\.bad\.json\.gz: .*{message}"):
        read_index(path, num_items=3)


def test_a_truncated_index(tmp_path: Path) -> None:
    path = write(tmp_path / "index.x.json.gz", {"0": ["a"]})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="the gzip file is truncated"):
        read_index(path)


def test_an_index_without_items(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there are no items"):
        read_index(write(tmp_path / "index.x.json.gz", {}))


ragged_rows = st.lists(
    st.lists(st.integers(0, 300), min_size=1, max_size=5), min_size=1, max_size=12
)


@given(ragged_rows)
def test_write_then_read_gives_the_same_identifiers(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]]
) -> None:
    path = tmp_path_factory.mktemp("index") / "index.x.json.gz"
    width = max(map(len, rows))
    codes = np.array([row + [-1] * (width - len(row)) for row in rows])
    write_index(path, codes)
    for identifiers in (from_codes(codes), read_index(path, num_items=len(rows))):
        got = [identifiers.strings(item) for item in range(len(rows))]
        assert got == [[f"<{'abcde'[i]}_{c}>" for i, c in enumerate(row)] for row in rows]
        assert identifiers.codes.shape == codes.shape
        np.testing.assert_array_equal(identifiers.codes < 0, codes < 0)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.zeros((2, 2)), "must be integers"),
        (np.zeros(3, dtype=int), "must be integers"),
        (np.zeros((0, 3), dtype=int), "must be integers"),
        (np.array([[0, -1], [-1, -1]]), r"codes\[1\] = \[-1, -1\]"),
        (np.array([[0, -1, 2]]), r"codes\[0\] = \[0, -1, 2\]"),
        (np.zeros((1, 27), dtype=int), "27 levels, at most 26"),
    ],
)
def test_codes_that_are_no_identifiers(codes: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_codes(codes)
