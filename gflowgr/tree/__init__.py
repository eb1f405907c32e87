"""The prefix tree of the items' identifiers: one structure for decoding, sampling and losses."""

from __future__ import annotations

from .flows import ItemFlows, item_flows
from .live import LiveTree
from .prefix_tree import PrefixTree

__all__ = ["ItemFlows", "LiveTree", "PrefixTree", "item_flows"]
