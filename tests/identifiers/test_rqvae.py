"""RQ-VAE and LETTER: each loss against its formula in float64, and what training does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gflowgr.identifiers import (
    LetterConfig,
    Quantisation,
    RqVaeConfig,
    fit_letter,
    fit_rqvae,
    learn_codes,
)
from gflowgr.identifiers.letter import alignment_loss, diversity_loss, draw_positives
from gflowgr.identifiers.rqvae import Coded, RqVae, quantisation_loss, revive_codes, standardised

SMALL: dict[str, Any] = {
    "levels": 3,
    "codebook_size": 8,
    "code_width": 4,
    "hidden": (16,),
    "steps": 120,
    "batch_size": 64,
    "learning_rate": 1e-2,
}


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Items of 8 kinds; a faint last number tells of which of two sorts an item is."""
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(8, 12)) * 4
    items = np.repeat(kinds, 25, axis=0) + rng.normal(size=(200, 12))
    items[:, -1] = np.tile([1.0, -1.0], 100)
    return items.astype(np.float32)


@pytest.fixture(scope="module")
def collaborative() -> np.ndarray:
    """Vectors that follow the sort (every second item is of the same) and not the kind."""
    rng = np.random.default_rng(1)
    return (np.tile([[3.0] * 4, [-3.0] * 4], (100, 1)) + rng.normal(size=(200, 4))).astype(
        np.float32
    )


def small_model() -> RqVae:
    rng = torch.Generator().manual_seed(0)
    model = RqVae(12, RqVaeConfig(**SMALL), rng)
    model.codebooks.data.normal_(generator=rng)
    return model


# ---- losses ----


def test_quantisation_loss_is_its_formula() -> None:
    rng = np.random.default_rng(0)
    r, e = rng.normal(size=(2, 3, 5, 4))  # [L, B, d] each
    residuals = torch.tensor(r, requires_grad=True)
    chosen = torch.tensor(e, requires_grad=True)
    loss = quantisation_loss(residuals, chosen, 0.25)
    one_level = [((r[level] - e[level]) ** 2).mean() for level in range(3)]
    assert loss.item() == pytest.approx(1.25 * sum(one_level), rel=1e-12)
    loss.backward()
    # The codebook term moves codes only, the commitment term the encoder only.
    np.testing.assert_allclose(chosen.grad, 2 * (e - r) / 20, rtol=1e-12)
    np.testing.assert_allclose(residuals.grad, 0.25 * 2 * (r - e) / 20, rtol=1e-12)


def test_alignment_loss_is_its_formula() -> None:
    rng = np.random.default_rng(0)
    q, h = rng.normal(size=(2, 6, 4))
    scores = q @ h.T
    expected = -np.mean([scores[i, i] - np.log(np.exp(scores[i]).sum()) for i in range(6)])
    assert alignment_loss(torch.tensor(q), torch.tensor(h)).item() == pytest.approx(expected)


def test_diversity_loss_is_its_formula() -> None:
    codebook = np.random.default_rng(0).normal(size=(5, 3))
    codes, positives = [0, 3, 3, 2], [1, 4, -1, 0]
    expected = []
    for code, positive in zip(codes, positives, strict=True):
        others = [np.exp(codebook[code] @ codebook[j]) for j in range(5) if j != code]
        if positive >= 0:
            expected.append(-codebook[code] @ codebook[positive] + np.log(sum(others)))
    loss = diversity_loss(torch.tensor(codes), torch.tensor(positives), torch.tensor(codebook))
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-12)
    nobody = diversity_loss(torch.tensor([0]), torch.tensor([-1]), torch.tensor(codebook))
    assert nobody.item() == 0.0


def test_positives_are_all_the_other_codes_of_the_group() -> None:
    groups = torch.tensor([0, 1, 0, 2, 0, 1])
    codes = torch.arange(6).repeat(200)
    positives = draw_positives(codes, groups, torch.Generator().manual_seed(0))
    found = [set(positives[codes == code].tolist()) for code in range(6)]
    assert found == [{2, 4}, {5}, {0, 4}, {-1}, {0, 2}, {1}]


