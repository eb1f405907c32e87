"""The prefix tree against a trie of dictionaries, on catalogues of every kind."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support.dict_trie import Catalogue, DictTrie, catalogues

from gflowgr.data.index import read_index
from gflowgr.errors import DataError
from gflowgr.tree import PrefixTree
from gflowgr.tree import build as _tree_build
from gflowgr.tree.layout import build_numpy


def build(catalogue: Catalogue) -> PrefixTree:
    items = None if catalogue.default_items else catalogue.items
    return PrefixTree.from_identifiers(catalogue.identifiers, items=items)


@pytest.fixture
def small() -> PrefixTree:
    """Items 0 and 3 share an identifier; that of item 4 is a prefix of that of item 1."""
    return PrefixTree.from_identifiers([(5, 9, 2), (5, 8, 1), (6,), (5, 9, 2), (5, 8)])


class TestAgainstDictionaries:
    @given(catalogues())
    def test_counts(self, catalogue: Catalogue) -> None:
        tree, oracle = build(catalogue), catalogue.oracle
        depths = [len(prefix) for prefix in oracle.prefixes]
        assert tree.num_nodes == len(oracle.prefixes)
        assert tree.num_leaves == len(oracle.leaves)
        assert tree.num_items == max(catalogue.items) + 1
        assert tree.max_length == max(depths)
        assert tree.level_sizes == tuple(depths.count(d) for d in range(1, max(depths) + 1))
        assert tree.vocab_size == max(max(prefix) for prefix in oracle.leaves) + 1
        assert tree.nbytes == tree.buffer.numel() > tree.nbytes_structure

    @given(catalogues())
    def test_children(self, catalogue: Catalogue) -> None:
        tree, oracle = build(catalogue), catalogue.oracle
        for prefix, node in oracle.node.items():
            tokens, nodes = tree.children(node)
            expected = oracle.children(prefix)
            assert tokens.tolist() == [child[-1] for child in expected]
            assert nodes.tolist() == [oracle.node[child] for child in expected]

    @given(catalogues())
    def test_walk_and_leaves(self, catalogue: Catalogue) -> None:
        tree, oracle = build(catalogue), catalogue.oracle
        queries, masks = torch.tensor(catalogue.queries), torch.tensor(catalogue.masks)
        assert tree.walk(queries).tolist() == [oracle.walk(row) for row in catalogue.queries]
        assert tree.walk(queries, mask=masks).tolist() == [
            oracle.walk(row, mask)
            for row, mask in zip(catalogue.queries, catalogue.masks, strict=True)
        ]

        def end(row: list[int]) -> tuple[int, ...]:
            return tuple(row[: row.index(-1)] if -1 in row else row)

        expected = [oracle.leaf(end(row)) for row in catalogue.queries]
        assert tree.leaves(queries).tolist() == expected
        prefix_masks = masks.cumprod(-1).bool()
        cut = [
            end([*(t for t, keep in zip(row, mask, strict=True) if keep), -1])
            for row, mask in zip(catalogue.queries, prefix_masks.tolist(), strict=True)
        ]
        assert tree.leaves(queries, mask=prefix_masks).tolist() == [oracle.leaf(c) for c in cut]

    @given(catalogues())
    def test_nodes(self, catalogue: Catalogue) -> None:
        tree, oracle = build(catalogue), catalogue.oracle
        nodes = torch.arange(-1, tree.num_nodes)
        prefixes = oracle.prefixes
        assert tree.node_tokens(nodes).tolist() == [-1, -1, *(p[-1] for p in prefixes[1:])]
        assert tree.parents(nodes).tolist() == [
            -1,
            -1,
            *(oracle.node[p[:-1]] for p in prefixes[1:]),
        ]
        assert tree.terminal(nodes).tolist() == [-1, *(oracle.leaf(p) for p in prefixes)]
        begin, end = tree.child_ranges(nodes)
        assert (end - begin).tolist() == [0, *(len(oracle.children(p)) for p in prefixes)]
        for depth in range(1, tree.max_length + 1):
            level = torch.tensor([-1] + [oracle.node[p] for p in prefixes if len(p) == depth])
            assert torch.equal(tree.node_tokens(level, level=depth - 1), tree.node_tokens(level))

    @given(catalogues())
    def test_items(self, catalogue: Catalogue) -> None:
        tree, oracle = build(catalogue), catalogue.oracle
        for leaf, identifier in enumerate(oracle.leaves):
            assert tree.items(leaf).tolist() == sorted(oracle.items_of[identifier])
        leaves = torch.arange(-1, tree.num_leaves)
        nodes = [-1, *(oracle.node[identifier] for identifier in oracle.leaves)]
        assert tree.leaf_nodes(leaves).tolist() == nodes
        begin, end = tree.leaf_items(leaves)
        assert (end - begin).tolist() == [0, *(len(oracle.items_of[i]) for i in oracle.leaves)]
        expected = [[*i, *[-1] * (tree.max_length - len(i))] for i in catalogue.identifiers]
        assert tree.identifiers(catalogue.items).tolist() == expected
        assert tree.leaf_of(catalogue.items).tolist() == [
            oracle.leaf(i) for i in catalogue.identifiers
        ]
        unused = sorted(set(range(tree.num_items)) - set(catalogue.items))
        assert tree.leaf_of([-1, *unused]).tolist() == [-1] * (len(unused) + 1)

    @given(catalogues())
    def test_available_nodes(self, catalogue: Catalogue) -> None:
        tree, oracle = build(catalogue), catalogue.oracle
        generator = np.random.default_rng(len(catalogue.identifiers))
        for share in (0.0, 0.3, 1.0):
            available = generator.random(tree.num_items) < share
            expected = [oracle.is_live(prefix, available) for prefix in oracle.prefixes]
            assert tree.available_nodes(available).tolist() == expected


class TestBuilders:
    @given(catalogues(max_rows=60))
    def test_cpp_and_numpy_agree_bit_for_bit(self, catalogue: Catalogue) -> None:
        host = _tree_build.host_module()
        if host is None:
            pytest.skip("gflowgr._host is not built")
        tokens = _tree_build.token_array(catalogue.identifiers)
        items = None if catalogue.default_items else np.array(catalogue.items)
        for index_bytes in (None, 8):
            for array in (tokens, tokens.astype(np.int32)):
                buffer, error = host.build_tree(array, items, index_bytes or 0)
                assert error is None
                assert np.array_equal(buffer, build_numpy(tokens, items, index_bytes))

    def test_identifiers_longer_than_one_sort_key(self) -> None:
        # 9 levels of 31 bits do not fit 64-bit keys: both builders take several words.
        tokens = np.random.default_rng(0).integers(0, 2**31 - 1, (200, 9))
        tokens[100:, :8] = tokens[:100, :8]  # differ in the last level only
        tree = PrefixTree.from_identifiers(tokens)
        oracle = DictTrie([tuple(row) for row in tokens.tolist()], range(200))
        assert torch.equal(tree.buffer, torch.from_numpy(build_numpy(tokens, None)))
        assert tree.walk(tokens).tolist() == [oracle.walk(row) for row in tokens.tolist()]

    @given(catalogues())
    def test_64_bit_nodes(self, catalogue: Catalogue) -> None:
        tokens = _tree_build.token_array(catalogue.identifiers)
        wide = PrefixTree(torch.from_numpy(build_numpy(tokens, None, index_bytes=8)))
        narrow = PrefixTree(torch.from_numpy(build_numpy(tokens, None)))
        queries = torch.tensor(catalogue.queries)
        assert wide.layout.index_bytes == 8
        assert torch.equal(wide.walk(queries), narrow.walk(queries))
        assert torch.equal(wide.identifiers([0]), narrow.identifiers([0]))

    def test_row_order_does_not_matter(self) -> None:
        generator = np.random.default_rng(1)
        tokens = generator.integers(0, 4, (500, 4))  # many items share an identifier
        order = generator.permutation(500)
        expected = PrefixTree.from_identifiers(tokens)
        shuffled = PrefixTree.from_identifiers(tokens[order], items=order)
        assert torch.equal(shuffled.buffer, expected.buffer)
        assert expected.num_leaves < 500

    def test_without_the_compiled_builder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokens = np.random.default_rng(2).integers(0, 256, (1000, 4))
        expected = PrefixTree.from_identifiers(tokens)
        monkeypatch.setattr(_tree_build, "host_module", lambda: None)
        assert torch.equal(PrefixTree.from_identifiers(tokens).buffer, expected.buffer)

    def test_bytes_per_item(self) -> None:
        # 8 bytes an item are promised for 1M random identifiers; 100k are less dense, hence larger.
        tokens = np.random.default_rng(3).integers(0, 256, (1_000_000, 4), dtype=np.int32)
        tree = PrefixTree.from_identifiers(tokens)
        assert tree.nbytes_structure <= 8 * len(tokens)
        assert tree.layout.token_bytes == (1, 1, 1, 1)

    @pytest.mark.parametrize("as_type", [list, np.array, torch.tensor, lambda x: np.array(x, "u1")])
    def test_accepts_lists_arrays_and_tensors(self, as_type) -> None:  # type: ignore[no-untyped-def]
        tree = PrefixTree.from_identifiers(as_type([[1, 2], [1, 3]]))
        assert tree.walk(torch.tensor([[1, 3]])).tolist() == [[1, 3]]


class TestErrors:
    @pytest.mark.parametrize(
        ("tokens", "error", "message"),
        [
            ([], ValueError, "no identifiers"),
            ([[1], []], ValueError, r"tokens\[1\] is empty"),
            ([[1, 2], [-1, -1]], ValueError, r"tokens\[1\] is empty"),
            ([[1, 2], [-1, 2]], ValueError, r"tokens\[1, 0\] = -1 stands before other tokens"),
            ([[1, 2], [3, -7]], ValueError, r"tokens\[1, 1\] must be .*; got -7"),
            ([[1, 2**31]], ValueError, r"tokens\[0, 1\] must be .*; got 2147483648"),
            ([[0.5]], TypeError, "must be integers"),
            ([["a"]], TypeError, "must be integers"),
            ([1, 2], TypeError, r"tokens\[0\] must be a sequence"),
            (np.zeros((2, 2, 2), int), ValueError, r"must be of shape \[items, L\]"),
        ],
    )
    @pytest.mark.parametrize("compiled", [True, False])
    def test_bad_identifiers(self, tokens, error, message, compiled, monkeypatch) -> None:  # type: ignore[no-untyped-def]
        if not compiled:
            monkeypatch.setattr(_tree_build, "host_module", lambda: None)
        with pytest.raises(error, match=message):
            PrefixTree.from_identifiers(tokens)

    @pytest.mark.parametrize(
        ("items", "error", "message"),
        [
            ([0], ValueError, r"must be of shape \(2,\)"),
            ([0, 0], ValueError, "item 0 is given twice"),
            ([0, -1], ValueError, r"items\[1\] must be 0.*; got -1"),
            ([0.0, 1.0], TypeError, "must be integers"),
        ],
    )
    def test_bad_items(self, items, error, message) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(error, match=message):
            PrefixTree.from_identifiers([[1], [2]], items=items)

    @pytest.mark.parametrize(
        ("row", "mask", "message"),
        [
            ((5, 7, 2), None, r"tokens\[1\] = \(5, 7, 2\) is not .*: no child 7 under \(5,\)"),
            ((5, 9, -1), None, r"tokens\[1\] = \(5, 9\) is not .*: no item ends there"),
            ((5, -1, 2), None, r"tokens\[1\] = \(5,\) is not .*: no item ends there"),
            ((-1, -1, -1), None, r"tokens\[1\] = \(\) is not .*: it is empty"),
            (
                (5, 9, 2),
                (True, True, False),
                r"tokens\[1\] = \(5, 9\) is not .*: no item ends there",
            ),
            ((5, 9, 2), (False, True, True), "mask must be a run of true, then false, in each"),
        ],
    )
    def test_validate_names_the_place(self, small, row, mask, message) -> None:  # type: ignore[no-untyped-def]
        tokens = torch.tensor([(5, 9, 2), row])
        masks = None if mask is None else torch.tensor([(True, True, True), mask])
        with pytest.raises(ValueError, match=message):
            small.validate(tokens, masks)

    def test_validate_accepts_what_is_there(self, small: PrefixTree) -> None:
        tokens = torch.tensor([[(5, 9, 2), (6, -1, -1)], [(5, 8, -1), (77, 88, 99)]])
        mask = torch.tensor([[[1, 1, 1], [1, 0, 0]], [[1, 1, 0], [0, 0, 0]]]).bool()
        small.validate(tokens, mask)  # an all-false row is padding, whatever it holds
        small.validate(tokens[:1])
        with pytest.raises(ValueError, match=r"codes\[1, 1\] = \(77, 88, 99\)"):
            small.validate(tokens, name="codes")

    def test_token_255_in_uint8_is_no_padding(self) -> None:
        tree = PrefixTree.from_identifiers([[1, 255], [1, 7]])
        tokens = torch.tensor([[1, 255]], dtype=torch.uint8)
        assert tree.leaves(tokens).tolist() == tree.leaves(tokens.long()).tolist() == [1]
        tree.validate(tokens)
        tree.validate(tokens, torch.ones(1, 2, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"= \(1, 255\) is not .*: no child 255 under \(1,\)"):
            PrefixTree.from_identifiers([[1], [2]]).validate(tokens)

    def test_validate_takes_lists(self, small: PrefixTree) -> None:
        small.validate([[5, 9, 2], [6, -1, -1]])
        with pytest.raises(ValueError, match=r"tokens\[0\] = \(1, 2, 3\) is not an identifier"):
            small.validate([[1, 2, 3]])
        with pytest.raises(TypeError, match=r"codes must be integers; got torch\.float32"):
            small.validate([[0.5]], name="codes")

    def test_validate_refuses_padding_under_a_true_mask(self, small: PrefixTree) -> None:
        tokens = torch.tensor([[5, 9, 2], [5, 8, -1]])  # (5, 8) is an identifier
        small.validate(tokens, tokens >= 0)
        with pytest.raises(ValueError, match=r"tokens\[1, 2\] = -1 is no token, but the mask is"):
            small.validate(tokens, torch.ones(2, 3, dtype=torch.bool))

    def test_lookups_refuse_bad_arguments(self, small: PrefixTree) -> None:
        with pytest.raises(TypeError, match=r"must be integers; got torch\.float32"):
            small.walk(torch.zeros(2, 3))
        with pytest.raises(ValueError, match=r"mask must be of shape \(2, 3\)"):
            small.walk(torch.zeros(2, 3, dtype=torch.int64), mask=torch.ones(3, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"node must be 0\.\.6; got 99"):
            small.children(99)
        with pytest.raises(ValueError, match=r"leaf must be .*; got -1"):
            small.items(-1)
        with pytest.raises(ValueError, match=r"must be 0\.\.4"):
            small.leaf_of([5])
        with pytest.raises(TypeError, match="available must be bool; got"):
            small.available_nodes(torch.ones(5))
        with pytest.raises(ValueError, match=r"available must have shape \[5\]; got"):
            small.available_nodes(torch.ones(4, dtype=torch.bool))

    @pytest.mark.parametrize("garbage", [-(2**63), 2**63 - 1, -2, 2**40])
    def test_garbage_tokens_are_just_invalid(self, small: PrefixTree, garbage: int) -> None:
        assert small.walk(torch.tensor([[garbage, 9, 2], [5, garbage, 2]])).tolist() == [
            [-1, -1, -1],
            [1, -1, -1],
        ]

    def test_empty_input(self, small: PrefixTree) -> None:
        assert small.walk(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 3)
        assert small.walk(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)
        assert small.leaves(torch.zeros(2, 0, dtype=torch.int64)).tolist() == [-1, -1]
        assert small.identifiers([]).shape == (0, 3)


class TestFiles:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
    @given(catalogues())
    def test_round_trip(self, tmp_path: Path, catalogue: Catalogue) -> None:
        tree = build(catalogue)
        tree.save(tmp_path / "tree.safetensors")
        for mmap in (False, True):
            loaded = PrefixTree.load(tmp_path / "tree.safetensors", mmap=mmap)
            assert torch.equal(loaded.buffer, tree.buffer)
            assert torch.equal(loaded.walk(catalogue.queries), tree.walk(catalogue.queries))

    def test_copies(self, small: PrefixTree) -> None:
        for other in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small), small.to("cpu")):
            assert torch.equal(other.buffer, small.buffer)
        assert small.share_memory_().buffer.is_shared()
        assert small.items(small.num_leaves - 1).tolist() == [0, 3]

    @pytest.mark.process
    def test_a_mapped_and_trusted_tree_is_not_read_whole(self, tmp_path: Path) -> None:
        tokens = np.random.default_rng(0).integers(0, 256, (1_000_000, 4), dtype=np.int32)
        PrefixTree.from_identifiers(tokens).save(tmp_path / "t.safetensors")
        script = (
            "import resource, sys, torch\n"
            "from gflowgr.tree import PrefixTree\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
            f"tree = PrefixTree.load({str(tmp_path / 't.safetensors')!r}, mmap=True, trust=True)\n"
            "tree.walk(torch.zeros(1, 4, dtype=torch.int64))\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, tree.nbytes)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        grown_kib, nbytes = map(int, done.stdout.split())
        assert grown_kib * 1024 < nbytes // 2

    def test_damaged_files(self, small: PrefixTree, tmp_path: Path) -> None:
        path = tmp_path / "tree.safetensors"
        small.save(path)
        good = path.read_bytes()
        header = 8 + int.from_bytes(good[:8], "little")
        begins = header + small.layout.child_begin
        damaged = {
            "truncated": good[:-64],
            "no file of ours": b"hello",
            "another format": good.replace(b"gflowgr.prefix_tree", b"gflowgr.prefix_free"),
            "no magic": good[:header] + bytes(8) + good[header + 8 :],
            "counts changed": good[: header + 24] + b"\xff" + good[header + 25 :],
            "ranges out of order": good[:begins] + b"\xff\xff" + good[begins + 2 :],
        }
        for content in damaged.values():
            path.write_bytes(content)
            for mmap in (False, True):
                with pytest.raises(DataError, match=r"tree\.safetensors"):
                    PrefixTree.load(path, mmap=mmap)
        with pytest.raises(FileNotFoundError):
            PrefixTree.load(tmp_path / "absent")

    def test_index_file(self, data_root: Path) -> None:
        path = data_root / "Beauty" / "index.letter_official.json.gz"
        index = read_index(path, num_items=12_101)
        offsets = np.cumsum([0, *index.level_sizes[:-1]])
        tree = PrefixTree.from_identifiers(index.codes + offsets)
        assert (tree.num_items, tree.max_length) == (12_101, 4)
        tokens = tree.identifiers(torch.arange(12_101))
        assert torch.equal(tree.leaves(tokens), tree.leaf_of(torch.arange(12_101)))
        lows, highs = tokens.min(0).values, tokens.max(0).values
        assert bool((lows[1:] > highs[:-1]).all()), "every level has token ids of its own"
