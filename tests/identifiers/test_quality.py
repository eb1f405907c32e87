"""Measures of identifiers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gflowgr.identifiers import from_codes, measure_quality, nearest_neighbours, quality_table
from gflowgr.identifiers.plots import plot_agreement, plot_code_use

CODES = np.array([[0, 0], [0, 1], [0, 1], [1, 0], [1, 2], [1, 2], [1, 2], [2, -1]])


def test_collisions_codes_and_prefixes_are_counted() -> None:
    got = measure_quality(from_codes(CODES))
    assert (got.items, got.levels) == (8, 2)
    assert (got.sharing, got.groups, got.largest_group) == (5, 2, 3)
    assert got.collision_rate == 5 / 8
    assert got.codes_used == (3, 3)
    assert got.prefixes == (3, 5)
    assert got.frequencies == ((4, 3, 1), (3, 2, 2))


def test_perplexity_is_the_number_of_equally_frequent_tokens() -> None:
    got = measure_quality(from_codes(np.array([[0, 0], [1, 0], [2, 0], [3, 1]])))
    assert got.perplexity[0] == pytest.approx(4)
    assert got.perplexity[1] == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))


def test_agreement_is_the_share_of_neighbours_with_the_same_tokens() -> None:
    codes = from_codes(np.array([[0, 0], [0, 0], [0, 1], [1, 0]]))
    near = np.array([[1, 2], [0, 3], [3, 0], [0, 1]])
    got = measure_quality(codes, {"text": near}).agreement["text"]
    # Same first token: items 0: both, 1: one, 2: one, 3: none. Same two tokens: 0: one, 1: one.
    assert got.neighbours == (4 / 8, 2 / 8)
    # Of the 12 ordered pairs, 6 share the first token, and 2 both.
    assert got.chance == (6 / 12, 2 / 12)


def test_random_identifiers_agree_by_chance() -> None:
    rng = np.random.default_rng(0)
    near = nearest_neighbours(rng.normal(size=(1500, 4)), 10)
    got = measure_quality(from_codes(rng.integers(0, 5, size=(1500, 2))), {"x": near})
    shares, chances = got.agreement["x"].neighbours, got.agreement["x"].chance
    assert shares == pytest.approx(chances, abs=0.02)


def test_neighbours_are_those_of_the_greatest_cosine() -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 3))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    expected = np.argsort(-cosine, axis=1)[:, :5]
    np.testing.assert_array_equal(nearest_neighbours(vectors * 7, 5), expected)


def test_ties_go_to_the_smaller_item() -> None:
    vectors = np.array([[1.0, 0], [2.0, 0], [3.0, 0], [0, 1.0], [0, 0]])
    assert nearest_neighbours(vectors, 3).tolist() == [
        [1, 2, 3],
        [0, 2, 3],
        [0, 1, 3],
        [0, 1, 2],
        [0, 1, 2],
    ]
    assert nearest_neighbours(vectors[:1], 3).shape == (1, 0)


def test_measures_as_table_json_and_plots(tmp_path: Path) -> None:
    near = {"text": nearest_neighbours(np.random.default_rng(0).normal(size=(8, 3)), 2)}
    rows = {"mine": measure_quality(from_codes(CODES), near)}
    rows["other"] = measure_quality(from_codes(np.arange(8)[:, None]), near)
    table = quality_table(rows)
    assert "5 (62.50%)" in table
    assert "0 (0.00%)" in table
    assert quality_table(rows, style="markdown").startswith("| identifiers | sharing |")
    assert json.loads(json.dumps(rows["mine"].to_json()))["collision_rate"] == 0.625
    plot_code_use(rows, tmp_path / "use.png")
    assert plot_agreement(rows, tmp_path / "agreement.png")
    for name in ("use.png", "agreement.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    plain = {"mine": measure_quality(from_codes(CODES))}
    assert not plot_agreement(plain, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="k must be at least 1; got 0"):
        nearest_neighbours(np.eye(3), 0)
    with pytest.raises(ValueError, match=r"neighbours\['cf'\] has 3 rows, there are 8 items"):
        measure_quality(from_codes(CODES), {"cf": np.zeros((3, 1), int)})
    with pytest.raises(ValueError, match="rows must not be empty"):
        quality_table({})
    with pytest.raises(ValueError, match="style must be"):
        quality_table({"x": measure_quality(from_codes(CODES))}, style="latex")
