"""How items with equal codes get distinct identifiers, or share one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gflowgr.identifiers import Quantisation, fit_kmeans, from_codes, resolve_collisions


def quantised(items: int, levels: int, size: int, seed: int, crowd: int) -> Quantisation:
    """Random vectors and codebooks; items take the nearest of the first ``crowd`` codes."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(items, 3)).astype(np.float32)
    vectors[rng.random(items) < 0.3] = vectors[0]  # equal vectors, too
    codebooks = rng.normal(size=(levels, size, 3)).astype(np.float32)
    rest, codes = vectors.copy(), np.zeros((items, levels), np.int32)
    for level, codebook in enumerate(codebooks):
        distance = ((rest[:, None] - codebook[None, :crowd]) ** 2).sum(axis=2)
        codes[:, level] = distance.argmin(axis=1)
        rest -= codebook[codes[:, level]]
    return Quantisation(vectors, codebooks, codes)


crowded = st.builds(
    quantised,
    items=st.integers(1, 27),
    levels=st.just(3),
    size=st.just(3),
    seed=st.integers(0, 1000),
    crowd=st.integers(1, 3),
)


@given(crowded)
def test_reassigned_identifiers_are_unique_up_to_the_last_one_there_is(q: Quantisation) -> None:
    codes = resolve_collisions(q, "reassign")
    assert from_codes(codes).num_unique() == len(codes)
    assert codes.min() >= 0
    assert codes.max() < 3
    np.testing.assert_array_equal(codes, resolve_collisions(q, "reassign"))


@given(crowded)
def test_reassigning_moves_no_item_without_need(q: Quantisation) -> None:
    codes = resolve_collisions(q, "reassign")
    moved = (codes != q.codes).any(axis=1)
    _, group, sizes = np.unique(q.codes, axis=0, return_inverse=True, return_counts=True)
    if sizes.max() <= 1:
        assert not moved.any()
    # At most one item keeps an identifier that several had; a nearest one, where its prefix has
    # room for all of them.
    prefix_sizes = np.unique(q.codes[:, :2], axis=0, return_counts=True)[1]
    distance = (q.residuals(3) ** 2).sum(axis=1)
    for group_id in np.unique(group):
        here = group.reshape(-1) == group_id
        stayed = distance[here & ~moved]
        assert len(stayed) <= 1
        if prefix_sizes.max() <= 3:
            assert stayed == pytest.approx(distance[here].min(), rel=1e-4, abs=1e-5)


@given(crowded)
def test_an_extra_token_tells_items_apart_and_keeps_their_codes(q: Quantisation) -> None:
    codes = resolve_collisions(q, "extra")
    assert from_codes(codes).num_unique() == len(codes)
    np.testing.assert_array_equal(codes[:, :3], q.codes)
    alone = np.unique(q.codes, axis=0, return_index=True, return_counts=True)
    assert (codes[alone[1][alone[2] == 1], 3] == 0).all()


def test_the_nearest_item_keeps_the_code_and_the_others_take_the_nearest_free_one() -> None:
    codebooks = np.array([[[0.0]] * 3, [[0.0], [3.0], [-1.0]]], dtype=np.float32)
    vectors = np.array([[0.4], [0.1], [-0.3]], dtype=np.float32)
    q = Quantisation(vectors, codebooks, np.zeros((3, 2), np.int32))
    # Item 1 is nearest to code 0; item 2 is nearest to code 2 (-1); item 0 is left with code 1 (3).
    assert resolve_collisions(q, "reassign").tolist() == [[0, 1], [0, 0], [0, 2]]


def test_too_many_items_below_a_prefix_widen_the_level_above() -> None:
    # Five items share prefix 0, which has room for three: the two farthest move to prefix 1.
    codebooks = np.array([[[0.0], [10.0], [20.0]], [[-1.0], [0.0], [1.0]]], dtype=np.float32)
    vectors = np.array([[0.0], [4.0], [0.5], [-0.5], [3.0]], dtype=np.float32)
    q = Quantisation(vectors, codebooks, np.array([[0, 1], [0, 2], [0, 1], [0, 1], [0, 2]]))
    codes = resolve_collisions(q, "reassign")
    assert codes[:, 0].tolist() == [0, 1, 0, 0, 1]
    assert from_codes(codes).num_unique() == 5


def test_items_that_share_stay_as_they_are() -> None:
    q = quantised(20, 2, 3, seed=0, crowd=1)
    codes = resolve_collisions(q, "shared")
    np.testing.assert_array_equal(codes, q.codes)
    assert from_codes(codes).num_unique() == 1


def test_equal_vectors_of_kmeans_find_room() -> None:
    q = fit_kmeans(np.ones((60, 4)), levels=2, codebook_size=8)
    assert from_codes(resolve_collisions(q, "reassign")).num_unique() == 60


def test_more_items_than_identifiers() -> None:
    q = quantised(28, 3, 3, seed=0, crowd=3)
    with pytest.raises(ValueError, match=r"28 items .* 3 tokens of 3 codes") as caught:
        resolve_collisions(q, "reassign")
    for way in ("codebook_size = 4 or more", "levels = 4 or more", '"extra" or "shared"'):
        assert way in str(caught.value)
    assert len(resolve_collisions(q, "extra")) == 28


def test_an_unknown_way() -> None:
    with pytest.raises(ValueError, match=r"collisions must be one of .*; got 'drop'"):
        resolve_collisions(quantised(4, 2, 3, 0, 1), "drop")  # type: ignore[arg-type]
