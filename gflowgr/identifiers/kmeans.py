"""Identifiers by residual k-means over item vectors."""

from __future__ import annotations

import numpy as np

from gflowgr.identifiers.quantisation import Quantisation, checked_vectors, number_within_group
from gflowgr.progress import progress_bar


def residual_kmeans(
    embeddings: np.ndarray,
    levels: int = 3,
    codebook_size: int = 256,
    seed: int = 0,
    *,
    progress: bool = False,
) -> np.ndarray:
    """Code each item by the nearest centre, then its residual by the nearest centre of the next
    level.

    Items whose codes are all the same are told apart by one more token, their number within the
    group in the order of item ids: no two items share an identifier. Equal arguments give equal
    codes.

    Args:
        embeddings: float [items, d], finite.
        levels: number of k-means levels.
        codebook_size: centres per level; fewer are used where fewer vectors are different.
        seed: of the k-means starts.
        progress: show a progress bar.

    Returns:
        int32 [items, levels + 1]; the last column is 0 for every item that is alone with its codes.

    Raises:
        ValueError: a wrong shape, no items, a vector that is not finite, a size below 1.
    """
    codes = fit_kmeans(embeddings, levels, codebook_size, seed, progress=progress).codes
    return np.column_stack([codes, number_within_group(codes)])


def fit_kmeans(
    embeddings: np.ndarray,
    levels: int = 4,
    codebook_size: int = 256,
    seed: int = 0,
    *,
    progress: bool = False,
) -> Quantisation:
    """Residual k-means: each level is a k-means of what the levels before left over.

    Arguments and errors are those of :func:`residual_kmeans`.

    Returns:
        The quantisation of the vectors themselves; items may share all their codes.
    """
    vectors = checked_vectors(embeddings, "embeddings")
    if levels < 1 or codebook_size < 1:
        raise ValueError(
            f"levels and codebook_size must be at least 1; got {levels} and {codebook_size}"
        )
    residual = vectors.copy()
    codes = np.zeros((len(vectors), levels), dtype=np.int32)
    codebooks = np.zeros((levels, codebook_size, vectors.shape[1]), dtype=np.float32)
    bar = progress_bar(
        range(levels), desc="k-means", unit="level", disable=not progress, leave=False
    )
    for level in bar:
        codes[:, level], codebooks[level] = fit_centres(residual, codebook_size, seed + level)
        residual -= codebooks[level, codes[:, level]]
    return Quantisation(vectors, codebooks, codes)


def fit_centres(vectors: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One k-means (mini-batch, k-means++ starts), the same for any number of threads.

    Args:
        vectors: float32 [n, d], finite.
        count: centres K.
        seed: of the starts.

    Returns:
        The nearest centre of each vector, int32 [n], and the centres, float32 [K, d]. With no more
        than K different vectors each is its own centre, in sorted order, and the spare centres are
        zero.
    """
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    distinct, of_vector = np.unique(vectors, axis=0, return_inverse=True)
    centres = np.zeros((count, vectors.shape[1]), dtype=np.float32)
    if len(distinct) <= count:
        centres[: len(distinct)] = distinct
        return of_vector.reshape(-1).astype(np.int32), centres
    model = MiniBatchKMeans(count, random_state=seed, n_init=3, batch_size=4096, max_iter=100)
    # Sums split over threads round differently: one thread makes the codes the same everywhere.
    with threadpool_limits(1):
        codes = model.fit(vectors).predict(vectors)
    centres[:] = model.cluster_centers_
    return codes.astype(np.int32), centres
