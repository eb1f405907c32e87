"""Trees with items added and removed: bit-identical to a tree built from the remaining items."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.dict_trie import Catalogue, DictTrie, Identifier, catalogues

from gflowgr.tree import PrefixTree
from gflowgr.tree import build as _tree_build
from gflowgr.tree import update as _tree_update


@pytest.fixture(params=["cpp", "numpy"], scope="module", autouse=True)
def builder(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test, with the compiled merge and with NumPy's."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(_tree_update, "host_module", lambda: None)
        elif _tree_build.host_module() is None:
            pytest.skip("gflowgr._host is not built")
        yield request.param


def built(contents: dict[int, Identifier]) -> PrefixTree:
    return PrefixTree.from_identifiers(list(contents.values()), items=list(contents))


@st.composite
def changes(draw: st.DrawFn) -> tuple[dict[int, Identifier], list[tuple[str, Any]]]:
    """Identifiers of items to start with, and changes: ids to remove, items to add or replace."""
    catalogue: Catalogue = draw(catalogues(max_rows=12))
    contents = dict(zip(catalogue.items, catalogue.identifiers, strict=True))
    others: Catalogue = draw(catalogues(max_rows=12))
    near = st.sampled_from(catalogue.identifiers)
    longer = st.builds(lambda ids, more: ids + more, near, st.sampled_from(others.identifiers))
    shorter = st.builds(lambda ids, size: ids[:size], near, st.integers(1, 5))
    identifier = near | longer | shorter | st.sampled_from(others.identifiers)
    start, now, steps = dict(contents), set(contents), []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["add", "remove", "replace"]))
        if kind == "add":
            free = st.integers(0, 60).filter(lambda item: item not in now)  # noqa: B023
            ids = draw(st.lists(free, max_size=6, unique=True))
            now |= set(ids)
        else:
            most = len(now) - (kind == "remove")
            ids = draw(st.lists(st.sampled_from(sorted(now)), max_size=most, unique=True))
            if kind == "remove":
                now -= set(ids)
        rows = {item: draw(identifier) for item in ids} if kind != "remove" else ids
        steps.append((kind, rows))
    return start, steps


def change(tree: PrefixTree, kind: str, what: Any) -> PrefixTree:
    if kind == "remove":
        return tree.without_items(what)
    method = tree.with_items if kind == "add" else tree.with_identifiers
    return method(list(what.values()), list(what))


@given(changes())
def test_any_sequence_of_changes_equals_building_from_what_is_left(
    example: tuple[dict[int, Identifier], list[tuple[str, Any]]],
) -> None:
    contents, steps = example
    tree = built(contents)
    for kind, what in steps:
        before = tree.buffer.clone()
        changed = change(tree, kind, what)
        assert torch.equal(tree.buffer, before)  # readers of the old tree go on with it
        tree = changed
        if kind == "remove":
            contents = {item: ids for item, ids in contents.items() if item not in what}
        else:
            contents = {**contents, **what}
        assert torch.equal(tree.buffer, built(contents).buffer)
        oracle = DictTrie(list(contents.values()), list(contents))
        assert tree.num_leaves == len(oracle.leaves)
        for item, identifier in contents.items():
            assert int(tree.leaf_of([item])) == oracle.leaf(identifier)


@pytest.mark.parametrize("length", [3, 12])  # codes that fit one 64-bit key, and that do not
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_large_changes(length: int, dtype: type) -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 90, (6000, length), dtype=dtype)
    tokens[:, 2] *= 1000
    items = rng.permutation(20_000)[:6000]
    tree = PrefixTree.from_identifiers(tokens[:4000], items=items[:4000])
    grown = tree.with_items(tokens[4000:], items[4000:])
    assert torch.equal(grown.buffer, PrefixTree.from_identifiers(tokens, items=items).buffer)
    left = grown.without_items(items[:5000])
    expected = PrefixTree.from_identifiers(tokens[5000:], items=items[5000:])
    assert torch.equal(left.buffer, expected.buffer)


def test_tokens_of_other_sizes_change_the_width_that_is_stored() -> None:
    contents = {0: (3, 4), 1: (3, 9)}
    tree = built(contents)
    for identifier in [(3, 300), (3, 70_000), (3, 2**31 - 1), (0, 0, 5)]:
        assert torch.equal(
            tree.with_items([identifier], [2]).buffer, built({**contents, 2: identifier}).buffer
        )
        assert torch.equal(
            tree.with_items([identifier], [2]).without_items([2]).buffer, tree.buffer
        )


def test_nothing_to_do_is_the_same_tree() -> None:
    tree = built({0: (1,), 7: (2,)})
    assert tree.without_items([]) is tree
    assert tree.with_items([], []) is tree
    assert tree.with_items(np.empty((0, 3), dtype=np.int64), np.empty(0, dtype=np.int64)) is tree


def test_any_kind_of_integers_may_be_given() -> None:
    tree = built({0: (1, 2), 7: (2, 3)})
    expected = built({0: (1, 2), 7: (2, 3), 3: (2, 2)})
    for tokens, items in (
        (torch.tensor([[2, 2]]), torch.tensor([3])),
        (np.array([[2, 2]], dtype=np.uint8), np.array([3], dtype=np.int16)),
        ([[2, 2]], [3]),
    ):
        grown = tree.with_items(tokens, items)
        assert torch.equal(grown.buffer, expected.buffer)
        assert torch.equal(grown.without_items(items).buffer, tree.buffer)


class TestMapped:
    """A tree that is a file's pages: updates read them, and never write."""

    def test_updates_of_a_mapped_tree_leave_the_file_alone(self, tmp_path: Path) -> None:
        contents = {i: (i % 5, i % 7, i) for i in range(50)}
        path = tmp_path / "tree.safetensors"
        built(contents).save(path)
        path.chmod(0o400)
        before = path.read_bytes()
        mapped = PrefixTree.load(path, mmap=True)
        grown = mapped.with_items([(1, 1, 99)], [50])
        left = grown.without_items(range(10))
        contents = {**contents, 50: (1, 1, 99)}
        assert torch.equal(grown.buffer, built(contents).buffer)
        for item in range(10):
            del contents[item]
        assert torch.equal(left.buffer, built(contents).buffer)
        assert path.read_bytes() == before
        assert torch.equal(mapped.buffer, PrefixTree.load(path).buffer)

    def test_a_new_version_may_be_saved_over_the_mapped_one(self, tmp_path: Path) -> None:
        path = tmp_path / "tree.safetensors"
        built({0: (1,), 1: (2,)}).save(path)
        mapped = PrefixTree.load(path, mmap=True)
        mapped.with_items([(3,)], [2]).save(path)
        assert mapped.num_leaves == 2  # its pages are still those of the old file
        assert mapped.walk([[2], [3]]).tolist() == [[2], [-1]]
        assert PrefixTree.load(path, mmap=True).num_leaves == 3


