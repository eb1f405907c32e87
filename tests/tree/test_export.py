"""Exports of a tree, read back as their consumers read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gflowgr.tree import PrefixTree

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, [3, 4, 5, 3], size=(40, 4)) + np.array([2, 5, 9, 14])
"""Items that share tokens, prefixes and (some) whole identifiers; a codebook for each level."""
ITEMS = RNG.permutation(60)[:40]


@pytest.fixture
def tree() -> PrefixTree:
    return PrefixTree.from_identifiers(TOKENS, items=ITEMS)


def read_static(index: dict[str, Any], dense: int) -> Iterator[tuple[int, ...]]:
    """All identifiers of a STATIC index: dense tables first, then rows of the CSR matrix."""
    csr, indptr = index["packed_csr"], index["indptr"]

    def follow(state: int, prefix: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if state == 0:
            yield prefix
            return
        for token, after in csr[indptr[state] : indptr[state + 1]].tolist():
            yield from follow(after, (*prefix, token))

    for prefix in zip(*index["dense_mask"].nonzero(), strict=True):
        assert index["start_mask"][prefix[0]]
        state = int(index["dense_states"][prefix])
        assert state > 0
        yield from follow(state, tuple(int(token) for token in prefix))
    assert index["dense_mask"].ndim == dense


@pytest.mark.parametrize("dense", [1, 2, 3])
def test_static_arrays_hold_every_identifier_once(tree: PrefixTree, dense: int) -> None:
    index = tree.export("static", dense_levels=dense)
    found = list(read_static(index, dense))
    assert sorted(found) == sorted({tuple(row) for row in TOKENS.tolist()})
    vocab = tree.vocab_size
    assert index["start_mask"].shape == (vocab,)
    assert set(index["start_mask"].nonzero()[0]) == set(TOKENS[:, 0])
    # Compiled readers read `most` rows from anywhere: what is past the end has no such token.
    assert index["packed_csr"][-vocab:].tolist() == [[vocab, 0]] * vocab
    assert index["packed_csr"].dtype == index["indptr"].dtype == np.int32
    assert index["indptr"][-1] == len(index["packed_csr"])
    most = []
    for depth in range(4):
        below: dict[tuple[int, ...], set[int]] = {}
        for row in TOKENS.tolist():
            below.setdefault(tuple(row[:depth]), set()).add(row[depth])
        most.append(max(map(len, below.values())))
    assert list(index["layer_max_branches"]) == most


def test_sid_gr_codes_make_the_same_tree(tree: PrefixTree) -> None:
    found = tree.export("sid_gr")
    codes = found["codebooks"]
    assert codes.min() == 0
    assert (codes.max(axis=0) < found["codebook_sizes"]).all()
    again = PrefixTree.from_identifiers(codes + found["first_tokens"], items=found["items"])
    assert again.buffer.equal(tree.buffer)


def read_json(node: dict[str, Any], prefix: tuple[int, ...] = ()) -> Iterator[tuple[Any, int]]:
    for key, value in node.items():
        if key == "items":
            yield from ((prefix, item) for item in value)
        else:
            yield from read_json(value, (*prefix, int(key)))


def test_json_makes_the_same_tree_also_of_identifiers_of_several_lengths(tree: PrefixTree) -> None:
    mixed = PrefixTree.from_identifiers([(5, 9, 2), (5, 8, 1), (6,), (5, 9, 2), (5, 8)])
    for each in (tree, mixed):
        pairs = list(read_json(json.loads(json.dumps(each.export("json")))))
        again = PrefixTree.from_identifiers(
            [prefix for prefix, _ in pairs], items=[item for _, item in pairs]
        )
        assert again.buffer.equal(each.buffer)
    for kind in ("static", "sid_gr"):
        with pytest.raises(ValueError, match="identifiers must all have 3 tokens"):
            mixed.export(kind)


def test_what_has_no_such_form_is_refused(tree: PrefixTree) -> None:
    with pytest.raises(ValueError, match="kind must be 'static', 'sid_gr' or 'json'; got 'csv'"):
        tree.export("csv")  # type: ignore[arg-type]
    for dense in (0, 4):
        with pytest.raises(ValueError, match=f"dense_levels must be 1 to 3.*got {dense}"):
            tree.export("static", dense_levels=dense)
    wide = PrefixTree.from_identifiers([[0, 1 << 20, 1], [0, 0, 1]])
    with pytest.raises(ValueError, match=r"1,048,577 \*\* 2 entries.*use fewer dense_levels"):
        wide.export("static")
    assert sorted(read_static(wide.export("static", dense_levels=1), 1)) == [
        (0, 0, 1),
        (0, 1 << 20, 1),
    ]