# ---- the quantiser ----


def test_each_level_codes_what_the_levels_before_left_over() -> None:
    model = small_model()
    latent = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    coded = model.quantise(latent)
    rest = latent.double().numpy()
    for level, codebook in enumerate(model.codebooks.detach().double().numpy()):
        np.testing.assert_allclose(coded.residuals[level].detach(), rest, atol=1e-5)
        nearest = ((rest[:, None] - codebook) ** 2).sum(axis=2).argmin(axis=1)
        assert coded.codes[level].tolist() == nearest.tolist()
        rest = rest - codebook[nearest]
    np.testing.assert_allclose(coded.quantised, latent.double().numpy() - rest, atol=1e-5)


def test_the_gradient_goes_straight_through() -> None:
    latent = torch.randn(5, 4, requires_grad=True)
    weights = torch.randn(5, 4)
    (small_model().quantise(latent).quantised * weights).sum().backward()
    torch.testing.assert_close(latent.grad, weights)


def test_dead_codes_move_to_items_far_from_their_code() -> None:
    model = small_model()
    optimiser = torch.optim.AdamW([model.codebooks])
    model.codebooks.sum().backward()
    optimiser.step()
    before = model.codebooks.detach().clone()
    residuals = torch.arange(24.0).reshape(1, 6, 4).expand(3, 6, 4) + 100
    chosen = residuals.clone()
    chosen[:, [1, 4]] += 5  # the only items with any distance to their code
    coded = Coded(torch.zeros(3, 6, dtype=torch.long), residuals, chosen, residuals[0])
    used = torch.ones(3, 8, dtype=torch.long)
    used[1, [2, 7]] = 0
    generator = torch.Generator().manual_seed(0)
    assert revive_codes(model.codebooks, used, coded, optimiser, generator) == 2
    now = model.codebooks.detach()
    assert {tuple(row.tolist()) for row in now[1, [2, 7]]} == {
        tuple(residuals[1, item].tolist()) for item in (1, 4)
    }
    assert (optimiser.state[model.codebooks]["exp_avg"][1, [2, 7]] == 0).all()
    now[1, [2, 7]] = before[1, [2, 7]]
    torch.testing.assert_close(now, before)


# ---- training ----


def codes_used(quantised: Quantisation) -> list[int]:
    return [len(np.unique(column)) for column in quantised.codes.T]


def test_training_reconstructs_and_uses_its_codes(vectors: np.ndarray) -> None:
    q = fit_rqvae(vectors, RqVaeConfig(**SMALL), seed=3)
    assert q.codes.shape == (200, 3)
    assert q.codes.dtype == np.int32
    assert q.history[-1]["reconstruction"] < 0.5 * q.history[0]["reconstruction"]
    assert codes_used(q) == [8, 8, 8]
    assert q.error() < 0.3
    # The first code tells the kinds apart: most items have that of their kind.
    kinds = q.codes[:, 0].reshape(8, 25)
    assert np.mean([np.bincount(kind).max() for kind in kinds]) > 18
    again = fit_rqvae(vectors, RqVaeConfig(**SMALL), seed=3)
    np.testing.assert_array_equal(q.codes, again.codes)
    other = fit_rqvae(vectors, RqVaeConfig(**SMALL), seed=4)
    assert (q.codes != other.codes).any()


