"""A prefix tree in the forms that other servers of generative recommenders take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from gflowgr.tree.prefix_tree import PrefixTree

__all__ = ["ExportKind", "exported"]

MAX_DENSE = 1 << 28
"""Entries of a dense table of ``"static"``; 1.3 GiB with its mask."""

ExportKind = Literal["static", "sid_gr", "json"]


def exported(tree: PrefixTree, kind: ExportKind, *, dense_levels: int = 2) -> dict[str, Any]:
    """See :meth:`PrefixTree.export`."""
    if kind == "json":
        return _json(tree)
    if kind not in ("static", "sid_gr"):
        raise ValueError(f"kind must be 'static', 'sid_gr' or 'json'; got {kind!r}")
    if tree.num_leaves != tree.level_sizes[-1]:
        raise ValueError(
            f"identifiers must all have {tree.max_length} tokens for kind {kind!r}; some are "
            "shorter: export 'json', or build the tree with an end token"
        )
    return _sid_gr(tree) if kind == "sid_gr" else _static(tree, dense_levels)


def _json(tree: PrefixTree) -> dict[str, Any]:
    root: dict[str, Any] = {}
    items = tree.item_ids.sort().values
    for item, row in zip(items.tolist(), tree.identifiers(items).tolist(), strict=True):
        node = root
        for token in row:
            if token >= 0:
                node = node.setdefault(str(token), {})
        node.setdefault("items", []).append(item)
    return root


def _sid_gr(tree: PrefixTree) -> dict[str, Any]:
    items = tree.item_ids.sort().values
    starts = np.array([codebook.start for codebook in tree.codebooks])
    return {
        "codebooks": tree.identifiers(items).cpu().numpy() - starts,
        "codebook_sizes": [len(codebook) for codebook in tree.codebooks],
        "first_tokens": starts.tolist(),
        "items": items.cpu().numpy(),
    }


def _static(tree: PrefixTree, dense_levels: int) -> dict[str, Any]:
    length, vocab = tree.max_length, tree.vocab_size
    if not 1 <= dense_levels < length:
        raise ValueError(
            f"dense_levels must be 1 to {length - 1}, below the identifiers' length; got "
            f"{dense_levels}"
        )
    if vocab**dense_levels > MAX_DENSE:
        raise ValueError(
            f"the dense tables would have {vocab:,} ** {dense_levels} entries, at most "
            f"{MAX_DENSE:,} are made; use fewer dense_levels"
        )
    first = tree.layout.node_begin
    nodes = torch.arange(tree.num_nodes, device=tree.device)
    parents = tree.parents(nodes).cpu().numpy()
    tokens = tree.node_tokens(nodes).cpu().numpy()
    # States: token + 1 at depth 1, then the nodes in their order; 0 stands for the end.
    states = np.zeros(tree.num_nodes, dtype=np.int64)
    states[first[1] : first[2]] = tokens[first[1] : first[2]] + 1
    inner = slice(first[2], first[length])
    states[inner] = np.arange(first[length] - first[2]) + vocab + 1
    num_states = vocab + 1 + first[length] - first[2]
    below = slice(first[2], tree.num_nodes)
    # Nodes are in the order of their parents, and the parents' states ascend with them.
    counts = np.bincount(states[parents[below]], minlength=num_states)
    indptr = np.concatenate([[0], np.cumsum(counts), [counts.sum() + vocab]])
    edges = np.stack([tokens[below], states[below]], axis=1)
    padding = np.tile([vocab, 0], (vocab, 1))  # for reads past the end
    leaves = tree.identifiers(tree.item_ids).unique(dim=0).cpu().numpy()
    start_mask = np.zeros(vocab, dtype=np.bool_)
    start_mask[tokens[first[1] : first[2]]] = True
    prefixes = np.unique(leaves[:, :dense_levels], axis=0)
    at = tuple(prefixes.T)
    reached = tree.walk(torch.from_numpy(prefixes).to(tree.device))[:, -1].cpu().numpy()
    dense_mask = np.zeros([vocab] * dense_levels, dtype=np.bool_)
    dense_states = np.zeros([vocab] * dense_levels, dtype=np.int32)
    dense_mask[at], dense_states[at] = True, states[reached]
    return {
        "packed_csr": np.concatenate([edges, padding]).astype(np.int32),
        "indptr": indptr.astype(np.int32),
        "layer_max_branches": _most_children(parents, first, length),
        "start_mask": start_mask,
        "dense_mask": dense_mask,
        "dense_states": dense_states,
    }


def _most_children(
    parents: npt.NDArray[np.int64], first: tuple[int, ...], length: int
) -> tuple[int, ...]:
    """The most children of a node at depth 0, 1, ..., length - 1."""
    return tuple(
        int(np.bincount(parents[first[depth + 1] : first[depth + 2]]).max())
        for depth in range(length)
    )
