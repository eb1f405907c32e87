"""Collaborative models: the contract of ``score``, shared by all, and what each computes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from gflowgr.collaborative import (
    CollaborativeModel,
    EmbeddingScorer,
    Popularity,
    SASRec,
    SASRecConfig,
)
from gflowgr.collaborative.sasrec import catalogue_cross_entropy, sampled_cross_entropy
from gflowgr.data import pad_histories
from gflowgr.errors import DataError

NUM_ITEMS = 23
CONFIG = SASRecConfig(num_items=NUM_ITEMS, d_model=16, d_ff=32, max_length=6, dropout=0.4)
KINDS = ["sasrec", "embedding", "popularity"]


def make(kind: str) -> SASRec | EmbeddingScorer | Popularity:
    torch.manual_seed(0)
    if kind == "sasrec":
        model = SASRec(CONFIG)
        for parameter in model.parameters():  # larger than at initialisation, so effects show
            torch.nn.init.normal_(parameter, std=0.3)
        model.empty_scores.copy_(torch.arange(NUM_ITEMS))
        return model
    if kind == "embedding":
        return EmbeddingScorer(torch.randn(NUM_ITEMS, 8))
    return Popularity(np.arange(NUM_ITEMS)[::-1].copy())


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> SASRec | EmbeddingScorer | Popularity:
    return make(request.param)


HISTORIES = pad_histories([np.array([3, 1, 2]), np.array([], int), np.array([5])])


def test_full_scores_and_chosen_items_agree(model: CollaborativeModel) -> None:
    items = torch.tensor([[0, 22], [7, 7], [3, 4]])
    full = model.score(HISTORIES, None)
    assert full.shape == (3, NUM_ITEMS)
    assert full.dtype == torch.float32
    torch.testing.assert_close(model.score(HISTORIES, items), full.gather(1, items))
    assert isinstance(model, CollaborativeModel)


def test_scores_are_deterministic_and_finite_even_in_training_mode(
    model: CollaborativeModel,
) -> None:
    if isinstance(model, SASRec):
        model.train()
    first = model.score(HISTORIES, None)
    assert torch.isfinite(first).all()
    assert not first.requires_grad
    assert torch.equal(first, model.score(HISTORIES, None))


def test_padding_changes_nothing(model: CollaborativeModel) -> None:
    wide = F.pad(HISTORIES, (0, 9), value=-1)
    torch.testing.assert_close(model.score(wide, None), model.score(HISTORIES, None))
    alone = model.score(HISTORIES[2:, :1], None)
    torch.testing.assert_close(alone[0], model.score(HISTORIES, None)[2])


def test_no_rows_at_all(model: CollaborativeModel) -> None:
    assert model.score(torch.empty(0, 3, dtype=torch.int64), None).shape == (0, NUM_ITEMS)
    assert model.score(torch.empty(2, 0, dtype=torch.int64), None).shape == (2, NUM_ITEMS)


@pytest.mark.parametrize(
    ("histories", "items", "message"),
    [
        (torch.tensor([1, 2]), None, "histories must be an int64 tensor of two dimensions"),
        (torch.tensor([[0.5]]), None, "torch.float32"),
        (torch.tensor([[1, NUM_ITEMS]]), None, r"histories\[0, 1\] must be an item id, .*; got 23"),
        (torch.tensor([[1, -2]]), None, r"histories\[0, 1\] must be an item id, .*; got -2"),
        (torch.tensor([[1, 2], [-1, 4]]), None, r"histories\[1\] = \[-1, 4\]: padding"),
        (
            torch.tensor([[1]]),
            torch.tensor([[-1]]),
            r"items\[0, 0\] must be an item id, .*; got -1",
        ),
        (torch.tensor([[1]]), torch.tensor([[1], [2]]), "items has 2 rows, histories has 1"),
    ],
)
def test_bad_input_is_named(
    model: CollaborativeModel,
    histories: torch.Tensor,
    items: torch.Tensor | None,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        model.score(histories, items)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_model_scores_the_same(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    model.save(tmp_path / "m")
    loaded = type(model).load(tmp_path / "m")
    assert torch.equal(loaded.score(HISTORIES, None), model.score(HISTORIES, None))
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_broken_saved_models_are_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        SASRec.load(tmp_path)
    model = make("sasrec")
    assert isinstance(model, SASRec)
    model.save(tmp_path)
    with pytest.raises(DataError, match="must be 'embedding'; got 'sasrec'"):
        EmbeddingScorer.load(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a readable safetensors file"):
        SASRec.load(tmp_path)
    weights.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "d_model": 32}))
    with pytest.raises(DataError, match="do not agree"):
        SASRec.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "kind": "other"}))
    with pytest.raises(DataError, match="must be 'sasrec'; got 'other'"):
        SASRec.load(tmp_path)


# ---- SASRec ----


def packed(sequences: list[list[int]]) -> dict[str, torch.Tensor]:
    """One sequence a row, every position a target."""
    inputs = pad_histories([np.array(s[:-1]) for s in sequences])
    targets = pad_histories([np.array(s[1:]) for s in sequences])
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    return {
        "items": inputs,
        "positions": positions,
        "segments": (inputs >= 0).long(),
        "targets": targets,
    }


def test_sasrec_state_depends_on_past_items_only() -> None:
    model = make("sasrec")
    assert isinstance(model, SASRec)
    model.eval()
    one, two = torch.tensor([[4, 9, 2, 7]]), torch.tensor([[4, 9, 11, 0]])
    places = torch.arange(4)
    hidden = [model._encode(items, places, None, 0.0)[0] for items in (one, two)]
    torch.testing.assert_close(hidden[0][:2], hidden[1][:2])
    assert (hidden[0][2:] - hidden[1][2:]).abs().amax(1).min() > 1e-3


def test_sasrec_training_positions_see_what_scoring_sees() -> None:
    """The loss of a packed row equals the cross-entropy of ``score`` on every prefix."""
    model = make("sasrec")
    assert isinstance(model, SASRec)
    model.eval()
    sequences = [[4, 9, 2, 7], [1, 3], [8, 8, 5]]
    # The first and second sequence share a row, told apart by their segments.
    batch = {
        "items": torch.tensor([[4, 9, 2, 1], [8, 8, -1, -1]]),
        "positions": torch.tensor([[0, 1, 2, 0], [0, 1, 0, 0]]),
        "segments": torch.tensor([[0, 0, 0, 1], [0, 0, -1, -1]]),
        "targets": torch.tensor([[9, 2, 7, 3], [8, 5, -1, -1]]),
    }
    losses = []
    for sequence in sequences:
        for end in range(1, len(sequence)):
            scores = model.score(torch.tensor([sequence[:end]]), None)
            losses.append(F.cross_entropy(scores, torch.tensor([sequence[end]])))
    assert len(losses) == 6
    torch.testing.assert_close(model(**batch)["loss"], torch.stack(losses).mean())


def test_sasrec_keeps_the_last_items_of_a_long_history() -> None:
    model = make("sasrec")
    long = torch.tensor([[9, 8, 7, 1, 2, 3, 4, 5, 6], [5, 2, -1, -1, -1, -1, -1, -1, -1]])
    scores = model.score(long, None)
    torch.testing.assert_close(scores[0], model.score(long[:1, 3:], None)[0])
    torch.testing.assert_close(scores[1], model.score(long[1:, :2], None)[0])


def test_sasrec_scores_an_empty_history_by_popularity() -> None:
    scores = make("sasrec").score(HISTORIES, None)
    assert torch.equal(scores[1], torch.arange(NUM_ITEMS).float())


def test_sasrec_learns_a_deterministic_pattern() -> None:
    """Item i is followed by i + 1 or, in every other sequence, by i + 2 (mod 12)."""
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(num_items=12, d_model=32, d_ff=64, max_length=8, dropout=0.0))
    rows = [
        [(start + step * place) % 12 for place in range(6)]
        for start in range(12)
        for step in (1, 2)
    ]
    batch = packed(rows)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    # From two items on, the step is known and so is the next item.
    histories = torch.tensor([row[:4] for row in rows])
    wanted = torch.tensor([row[4] for row in rows])
    assert torch.equal(model.score(histories, None).argmax(1), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_items": 0}, "num_items must be a positive integer; got 0"),
        ({"num_heads": 3}, "num_heads = 3 does not divide d_model = 64"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\); got 1.0"),
        ({"negatives": -1}, "negatives must be an integer >= 0; got -1"),
    ],
)
def test_bad_sizes_are_named(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SASRecConfig(**{"num_items": 5, **change})  # type: ignore[arg-type]


# ---- losses ----


@given(st.integers(1, 40), st.integers(2, 3000), st.integers(0, 2**31))
def test_catalogue_cross_entropy_equals_the_plain_one(rows: int, items: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 4, generator=generator, requires_grad=True)
    weight = torch.randn(items, 4, generator=generator, requires_grad=True)
    targets = torch.randint(0, items, (rows,), generator=generator)
    outcomes = []
    for loss in (
        catalogue_cross_entropy(hidden, weight, targets),
        F.cross_entropy(hidden @ weight.t(), targets),
    ):
        outcomes.append((loss, *torch.autograd.grad(3 * loss, [hidden, weight])))
    for ours, plain in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_catalogue_cross_entropy_does_not_overflow(scale: float) -> None:
    hidden, weight = scale * torch.randn(5, 4), scale * torch.randn(9, 4)
    targets = torch.arange(5)
    torch.testing.assert_close(
        catalogue_cross_entropy(hidden, weight, targets),
        F.cross_entropy(hidden @ weight.t(), targets),
    )


def test_no_targets_give_loss_zero_and_gradient_zero() -> None:
    hidden, weight = torch.randn(0, 4), torch.randn(9, 4, requires_grad=True)
    targets = torch.empty(0, dtype=torch.int64)
    for loss in (
        catalogue_cross_entropy(hidden, weight, targets),
        sampled_cross_entropy(hidden, weight, targets, torch.arange(3)),
    ):
        assert loss.item() == 0.0
        assert not torch.autograd.grad(loss, weight)[0].any()


def test_weights_multiply_the_losses_of_their_rows() -> None:
    hidden, weight, targets = torch.randn(7, 4), torch.randn(9, 4), torch.arange(7)
    weights = torch.rand(7)
    expected = (weights * F.cross_entropy(hidden @ weight.t(), targets, reduction="none")).mean()
    torch.testing.assert_close(catalogue_cross_entropy(hidden, weight, targets, weights), expected)
    every = torch.arange(9)
    torch.testing.assert_close(
        sampled_cross_entropy(hidden, weight, targets, every, weights), expected
    )


def test_sampled_cross_entropy_with_every_item_is_the_full_one() -> None:
    hidden, weight, targets = torch.randn(7, 4), torch.randn(9, 4), torch.arange(7)
    torch.testing.assert_close(
        sampled_cross_entropy(hidden, weight, targets, torch.arange(9)),
        F.cross_entropy(hidden @ weight.t(), targets),
    )


def test_sampled_normaliser_is_unbiased() -> None:
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(1, 4), torch.randn(50, 4), torch.tensor([3])
    logits = (hidden @ weight.t())[0]
    draws = torch.randint(0, 50, (4000, 10))
    estimates = [
        (sampled_cross_entropy(hidden, weight, target, row) + logits[3]).exp() for row in draws
    ]
    exact = logits.exp().sum()
    spread = torch.stack(estimates).std() / math.sqrt(len(draws))
    assert abs(torch.stack(estimates).mean() - exact) < 4 * spread


def test_sasrec_with_sampled_negatives_trains() -> None:
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(num_items=40, d_model=16, d_ff=32, dropout=0.0, negatives=8))
    batch = packed([[(start + place) % 40 for place in range(6)] for start in range(40)])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    best = model.score(torch.arange(40)[:, None], None).argmax(1)
    assert (best == (torch.arange(40) + 1) % 40).float().mean() > 0.95


# ---- the simple scorers ----


def test_embedding_scorer_is_the_mean_cosine() -> None:
    table = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    scores = EmbeddingScorer(table).score(torch.tensor([[4, 2, 2]]), None)[0]
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    expected = [np.mean([unit[item] @ unit[past] for past in (4, 2, 2)]) for item in range(6)]
    np.testing.assert_allclose(scores, expected, atol=1e-6)


def test_embedding_scorer_reads_a_file_and_names_what_is_wrong(tmp_path: Path) -> None:
    np.save(tmp_path / "good.npy", np.ones((4, 2), np.float32))
    assert EmbeddingScorer.from_file(tmp_path / "good.npy").num_items == 4
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ValueError, match=r"bad\.npy: not a readable"):
        EmbeddingScorer.from_file(tmp_path / "bad.npy")
    with pytest.raises(ValueError, match=r"table\[1\] holds a value that is not finite"):
        EmbeddingScorer(np.array([[1.0], [np.nan]], np.float32))
    with pytest.raises(ValueError, match="floating-point matrix"):
        EmbeddingScorer(np.ones((4, 2), np.int64))


def test_popularity_orders_by_count_whatever_the_history() -> None:
    scores = Popularity(np.array([2, 9, 0, 4])).score(HISTORIES.clamp_max(3), None)
    assert scores.argsort(1, descending=True).tolist() == [[1, 3, 0, 2]] * 3
    with pytest.raises(ValueError, match="counts must be finite and not negative"):
        Popularity(np.array([1.0, -1.0]))


def test_pad_histories() -> None:
    padded = pad_histories([np.array([5, 6, 7]), np.array([], np.int64)], max_length=2)
    assert padded.tolist() == [[6, 7], [-1, -1]]
    assert pad_histories([]).shape == (0, 1)
