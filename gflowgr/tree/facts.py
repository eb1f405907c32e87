"""Checked facts of a tree's buffer (layout, codebooks), cached for as long as the buffer lives.

Ops get the buffer alone, from any source. The first use of a buffer checks that its arrays agree
with its header (:mod:`gflowgr.tree.check`), unless the caller trusts it. The result is kept until
the buffer is freed or written to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from gflowgr import backends
from gflowgr.tree.check import check_tree, largest_tokens, read_layout
from gflowgr.tree.layout import WORDS, TreeLayout


@dataclass(frozen=True)
class TreeFacts:
    """Facts of a tree that ops need.

    Attributes:
        codebook_ends: largest token + 1 of each position of the identifiers, int64 [L], on the CPU.
        codebook_ends_here: the same on the device of the tree.
        vocab_size: the largest of them: what an output head has to cover, whatever the header says.
        most: most tokens that a beam may need logits of, per normaliser other than "vocab".
        most_items: most items that share an identifier.
    """

    codebook_ends: Tensor
    codebook_ends_here: Tensor
    vocab_size: int
    most: dict[str, int]
    most_items: int


@dataclass
class _Known:
    layout: TreeLayout
    version: int | None
    facts: TreeFacts | None


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def accept(buffer: Tensor, *, trust: bool = False) -> TreeLayout:
    """The layout of a tree's buffer; checks the buffer unless that was done before.

    ``trust``: check the header only; the rest is used unchecked. The first call synchronises with
    the device, so it must not happen while a CUDA graph is captured.
    Raises TypeError for what is no buffer, ValueError for one that is no tree or damaged.
    """
    if not isinstance(buffer, Tensor):
        raise TypeError(f"tree must be the buffer of a prefix tree; got {type(buffer).__name__}")
    known = _lookup(buffer)
    if known is None:
        _check_form(buffer)
        _may_read("checked")
        on_cpu = buffer.detach().cpu().numpy()
        layout = read_layout(on_cpu)
        facts = None if trust else _facts(buffer, layout, check_tree(on_cpu, layout))
        known = _known[buffer] = _Known(layout, _version(buffer), facts)
    return known.layout


def tree_facts(buffer: Tensor) -> TreeFacts:
    """Facts of the tree with this buffer, read once; see :func:`accept`."""
    layout = accept(buffer)
    known: _Known = _known[buffer]
    if known.facts is None:
        _may_read("read")
        ends = largest_tokens(buffer.detach().cpu().numpy(), layout)
        known.facts = _facts(buffer, layout, ends)
    return known.facts


def codebooks_of(buffer: Tensor) -> tuple[range, ...]:
    """Per position of the identifiers, the range from the smallest to the largest token."""
    ends = tree_facts(buffer).codebook_ends.tolist()
    return tuple(map(range, accept(buffer).token_base, ends))


def moved(buffer: Tensor, device: torch.device | str) -> Tensor:
    """An accepted buffer on another device (itself where it is there), accepted too."""
    there = buffer.to(device)
    if there is not buffer:
        facts = tree_facts(buffer)
        layout = accept(buffer)
        ends = facts.codebook_ends.tolist()
        _known[there] = _Known(layout, _version(there), _facts(there, layout, ends))
    return there


def check_head(buffer: Tensor, rows: int, what: str) -> None:
    """Raise ValueError unless ``rows``, those of ``what``, cover every token of the tree.

    Looks at the tokens and not at the header: no head is indexed by what a header says.
    """
    size = tree_facts(buffer).vocab_size
    if size > rows:
        raise ValueError(
            f"{what} must cover every token of the tree, at least {size} of them; got {rows}"
        )


def _may_read(what: str) -> None:
    """Raise RuntimeError while a CUDA graph is captured: then the buffer cannot be copied."""
    if backends.capturing():
        raise RuntimeError(
            "tree must be known before a CUDA graph is captured; got a buffer that was not "
            f"{what} yet: call the op once, or gflowgr.tree.facts.tree_facts(tree.buffer), before"
        )


def _lookup(buffer: Tensor) -> _Known | None:
    known: _Known | None = _known.get(buffer)
    return known if known is not None and known.version == _version(buffer) else None


def _version(buffer: Tensor) -> int | None:
    """Counts writes to a tensor; those of inference mode have no such count."""
    return None if buffer.is_inference() else buffer._version


def _check_form(buffer: Tensor) -> None:
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or buffer.numel() < 8 * WORDS:
        raise ValueError(
            "tree must be the buffer of a prefix tree (uint8, 1-D); "
            f"got {buffer.dtype} {tuple(buffer.shape)}"
        )
    if not buffer.is_contiguous() or buffer.data_ptr() % 8 or buffer.storage_offset() % 8:
        raise ValueError(
            "tree: the buffer of a prefix tree must be contiguous and begin at a multiple of 8 "
            f"bytes; got stride {buffer.stride(0)}, offset {buffer.storage_offset()}, address "
            f"{buffer.data_ptr():#x}"
        )


def _facts(buffer: Tensor, layout: TreeLayout, ends: list[int]) -> TreeFacts:
    codebooks = torch.tensor(ends)
    sizes = [end - base for base, end in zip(layout.token_base, ends, strict=True)]
    most = {"level": max(sizes), "children": max(layout.max_children)}
    most_items = 1
    if layout.item_begin:
        size = 4 * (layout.num_leaves + 1)
        begin = buffer[layout.item_begin : layout.item_begin + size].view(torch.int32)
        most_items = int(begin.diff().max())
    return TreeFacts(codebooks, codebooks.to(buffer.device), max(ends), most, most_items)
