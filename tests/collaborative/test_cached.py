"""Scores of all examples in a file: what it holds, and when it is made anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_shop import make_scorer, shop

from gflowgr.collaborative import CachedScores, Popularity
from gflowgr.data import pad_histories


class Counting:
    """A collaborative model that counts how many histories it was asked to score."""

    num_items = 200

    def __init__(self, scale: float = 1.0) -> None:
        self.scale, self.asked = scale, 0

    def score(self, histories: torch.Tensor, items: torch.Tensor | None = None) -> torch.Tensor:
        self.asked += len(histories)
        return self.scale * make_scorer().score(histories, items)


def cached(folder: Path, model: object, max_bytes: float = 1e9) -> CachedScores:
    return CachedScores(
        model,  # type: ignore[arg-type]
        shop().train,
        folder,
        max_history=8,
        max_bytes=max_bytes,
        progress=False,
    )


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_rows_are_the_standardised_scores(scale: float, tmp_path: Path) -> None:
    examples = torch.tensor([700, 3, 3, 1200])
    found = cached(tmp_path, Counting(scale)).rows(examples)
    histories = pad_histories([shop().train[i]["history"] for i in examples.tolist()])
    scores = make_scorer().score(histories, None)
    std, mean = torch.std_mean(scores, dim=1, keepdim=True, correction=0)
    torch.testing.assert_close(found, (scores - mean) / std, atol=2e-3, rtol=2e-3)
    assert found.dtype == torch.float32


def test_equal_scores_are_all_zero(tmp_path: Path) -> None:
    rows = cached(tmp_path, Popularity(np.full(200, 7))).rows(torch.tensor([0, 5]))
    assert not rows.any()


def test_each_example_is_scored_once_for_all_runs(tmp_path: Path) -> None:
    first, again = Counting(), Counting()
    cached(tmp_path, first)
    assert first.asked == len(shop().train) + 64  # the probe
    scores = cached(tmp_path, again)
    scores.rows(torch.arange(500))
    assert again.asked == 64


def test_another_model_or_a_broken_file_is_scored_anew(tmp_path: Path) -> None:
    cached(tmp_path, Counting())
    other = Counting(-1.0)
    cached(tmp_path, other)
    assert other.asked == len(shop().train) + 64
    (tmp_path / "scores.json").write_text("{")
    again = Counting(-1.0)
    cached(tmp_path, again)
    assert again.asked == len(shop().train) + 64


def test_what_cannot_be_cached_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"take 0\.00 GiB, more than the 0\.00 GiB allowed"):
        cached(tmp_path, Counting(), max_bytes=100)
    with pytest.raises(ValueError, match="scores of example 0 are not finite"):
        cached(tmp_path, Counting(float("nan")))
    assert not (tmp_path / "scores.npy").exists()
