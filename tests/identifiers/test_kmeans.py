"""Residual k-means identifiers."""

from __future__ import annotations

import numpy as np
import pytest

from gflowgr.identifiers import from_codes, residual_kmeans, text_embeddings


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 8)) * 10
    return (np.repeat(centres, 50, axis=0) + rng.normal(size=(300, 8))).astype(np.float32)


def test_codes_are_unique_small_and_reproducible(vectors: np.ndarray) -> None:
    codes = residual_kmeans(vectors, levels=2, codebook_size=6, seed=1)
    assert codes.shape == (300, 3)
    assert codes.dtype == np.int32
    assert codes[:, :2].max() <= 5
    assert from_codes(codes).num_unique() == 300
    np.testing.assert_array_equal(
        codes, residual_kmeans(vectors, levels=2, codebook_size=6, seed=1)
    )


def test_the_first_token_finds_the_clusters(vectors: np.ndarray) -> None:
    first = residual_kmeans(vectors, levels=2, codebook_size=6, seed=0)[:, 0].reshape(6, 50)
    assert all(len(set(cluster.tolist())) == 1 for cluster in first)
    assert len(set(first[:, 0].tolist())) == 6


def test_more_levels_leave_a_smaller_residual(vectors: np.ndarray) -> None:
    def spread(codes: np.ndarray) -> float:
        """Mean squared distance of items to the mean of the items with the same codes."""
        group = np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)
        means = np.stack([vectors[group == g].mean(axis=0) for g in range(group.max() + 1)])
        return float(((vectors - means[group]) ** 2).sum(axis=1).mean())

    codes = residual_kmeans(vectors, levels=3, codebook_size=6)
    one, two, three = (spread(codes[:, :n]) for n in (1, 2, 3))
    assert one > two > three


def test_the_last_token_numbers_items_with_the_same_codes() -> None:
    same = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    codes = residual_kmeans(same, levels=2, codebook_size=8)
    assert codes[:, -1].tolist() == [0, 0, 1, 2]
    assert codes[0, 0] == codes[2, 0] == codes[3, 0] != codes[1, 0]


@pytest.mark.parametrize(
    ("embeddings", "options", "message"),
    [
        (np.zeros(3), {}, r"must be \[items, d\]"),
        (np.zeros((0, 3)), {}, r"must be \[items, d\]"),
        (np.array([[0.0], [np.nan]]), {}, r"embeddings\[1\] is not finite"),
        (np.zeros((3, 2)), {"levels": 0}, "levels and codebook_size must be at least 1; got 0 and"),
        (np.zeros((3, 2)), {"codebook_size": 0}, "must be at least 1; got . and 0"),
    ],
)
def test_bad_arguments(embeddings: np.ndarray, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        residual_kmeans(embeddings, **options)


def test_texts_of_one_kind_are_close() -> None:
    kinds = ["red nail polish", "steel frying pan", "acoustic guitar strings"]
    texts = [f"{kind} number {i}" for kind in kinds for i in range(8)]
    vectors = text_embeddings(texts, dim=8)
    assert vectors.shape == (24, 8)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    cosine = vectors @ vectors.T
    same = np.kron(np.eye(3), np.ones((8, 8))).astype(bool)
    assert cosine[same].min() > cosine[~same].max()


def test_few_texts_are_padded_with_zeros() -> None:
    assert text_embeddings(["a red pan", "a blue pan"], dim=16).shape == (2, 16)
