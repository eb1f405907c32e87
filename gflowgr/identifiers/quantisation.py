"""Item vectors, the codebooks that were fitted to them, and the codes of every item."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_BLOCK = 65_536  # items coded at a time


@dataclass(frozen=True, eq=False)
class VectorEncoder:
    """From item vectors to what is quantised: ``(v - mean) / scale``, then a network.

    Attributes:
        mean: float32 [width].
        scale: of all vectors together; positive.
        layers: weight [out, in] and bias [out] of each linear map, with ReLU between two.
    """

    mean: np.ndarray
    scale: float
    layers: tuple[tuple[np.ndarray, np.ndarray], ...]

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """float32 [n, d] of float32 [n, width]."""
        states = ((vectors - self.mean) / self.scale).astype(np.float32)
        for number, (weight, bias) in enumerate(self.layers):
            if number:
                states = np.maximum(states, 0)
            states = states @ weight.T + bias
        return states

    def widths(self) -> list[int] | None:
        """Widths of all layers, both ends included; None where they do not fit together."""
        if not all(w.ndim == 2 and b.shape == w.shape[:1] for w, b in self.layers):
            return None
        ends = [weight.shape for weight, _ in self.layers]
        if any(before[0] != after[1] for before, after in pairwise(ends)):
            return None
        return [ends[0][1], *(shape[0] for shape in ends)]


@dataclass(frozen=True, eq=False)
class Quantisation:
    """A residual quantisation: each item's vector is about the sum of one code per level.

    Attributes:
        vectors: float32 [items, d], what is quantised (the encoder's output, or the vectors given).
        codebooks: float32 [L, K, d].
        codes: int32 [items, L], 0 .. K - 1. Items may share all their codes.
        history: numbers logged while fitting, one dictionary per entry; empty for k-means.
        encoder: makes ``vectors`` of item vectors; None: they are the item vectors.
    """

    vectors: np.ndarray
    codebooks: np.ndarray
    codes: np.ndarray
    history: tuple[dict[str, float], ...] = ()
    encoder: VectorEncoder | None = None

    def residuals(self, level: int) -> np.ndarray:
        """float32 [items, d]: what the codes of the levels before ``level`` leave over."""
        rest = self.vectors.copy()
        for before in range(level):
            rest -= self.codebooks[before, self.codes[:, before]]
        return rest

    def error(self) -> float:
        """Mean squared distance of vectors to their quantisation, over that to their mean."""
        spread = ((self.vectors - self.vectors.mean(axis=0)) ** 2).sum()
        rest = (self.residuals(self.codes.shape[1]) ** 2).sum()
        return float(rest / spread) if spread else 0.0


def checked_vectors(vectors: np.ndarray, name: str, num_items: int | None = None) -> np.ndarray:
    """A float32 copy of item vectors.

    Args:
        vectors: [items, d].
        name: what errors call them.
        num_items: how many rows there must be, if known.

    Raises:
        ValueError: a wrong shape, no items, a vector that is not finite.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.size == 0 or vectors.dtype.kind not in "fiu":
        raise ValueError(
            f"{name} must be [items, d] and not empty, numbers; got {vectors.dtype} {vectors.shape}"
        )
    if num_items is not None and len(vectors) != num_items:
        raise ValueError(f"{name} has {len(vectors):,} rows, there are {num_items:,} items")
    copy = np.array(vectors, dtype=np.float32)
    finite = np.isfinite(copy).all(axis=1)
    if not finite.all():
        raise ValueError(f"{name}[{int(np.argmin(finite))}] is not finite")
    return copy


def squared_distances(vectors: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """float64 [n, K]: squared Euclidean distance of each vector [n, d] to each code [K, d]."""
    # In float64, so that the cancellation between the three terms never decides between codes.
    v, c = vectors.astype(np.float64), codebook.astype(np.float64)
    table = (v**2).sum(axis=1)[:, None] - 2 * (v @ c.T) + (c**2).sum(axis=1)[None]
    return np.maximum(table, 0.0)


def blocks(count: int) -> Iterator[slice]:
    """Consecutive slices that cover 0 .. count - 1, small enough for a table of distances."""
    for start in range(0, count, _BLOCK):
        yield slice(start, min(start + _BLOCK, count))


def number_within_group(codes: np.ndarray) -> np.ndarray:
    """int32 [items]: 0, 1, 2, ... among the rows of ``codes`` that are equal, in row order."""
    group = np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(group, kind="stable")
    first = np.searchsorted(group[order], group[order])
    number = np.empty(len(codes), dtype=np.int32)
    number[order] = np.arange(len(codes)) - first
    return number
