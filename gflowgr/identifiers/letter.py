"""Identifiers by LETTER: an RQ-VAE with collaborative alignment and code diversity.

Wang et al. 2024, "Learnable Item Tokenization for Generative Recommendation" (CIKM 2024, arXiv
2405.07314), section 3.2: ``L = L_sem + alpha L_cf + beta L_div``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from gflowgr.identifiers.balance import balanced_clusters
from gflowgr.identifiers.quantisation import Quantisation, checked_vectors
from gflowgr.identifiers.rqvae import Coded, ExtraLoss, RqVae, RqVaeConfig, standardised, train


@dataclass(frozen=True)
class LetterConfig(RqVaeConfig):
    """As :class:`RqVaeConfig`, and the weights of LETTER's two terms.

    Attributes:
        alignment: alpha, the weight of :func:`alignment_loss`.
        diversity: beta, the weight of :func:`diversity_loss`.
        clusters: groups of codes per level, made anew every epoch; at most half the codes.
    """

    alignment: float = 0.02
    diversity: float = 1e-4
    clusters: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alignment", "diversity"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        if self.clusters < 1:
            raise ValueError(f"clusters must be at least 1; got {self.clusters}")


def alignment_loss(quantised: torch.Tensor, collaborative: torch.Tensor) -> torch.Tensor:
    """``-1/B sum_i log softmax_j(<q_i, h_j>)_i``: q_i finds its own item's h among the batch's.

    LETTER, equation 4.

    Args:
        quantised: q, [B, d].
        collaborative: h, [B, d].

    Returns:
        Scalar.
    """
    own = torch.arange(len(quantised), device=quantised.device)
    return nn.functional.cross_entropy(quantised @ collaborative.T, own)


def diversity_loss(
    codes: torch.Tensor, positives: torch.Tensor, codebook: torch.Tensor
) -> torch.Tensor:
    """``-1/B sum_i log softmax_{j != c_i}(<e_{c_i}, e_j>)_{+_i}``: codes near those of their group.

    LETTER, equation 5. Pulling a code to another of its group and away from all others spreads the
    codebook, and with it the items over the codes.

    Args:
        codes: c, int64 [B], the code of each item at one level.
        positives: int64 [B], for each another code of the same group; -1 leaves the item out.
        codebook: e, [K, d].

    Returns:
        Scalar; 0 if all are left out.
    """
    similarity = codebook @ codebook.T
    diagonal = torch.eye(len(codebook), dtype=torch.bool, device=codebook.device)
    log_p = similarity.masked_fill(diagonal, -torch.inf).log_softmax(dim=1)
    valid = positives >= 0
    return -log_p[codes[valid], positives[valid]].sum() / max(1, int(valid.sum()))


def draw_positives(
    codes: torch.Tensor, groups: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """For each code another one of its group, drawn uniformly; -1 for a code alone in its group.

    Args:
        codes: int64 [B].
        groups: int64 [K], the group of each code.
        generator: of the draws.

    Returns:
        int64 [B].
    """
    order = torch.argsort(groups, stable=True)
    sizes = torch.bincount(groups)
    starts = sizes.cumsum(0) - sizes
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - starts[groups[order]]
    others = sizes[groups[codes]] - 1
    # One of the other places, counted round from the code's own.
    step = 1 + (torch.rand(len(codes), generator=generator) * others).long()
    chosen = (place[codes] + step) % sizes[groups[codes]]
    return torch.where(others > 0, order[starts[groups[codes]] + chosen], -1)


def fit_letter(
    embeddings: np.ndarray,
    collaborative: np.ndarray,
    config: LetterConfig | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Quantisation:
    """Train LETTER's tokeniser on item vectors and code the items.

    Args:
        embeddings: float [items, width], finite, as for :func:`fit_rqvae`.
        collaborative: float [items, d_cf], finite: item vectors of a collaborative model, treated
            likewise. Where d_cf is not ``config.code_width``, a linear map between them is
            learned.
        config: sizes and training; None: the defaults.
        seed: of weights, batches, k-means and drawn codes.
        progress: show a progress bar.

    Returns:
        The quantisation of the encoder's outputs.

    Raises:
        ValueError: a wrong shape or number of items, a vector that is not finite.
        FloatingPointError: the loss is no longer finite.
    """
    config = config or LetterConfig()
    table = checked_vectors(collaborative, "collaborative", len(np.asarray(embeddings)))
    targets = torch.from_numpy(standardised(table)).to(config.device)

    def make(model: RqVae, generator: torch.Generator) -> ExtraLoss:
        return _LetterLoss(model, targets, config, generator, seed)

    return train(embeddings, config, seed, progress, "LETTER", make)


class _LetterLoss:
    """The two weighted terms; the groups of the codes are made anew every epoch."""

    def __init__(
        self,
        model: RqVae,
        targets: torch.Tensor,
        config: LetterConfig,
        generator: torch.Generator,
        seed: int,
    ) -> None:
        self._targets, self._config = targets, config
        self._generator, self._seed = generator, seed
        self._groups: list[torch.Tensor] = []
        self._age = 0
        self._epoch = max(1, len(targets) // config.batch_size)
        if targets.shape[1] != config.code_width:
            # Part of the model, so that its optimiser trains it.
            project = nn.Linear(config.code_width, targets.shape[1], bias=False)
            nn.init.xavier_normal_(project.weight, generator=generator)
            model.projection = project.to(targets.device)

    def __call__(
        self, coded: Coded, items: torch.Tensor, model: RqVae
    ) -> tuple[torch.Tensor, dict[str, float]]:
        config = self._config
        quantised = coded.quantised
        if model.projection is not None:
            quantised = model.projection(quantised)
        alignment = alignment_loss(quantised, self._targets[items])
        loss, numbers = config.alignment * alignment, {"alignment": alignment.item()}
        clusters = min(config.clusters, config.codebook_size // 2)
        if config.diversity > 0 and clusters >= 1:
            if self._age % self._epoch == 0:
                self._groups = [self._group(codebook, clusters) for codebook in model.codebooks]
            self._age += 1
            terms = []
            for codes, groups, codebook in zip(
                coded.codes, self._groups, model.codebooks, strict=True
            ):
                positives = draw_positives(codes.cpu(), groups, self._generator)
                terms.append(diversity_loss(codes, positives.to(codes.device), codebook))
            diversity = torch.stack(terms).mean()
            loss = loss + config.diversity * diversity
            numbers["diversity"] = diversity.item()
        return loss, numbers

    def _group(self, codebook: torch.Tensor, clusters: int) -> torch.Tensor:
        groups = balanced_clusters(codebook.detach().cpu().numpy(), clusters, seed=self._seed)
        return torch.from_numpy(groups).long()
