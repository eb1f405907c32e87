"""A prefix tree that is replaced as a whole while other threads read it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from gflowgr.tree.prefix_tree import PrefixTree

__all__ = ["LiveTree", "Snapshot"]


class Snapshot(NamedTuple):
    """A tree and the number of changes that led to it."""

    tree: PrefixTree
    version: int


class LiveTree:
    """Holds the current prefix tree of a catalogue and replaces it, whole, when items change.

    Trees are immutable. A reader takes :attr:`tree` once per request and goes on with it, whatever
    happens meanwhile; it takes no lock, and never sees half a change. Writers share one lock.
    A change costs about as much as reading and writing the tree once, so make few of many items.

    ::

        live = LiveTree(tree)
        live.add(tokens, items)                              # in one thread
        constrained_beam_search(model, ids, mask, live.tree) # in others

    Item ids keep their meaning from one version to the next. The size of the id space
    (``tree.num_items``) follows the highest id: make availability masks for the snapshot in use.

    A copy (``copy``, ``pickle``, a worker process) begins with the current snapshot and is
    independent: what changes in one is not seen by the other.
    """

    def __init__(self, tree: PrefixTree) -> None:
        self._lock = threading.Lock()
        self._current = Snapshot(tree, 0)

    @property
    def tree(self) -> PrefixTree:
        """The current tree."""
        return self._current.tree

    @property
    def version(self) -> int:
        """Number of changes so far."""
        return self._current.version

    @property
    def snapshot(self) -> Snapshot:
        """The current tree and its version, which belong together."""
        return self._current

    def add(self, tokens: Any, items: Any) -> Snapshot:
        """Add items; see :meth:`PrefixTree.with_items`. The new snapshot is returned.

        Raises TypeError or ValueError, and then nothing has changed.
        """
        with self._lock:
            return self._publish(self._current.tree.with_items(tokens, items))

    def remove(self, items: Any) -> Snapshot:
        """Remove items; see :meth:`PrefixTree.without_items`. The new snapshot is returned.

        Raises TypeError or ValueError, and then nothing has changed.
        """
        with self._lock:
            return self._publish(self._current.tree.without_items(items))

    def replace(self, tokens: Any, items: Any) -> Snapshot:
        """Give items of the tree other identifiers; see :meth:`PrefixTree.with_identifiers`.

        One change: no snapshot lacks them. Raises TypeError or ValueError, and then nothing has
        changed.
        """
        with self._lock:
            return self._publish(self._current.tree.with_identifiers(tokens, items))

    def publish(self, tree: PrefixTree) -> Snapshot:
        """Replace the whole tree by one made elsewhere (a nightly rebuild, say)."""
        with self._lock:
            return self._publish(tree)

    def _publish(self, tree: PrefixTree) -> Snapshot:
        if tree is not self._current.tree:
            # One assignment of one reference: readers see the old pair or the new one.
            self._current = Snapshot(tree, self._current.version + 1)
        return self._current

    def __reduce__(self) -> tuple[Callable[[Snapshot], LiveTree], tuple[Snapshot]]:
        # Read the snapshot once: the copy then has a concurrent change whole or not at all. The
        # copy has its own lock and is independent from then on.
        return _restored, (self._current,)

    def __repr__(self) -> str:
        tree, version = self._current
        return f"LiveTree(version={version}, {tree!r})"


def _restored(snapshot: Snapshot) -> LiveTree:
    live = LiveTree(snapshot.tree)
    live._current = snapshot
    return live
