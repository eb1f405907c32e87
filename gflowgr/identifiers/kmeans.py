"""Identifiers by residual k-means over item vectors."""

from __future__ import annotations

import numpy as np


def residual_kmeans(
    embeddings: np.ndarray, levels: int = 3, codebook_size: int = 256, seed: int = 0
) -> np.ndarray:
    """Code each item by the nearest centre, then its residual by the nearest centre of the next
    level.

    Each level is a k-means (mini-batch, k-means++ starts) of what the levels before left over.
    Items whose codes are all the same are told apart by one more token, their number within the
    group in the order of item ids: no two items share an identifier. Equal arguments give equal
        codes.

    Args:
        embeddings: float [items, d], finite.
        levels: number of k-means levels.
        codebook_size: centres per level; fewer are used where fewer vectors are different.
        seed: of the k-means starts.

    Returns:
        int32 [items, levels + 1]; the last column is 0 for every item that is alone with its codes.

    Raises:
        ValueError: a wrong shape, no items, a vector that is not finite, a size below 1.
    """
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    residual = np.array(embeddings, dtype=np.float32)
    if residual.ndim != 2 or residual.size == 0:
        raise ValueError(f"embeddings must be [items, d] and not empty, got {residual.shape}")
    if not np.isfinite(residual).all():
        row = int(np.flatnonzero(~np.isfinite(residual).all(axis=1))[0])
        raise ValueError(f"embeddings[{row}] is not finite")
    if levels < 1 or codebook_size < 1:
        raise ValueError(
            f"levels = {levels} and codebook_size = {codebook_size} must be at least 1"
        )
    codes = np.zeros((len(residual), levels + 1), dtype=np.int32)
    for level in range(levels):
        distinct = np.unique(residual, axis=0)
        if len(distinct) <= codebook_size:
            # As many centres as vectors: each its own, nothing is left for the next level.
            codes[:, level] = np.unique(residual, axis=0, return_inverse=True)[1].reshape(-1)
            residual[:] = 0.0
            continue
        model = MiniBatchKMeans(
            codebook_size, random_state=seed + level, n_init=3, batch_size=4096, max_iter=100
        )
        # Sums split over threads round differently: one thread makes the codes the same everywhere.
        with threadpool_limits(1):
            codes[:, level] = model.fit(residual).predict(residual)
        residual -= model.cluster_centers_[codes[:, level]]
    codes[:, levels] = _number_within_group(codes[:, :levels])
    return codes


def _number_within_group(codes: np.ndarray) -> np.ndarray:
    """int32 [items]: 0, 1, 2, ... among the rows that are equal, in row order."""
    group = np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(group, kind="stable")
    first = np.searchsorted(group[order], group[order])
    number = np.empty(len(codes), dtype=np.int32)
    number[order] = np.arange(len(codes)) - first
    return number


def text_embeddings(texts: list[str], dim: int = 64, seed: int = 0) -> np.ndarray:
    """Vectors of item texts: TF-IDF of words and word pairs, reduced by truncated SVD.

    Args:
        texts: one text per item, e.g. title and categories.
        dim: width of the vectors; fewer where texts or words are too few (then padded with zeros).
        seed: of the SVD.

    Returns:
        float32 [items, dim], each row of length 1 (or 0 for a text without known words).

    Raises:
        ValueError: no text has a word.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    table = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True).fit_transform(texts)
    width = min(dim, min(table.shape) - 1)
    vectors = np.zeros((len(texts), dim), dtype=np.float32)
    if width >= 1:
        vectors[:, :width] = TruncatedSVD(width, random_state=seed).fit_transform(table)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, np.finfo(np.float32).tiny)