def test_reviving_brings_codes_back(vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    # A start that puts all codes but one out of reach.
    def collapse(self: RqVae, vectors: torch.Tensor, seed: int) -> None:
        with torch.no_grad():
            self.codebooks.fill_(1e3)
            self.codebooks[:, 0] = 0.0

    monkeypatch.setattr(RqVae, "start_codebooks", collapse)
    settings = {**SMALL, "codebook_size": 6}
    dead = fit_rqvae(vectors, RqVaeConfig(**settings, revive=False))
    assert codes_used(dead) == [1, 1, 1]
    alive = fit_rqvae(vectors, RqVaeConfig(**settings))
    assert min(codes_used(alive)) >= 5


def test_balanced_levels_use_their_codes_equally(vectors: np.ndarray) -> None:
    q = fit_rqvae(vectors, RqVaeConfig(**SMALL, balanced="last"))
    last = np.bincount(q.codes[:, 2], minlength=8)
    assert last.min() >= 15  # 25 each
    assert last.max() <= 35


def test_letter_brings_the_collaborative_space_in(
    vectors: np.ndarray, collaborative: np.ndarray
) -> None:
    def same_sort(q: Quantisation) -> float:
        """How often two items with the same first code are of the same collaborative sort."""
        first = q.codes[:, 0]
        same = (first[:, None] == first[None]) & ~np.eye(200, dtype=bool)
        sort = np.arange(200) % 2
        return float((sort[:, None] == sort[None])[same].mean())

    strong = LetterConfig(**SMALL, alignment=1.0)
    aligned = fit_letter(vectors, collaborative, strong, seed=0)
    plain = fit_rqvae(vectors, RqVaeConfig(**SMALL), seed=0)
    assert same_sort(plain) < 0.55 < 0.7 < same_sort(aligned)
    assert aligned.history[-1]["alignment"] < aligned.history[0]["alignment"]
    again = fit_letter(vectors, collaborative, strong, seed=0)
    np.testing.assert_array_equal(aligned.codes, again.codes)


def test_letter_takes_collaborative_vectors_of_any_width(
    vectors: np.ndarray, collaborative: np.ndarray
) -> None:
    wide = np.tile(collaborative, 3)
    q = fit_letter(vectors, wide, LetterConfig(**SMALL, alignment=1.0))
    assert q.history[-1]["alignment"] < q.history[0]["alignment"]


def test_few_items_are_enough() -> None:
    q = fit_rqvae(np.eye(3), RqVaeConfig(**SMALL))
    assert q.codes.shape == (3, 3)


# ---- arguments ----


def test_layers_are_the_reference_ones_that_fit_between() -> None:
    assert RqVaeConfig().layers(4096) == [4096, 2048, 1024, 512, 256, 128, 64, 32]
    assert RqVaeConfig().layers(256) == [256, 128, 64, 32]
    assert RqVaeConfig().layers(20) == [20, 32]
    assert RqVaeConfig(hidden=(50, 40)).layers(20) == [20, 50, 40, 32]


def test_standardised_vectors_keep_their_shape() -> None:
    values = np.random.default_rng(0).normal(3, 7, size=(50, 4))
    got = standardised(values)
    np.testing.assert_allclose(got.mean(axis=0), 0, atol=1e-6)
    assert (got**2).mean() == pytest.approx(1, rel=1e-6)
    assert not standardised(np.ones((3, 2))).any()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (RqVaeConfig, {"levels": 0}, "levels must be at least 1; got 0"),
        (RqVaeConfig, {"balanced": "some"}, "balanced must be one of .*; got 'some'"),
        (RqVaeConfig, {"learning_rate": 0.0}, "learning_rate must be positive; got 0.0"),
        (RqVaeConfig, {"commitment": -1.0}, "commitment must not be negative; got -1.0"),
        (LetterConfig, {"alignment": float("nan")}, "alignment must not be negative; got nan"),
        (LetterConfig, {"clusters": 0}, "clusters must be at least 1; got 0"),
    ],
)
def test_bad_settings(config: type, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("bert", {}, "method must be one of rqvae, kmeans, letter; got 'bert'"),
        ("letter", {}, "method 'letter' needs collaborative"),
        ("rqvae", {"collaborative": np.eye(4)}, "method 'rqvae' does not use collaborative"),
        ("kmeans", {"steps": 5}, "method 'kmeans' has no option steps"),
        ("letter", {"collaborative": np.eye(3)}, "collaborative has 3 rows, there are 4 items"),
    ],
)
def test_bad_arguments(method: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learn_codes(method, np.eye(4), **options)  # type: ignore[arg-type]


def test_training_that_blows_up_says_so(vectors: np.ndarray) -> None:
    with pytest.raises(FloatingPointError, match=r"RQ-VAE: loss .* lower learning_rate"):
        fit_rqvae(vectors, RqVaeConfig(**{**SMALL, "learning_rate": 1e30}))
