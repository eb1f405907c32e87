"""A catalogue that changes under its readers."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch
from torch import Tensor

from gflowgr.tree import LiveTree, PrefixTree


@pytest.fixture
def live() -> LiveTree:
    return LiveTree(PrefixTree.from_identifiers([(1, 2), (1, 3), (4,)]))


def test_changes_make_new_versions_and_leave_old_snapshots(live: LiveTree) -> None:
    first = live.snapshot
    assert live.add([(1, 5)], [3]) == live.snapshot == (live.tree, 1)
    assert live.remove([0]).version == 2
    assert live.replace([(7, 7)], [1]).version == 3
    assert live.tree.identifiers([1, 2, 3]).tolist() == [[7, 7], [4, -1], [1, 5]]
    assert first.version == 0
    assert first.tree.identifiers([0, 1, 2]).tolist() == [[1, 2], [1, 3], [4, -1]]
    other = PrefixTree.from_identifiers([(9,)])
    assert live.publish(other) == (other, 4)
    assert "version=4" in repr(live)


def test_a_copy_begins_with_the_current_snapshot_and_goes_its_own_way(live: LiveTree) -> None:
    live.add([(1, 5)], [3])
    for other in (pickle.loads(pickle.dumps(live)), copy.deepcopy(live), copy.copy(live)):
        assert other.version == 1
        assert torch.equal(other.tree.buffer, live.tree.buffer)
        assert other.remove([0]).version == 2  # it has a lock of its own
        assert live.version == 1
        assert live.tree.leaf_of([0]).tolist() == [1]


def test_a_copy_made_during_changes_is_a_whole_snapshot(live: LiveTree) -> None:
    with live._lock:  # a writer is at work, and nobody waits for it
        assert pickle.loads(pickle.dumps(live)).version == 0


def test_nothing_to_do_is_no_new_version(live: LiveTree) -> None:
    before = live.snapshot
    assert live.remove([]) == live.add([], []) == before


def test_a_refused_change_changes_nothing(live: LiveTree) -> None:
    before = live.snapshot
    for call, message in (
        (lambda: live.add([(1, 5), (2,)], [3, 2]), "item 2 is in the tree already"),
        (lambda: live.remove([1, 8]), "item 8 is not in the tree"),
        (lambda: live.replace([(1, 5)], [3]), "item 3 is not in the tree"),
        (lambda: live.remove([0, 1, 2]), "no item would be left"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert live.snapshot == before
    assert live.add([(1, 5)], [3]).version == 1  # the lock is free


def test_a_published_tree_waits_for_a_change_under_way_and_is_not_lost_to_it(
    live: LiveTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, go_on = threading.Event(), threading.Event()
    with_items = PrefixTree.with_items

    def slow(self: PrefixTree, *change: Any) -> PrefixTree:
        inside.set()
        assert go_on.wait(20)
        return with_items(self, *change)

    monkeypatch.setattr(PrefixTree, "with_items", slow)
    other = PrefixTree.from_identifiers([(9,)])
    with ThreadPoolExecutor(2) as pool:
        adding = pool.submit(live.add, [(1, 5)], [3])
        assert inside.wait(20)
        publishing = pool.submit(live.publish, other)
        too_early = wait([publishing], timeout=0.2).done
        go_on.set()
        assert adding.result().version == 1
        assert publishing.result() == (other, 2)
    assert not too_early
    assert live.tree is other


def test_readers_see_only_whole_versions_while_writers_change_it() -> None:
    """Version v holds items 0..9, and three items for each writer's last change, or none.

    A writer adds its three items, gives all of them the next identifiers, and removes them; so a
    snapshot with one or two of them, or with identifiers of different rounds, would be half a
    change.
    """
    live = LiveTree(PrefixTree.from_identifiers([(i, 0, 0) for i in range(10)]))
    rounds, writers = 30, 2
    stop = threading.Event()
    faults: list[str] = []
    seen: set[int] = set()

    def rows(writer: int, turn: int) -> list[tuple[int, ...]]:
        return [(20 + writer, turn, k) for k in range(3)]

    def write(writer: int) -> None:
        ids = [10 + 3 * writer + k for k in range(3)]
        for turn in range(rounds):
            live.add(rows(writer, 2 * turn), ids)
            live.replace(rows(writer, 2 * turn + 1), ids)
            live.remove(ids)

    def check(tree: PrefixTree) -> str | None:
        if tree.item_ids.numel() != tree.num_leaves:
            return "an item is there twice"
        if not torch.equal(
            PrefixTree(tree.buffer).walk(identifiers := tree.identifiers(tree.item_ids.long()))[
                :, -1
            ],
            tree.leaf_nodes(torch.arange(tree.num_leaves)),
        ):
            return "items and identifiers do not belong together"
        if not set(range(10)) <= set(tree.item_ids.tolist()):
            return "an item that nobody removed is gone"
        for writer in range(writers):
            own = identifiers[identifiers[:, 0] == 20 + writer].tolist()
            turn = own[0][1] if own else 0
            if own and own != [list(row) for row in rows(writer, turn)]:
                return f"half a change: {own}"
        return None

    def read() -> None:
        last = 0
        while not stop.is_set():
            tree, version = live.snapshot
            if version < last:
                faults.append(f"version {version} after {last}")
            last = version
            seen.add(version)
            if (fault := check(tree)) is not None:
                faults.append(fault)

    readers = [threading.Thread(target=read) for _ in range(3)]
    workers = [threading.Thread(target=write, args=(w,)) for w in range(writers)]
    for thread in readers + workers:
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert faults == []
    assert len(seen) > 2
    assert live.version == 3 * rounds * writers
    assert live.tree.item_ids.tolist() == list(range(10))


def test_the_first_readers_of_a_tree_may_come_together() -> None:
    """The inverse of the items map, made by the first look-up, is seen by others only when full."""
    items = torch.randperm(50_000)
    tokens = torch.stack([torch.arange(50_000) // 250, torch.arange(50_000) % 250], -1)
    built = PrefixTree.from_identifiers(tokens, items=items)
    wanted = built.leaf_of(items)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            fresh = PrefixTree(built.buffer)
            together = threading.Barrier(4)

            def look_up(tree: PrefixTree = fresh, barrier: threading.Barrier = together) -> Tensor:
                barrier.wait()
                return tree.leaf_of(items)

            for found in [pool.submit(look_up) for _ in range(4)]:
                assert torch.equal(found.result(), wanted)
