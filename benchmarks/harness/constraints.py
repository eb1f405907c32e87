"""Random catalogues, and how others hold them to constrain a search: a dict trie, a CSR matrix.

Plain PyTorch and NumPy: nothing here calls the package's ops. Identifiers are LENGTH codes of CODES
each; level l's code c is token ``first_code + CODES * l + c``. Random identifiers are the worst
case: real catalogues share more prefixes.
"""

from __future__ import annotations

import functools
import gc
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.harness.shapes import CODES, LENGTH
from gflowgr.tree import PrefixTree

_BITS = (CODES - 1).bit_length()
_SEED = 0
_ROWS = 100_000


def random_tokens(items: int, first_code: int, seed: int = _SEED) -> npt.NDArray[np.int32]:
    """Identifiers [items, LENGTH], drawn uniformly; a few may be drawn twice."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, CODES, (items, LENGTH), dtype=np.int32)
    tokens += np.arange(first_code, first_code + LENGTH * CODES, CODES, dtype=np.int32)
    return tokens


def prefix_keys(tokens: npt.NDArray[Any], first_code: int) -> list[npt.NDArray[np.uint32]]:
    """Distinct prefixes of 1, 2, ... LENGTH codes, ascending, as numbers in base CODES."""
    key = packed(tokens, first_code)
    key.sort()
    levels = []
    for _ in range(LENGTH):
        levels.append(key[np.concatenate([[True], key[1:] != key[:-1]])])
        key = levels[-1] >> _BITS
    return levels[::-1]


def packed(tokens: npt.NDArray[Any], first_code: int) -> npt.NDArray[np.uint32]:
    """Identifiers or prefixes [..., l] as numbers in base CODES [...]."""
    key: npt.NDArray[np.uint32] = np.zeros(tokens.shape[:-1], np.uint32)
    for level in range(tokens.shape[-1]):
        codes = tokens[..., level] - (first_code + CODES * level)
        key = (key << np.uint32(_BITS)) | codes.astype(np.uint32)
    return key


class DictTrie:
    """Nested dicts, the usual form behind ``prefix_allowed_tokens_fn``."""

    def __init__(self, tokens: npt.NDArray[Any]) -> None:
        self.root: dict[int, Any] = {}
        names = list(range(int(tokens.max()) + 1))  # one object for all keys that are equal
        for begin in range(0, len(tokens), _ROWS):
            for identifier in tokens[begin : begin + _ROWS].tolist():
                node = self.root
                for token in identifier:
                    node = node.setdefault(names[token], {})

    def allowed(self, prefix: list[int]) -> list[int]:
        """Tokens that may follow; none after what is no prefix."""
        node = self.root
        for token in prefix:
            found = node.get(token)
            if found is None:
                return []
            node = found
        return list(node)

    def _level(self, depth: int) -> list[dict[int, Any]]:
        nodes = [self.root]
        for _ in range(depth):
            nodes = [child for node in nodes for child in node.values()]
        return nodes

    @property
    def level_sizes(self) -> tuple[int, ...]:
        """Distinct prefixes of 1, 2, ... LENGTH tokens."""
        return tuple(sum(map(len, self._level(depth))) for depth in range(LENGTH))

    @property
    def nbytes_structure(self) -> int:
        """Bytes of the dicts; their few keys are not counted."""
        return sum(
            sys.getsizeof(node) for depth in range(LENGTH + 1) for node in self._level(depth)
        )


class CsrMatrix:
    """Transitions of the trie as a sparse matrix: where a state's row begins, and its edges.

    The vectorised constraint that STATIC describes: every beam gathers as many edges as the widest
    state of its level has, with a flag for those that are its own. An edge is (token, next state),
    int32. Its dense table for the first level is not needed: that step has one row per prompt, and
    only those after it are measured here. States are numbered breadth-first.
    """

    def __init__(self, tokens: npt.NDArray[Any], first_code: int) -> None:
        levels = prefix_keys(tokens, first_code)
        self.level_sizes = tuple(map(len, levels))
        total = sum(self.level_sizes)
        edges = np.zeros((total + CODES, 2), np.int32)  # room to gather past the last row
        begins = np.full(total + 2, total, np.int32)
        state, edge = 0, 0  # first state of a level, its first edge
        self.widest = []
        above = np.zeros(1, np.uint32)
        for level, keys in enumerate(levels):
            first = np.searchsorted(keys >> _BITS, above)
            begins[state : state + len(above)] = edge + first
            self.widest.append(int(np.diff(first, append=len(keys)).max()))
            state += len(above)
            rows = edges[edge : edge + len(keys)]
            rows[:, 0] = (keys & (CODES - 1)).astype(np.int32) + (first_code + CODES * level)
            rows[:, 1] = np.arange(state, state + len(keys), dtype=np.int32)
            edge += len(keys)
            above = keys
        self.begins, self.edges = torch.from_numpy(begins), torch.from_numpy(edges)

    @property
    def nbytes_structure(self) -> int:
        """Bytes of both arrays."""
        return self.begins.nbytes + self.edges.nbytes

    def to(self, device: torch.device) -> CsrMatrix:
        """On a device, in place."""
        self.begins, self.edges = self.begins.to(device), self.edges.to(device)
        return self

    def children(self, states: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, next states, whether there is one) of states [...] at a depth, [..., widest]."""
        begin, end = self.begins[states], self.begins[states + 1]
        slots = torch.arange(self.widest[depth], device=states.device)
        place = begin.unsqueeze(-1) + slots
        edge = self.edges[place]
        return edge[..., 0].long(), edge[..., 1], place < end.unsqueeze(-1)


@dataclass(frozen=True)
class RandomCatalogue:
    """Random identifiers that are the last codebooks of a vocabulary, in every form."""

    items: int
    vocab: int
    device: torch.device

    @property
    def first_code(self) -> int:
        """Token of the first code of the first level."""
        return self.vocab - LENGTH * CODES

    @functools.cached_property
    def tokens(self) -> Tensor:
        """int32 [items, LENGTH], on the CPU."""
        return torch.from_numpy(random_tokens(self.items, self.first_code))

    @functools.cached_property
    def tree(self) -> PrefixTree:
        """The package's prefix tree."""
        return PrefixTree.from_identifiers(self.tokens).to(self.device)

    @functools.cached_property
    def csr(self) -> CsrMatrix:
        """The CSR matrix that STATIC describes."""
        return CsrMatrix(self.tokens.numpy(), self.first_code).to(self.device)

    @functools.cached_property
    def trie(self) -> DictTrie:
        """Nested dicts, as most code has them; built without the garbage collector, for speed."""
        gc.disable()
        try:
            return DictTrie(self.tokens.numpy())
        finally:
            gc.enable()


@functools.lru_cache(maxsize=1)
def random_catalogue(items: int, vocab: int, device: torch.device) -> RandomCatalogue:
    """The last one made is kept: cases of the same catalogue follow each other."""
    return RandomCatalogue(items, vocab, device)