class TestRefusals:
    @pytest.fixture
    def tree(self) -> PrefixTree:
        return built({4: (1, 2), 9: (1, 3), 6: (1, 2)})

    def test_an_item_that_is_there_cannot_be_added(self, tree: PrefixTree) -> None:
        with pytest.raises(ValueError, match="items: item 6 is in the tree already"):
            tree.with_items([(5,), (6,), (7,)], [9, 2, 6])

    def test_an_item_that_is_not_there_cannot_be_removed(self, tree: PrefixTree) -> None:
        with pytest.raises(ValueError, match="removed: item 5 is not in the tree"):
            tree.without_items([9, 70, 5])
        with pytest.raises(ValueError, match="removed: item 5 is not in the tree"):
            tree.with_identifiers([(5,)], [5])

    def test_an_id_given_twice_is_named(self, tree: PrefixTree) -> None:
        with pytest.raises(ValueError, match="removed: item 9 is given twice"):
            tree.without_items([9, 4, 9])
        with pytest.raises(ValueError, match="items: item 3 is given twice"):
            tree.with_items([(1,), (2,)], [3, 3])

    def test_no_tree_without_items(self, tree: PrefixTree) -> None:
        with pytest.raises(ValueError, match="no item would be left"):
            tree.without_items([4, 6, 9])

    def test_bad_identifiers_are_named(self, tree: PrefixTree) -> None:
        with pytest.raises(ValueError, match=r"tokens\[1\] is empty"):
            tree.with_items([(1,), ()], [0, 1])
        with pytest.raises(ValueError, match=r"tokens\[0, 1\] = -1 stands before other tokens"):
            tree.with_items(np.array([[1, -1, 2]]), [0])
        with pytest.raises(ValueError, match=r"tokens\[0, 0\] must be .*; got -7"):
            tree.with_items(np.array([[-7, 1]]), [0])
        with pytest.raises(ValueError, match="items: 1 ids, but tokens has no rows"):
            tree.with_items([], [0])
        with pytest.raises(TypeError, match="removed must be integers"):
            tree.without_items([0.5])
