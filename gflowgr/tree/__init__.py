"""The prefix tree of the items' identifiers: one structure for decoding, sampling and losses."""

from __future__ import annotations

from .live import LiveTree
from .prefix_tree import PrefixTree

__all__ = ["LiveTree", "PrefixTree"]
