"""Identifiers by a residual-quantised autoencoder (RQ-VAE), as in TIGER.

Rajput et al. 2023, "Recommender Systems with Generative Retrieval" (arXiv 2305.05065), section 3.1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from gflowgr.identifiers.balance import sinkhorn_codes
from gflowgr.identifiers.kmeans import fit_centres
from gflowgr.identifiers.quantisation import (
    Quantisation,
    VectorEncoder,
    blocks,
    checked_vectors,
    squared_distances,
)
from gflowgr.plain_settings import make_plain
from gflowgr.progress import progress_bar

REFERENCE_LAYERS = (2048, 1024, 512, 256, 128, 64)


@dataclass(frozen=True)
class RqVaeConfig:
    """Sizes and training of an RQ-VAE.

    Attributes:
        levels: codes per item, L.
        codebook_size: codes per level, K.
        code_width: width of a code, d.
        hidden: widths of the encoder's hidden layers (the decoder has them reversed); None: those
            of 2048-1024-512-256-128-64 that lie between the widths of input and code.
        commitment: weight of the commitment loss.
        steps: optimiser steps.
        batch_size: items per step.
        learning_rate: of AdamW at the start; it falls to 0 as a cosine.
        weight_decay: of AdamW, on the networks and not on the codebooks.
        balanced: levels whose codes are assigned by Sinkhorn balancing, in training and in the
            final coding, instead of to the nearest: ``"none"``, ``"last"`` or ``"all"``.
        revive: codes that no item took during an epoch move to items far from their own code.
        device: where it is trained.
    """

    levels: int = 4
    codebook_size: int = 256
    code_width: int = 32
    hidden: tuple[int, ...] | None = None
    commitment: float = 0.25
    steps: int = 3000
    batch_size: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    balanced: Literal["none", "last", "all"] = "none"
    revive: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        make_plain(self)
        for name in ("levels", "codebook_size", "code_width", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("commitment", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative; got {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive; got {self.learning_rate}")

    def layers(self, width: int) -> list[int]:
        """Widths of all layers of the encoder for inputs of ``width``, both ends included."""
        hidden = self.hidden
        if hidden is None:
            hidden = tuple(w for w in REFERENCE_LAYERS if self.code_width < w < width)
        return [width, *hidden, self.code_width]

    def is_balanced(self, level: int) -> bool:
        """Whether the codes of ``level`` are assigned by Sinkhorn balancing."""
        return self.balanced == "all" or (self.balanced == "last" and level == self.levels - 1)


class Coded(NamedTuple):
    """A batch through the quantiser.

    Attributes:
        codes: int64 [L, B].
        residuals: [L, B, d], the quantiser's input at each level; gradients reach the encoder.
        chosen: [L, B, d], the codes' vectors; gradients reach the codebooks.
        quantised: [B, d], the sum of the codes, with the gradient of the encoder's output
            (straight-through).
    """

    codes: torch.Tensor
    residuals: torch.Tensor
    chosen: torch.Tensor
    quantised: torch.Tensor


def quantisation_loss(
    residuals: torch.Tensor, chosen: torch.Tensor, commitment: float
) -> torch.Tensor:
    """``sum_l ||sg(r_l) - e_l||^2 + commitment ||r_l - sg(e_l)||^2`` (TIGER, section 3.1).

    Squared norms are means over the batch and the width, so that weights mean the same at any size.

    Args:
        residuals: r_l, [L, B, d].
        chosen: e_l, [L, B, d].
        commitment: weight of the second term.

    Returns:
        Scalar.
    """
    codebook = (residuals.detach() - chosen).square().mean(dim=(1, 2)).sum()
    encoder = (residuals - chosen.detach()).square().mean(dim=(1, 2)).sum()
    return codebook + commitment * encoder


class RqVae(nn.Module):
    """Encoder, residual quantiser and decoder.

    ``projection`` is free for a method's own terms (LETTER's map to the collaborative space).

    Args:
        width: of the input vectors.
        config: sizes.
        generator: of the initial weights.
    """

    def __init__(self, width: int, config: RqVaeConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        layers = config.layers(width)
        self.encoder = _mlp(layers, generator)
        self.decoder = _mlp(layers[::-1], generator)
        self.projection: nn.Linear | None = None
        self.codebooks = nn.Parameter(
            torch.zeros(config.levels, config.codebook_size, config.code_width)
        )

    @torch.no_grad()
    def start_codebooks(self, vectors: torch.Tensor, seed: int) -> None:
        """Residual k-means of the encoder's output for ``vectors`` [n, width] (TIGER, 3.1)."""
        residual = self.encoder(vectors).cpu().numpy()
        for level in range(self.config.levels):
            codes, centres = fit_centres(residual, self.config.codebook_size, seed + level)
            self.codebooks[level] = torch.from_numpy(centres)
            residual = residual - centres[codes]

    def quantise(self, latent: torch.Tensor) -> Coded:
        """Code the encoder's output [B, d] level by level."""
        residual = latent
        codes, residuals, chosen = [], [], []
        for level, codebook in enumerate(self.codebooks):
            with torch.no_grad():
                distances = (
                    residual.square().sum(dim=1, keepdim=True)
                    - 2 * residual @ codebook.T
                    + codebook.square().sum(dim=1)
                )
                balanced = self.config.is_balanced(level)
                code = sinkhorn_codes(distances) if balanced else distances.argmin(dim=1)
            codes.append(code)
            residuals.append(residual)
            chosen.append(codebook[code])
            residual = residual - chosen[-1].detach()
        # latent - (latent - sum) with the bracket detached: the value of the sum, d/d latent = 1.
        return Coded(
            torch.stack(codes),
            torch.stack(residuals),
            torch.stack(chosen),
            latent - residual.detach(),
        )


# Adds a method's own terms: (coded batch, items of the batch, model) -> loss and numbers to log.
ExtraLoss = Callable[[Coded, torch.Tensor, RqVae], tuple[torch.Tensor, dict[str, float]]]


def fit_rqvae(
    embeddings: np.ndarray,
    config: RqVaeConfig | None = None,
    *,
    seed: int = 0,
    progress: bool = False,
) -> Quantisation:
    """Train an RQ-VAE on item vectors and code the items.

    The loss is the mean squared error of the reconstruction plus :func:`quantisation_loss`.

    Args:
        embeddings: float [items, width], finite. They are centred and scaled as a whole to unit
            mean square.
        config: sizes and training; None: the defaults.
        seed: of weights, batches and k-means. Equal arguments give equal codes on the same number
            of threads.
        progress: show a progress bar.

    Returns:
        The quantisation of the encoder's outputs.

    Raises:
        ValueError: a wrong shape, a vector that is not finite.
        FloatingPointError: the loss is no longer finite.
    """
    return train(embeddings, config or RqVaeConfig(), seed, progress, "RQ-VAE")


def train(
    embeddings: np.ndarray,
    config: RqVaeConfig,
    seed: int,
    progress: bool,
    title: str,
    extra: Callable[[RqVae, torch.Generator], ExtraLoss] | None = None,
) -> Quantisation:
    """The training that RQ-VAE and LETTER share; ``extra`` makes LETTER's terms."""
    generator = torch.Generator().manual_seed(seed)
    table = checked_vectors(embeddings, "embeddings")
    vectors = torch.from_numpy(standardised(table)).to(config.device)
    model = RqVae(vectors.shape[1], config, generator).to(config.device)
    extra_loss = extra(model, generator) if extra is not None else None
    first = torch.randperm(len(vectors), generator=generator)
    first = first[: max(config.batch_size, 16 * config.codebook_size)]
    model.start_codebooks(vectors[first], seed)
    networks = [p for name, p in model.named_parameters() if name != "codebooks"]
    optimiser = torch.optim.AdamW(
        [
            {"params": networks, "weight_decay": config.weight_decay},
            {"params": [model.codebooks], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, config.steps)
    batches = _Batches(len(vectors), config.batch_size, generator)
    used = torch.zeros(config.levels, config.codebook_size, dtype=torch.int64)
    history = []
    with progress_bar(range(config.steps), desc=title, unit="step", disable=not progress) as bar:
        for step in bar:
            items = batches.next()
            batch = vectors[items]
            latent = model.encoder(batch)
            coded = model.quantise(latent)
            reconstruction = (model.decoder(coded.quantised) - batch).square().mean()
            quantisation = quantisation_loss(coded.residuals, coded.chosen, config.commitment)
            loss = reconstruction + quantisation
            numbers: dict[str, float] = {}
            if extra_loss is not None:
                more, numbers = extra_loss(coded, items, model)
                loss = loss + more
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            used += _counts(coded.codes, config.codebook_size)
            if (step + 1) % batches.per_epoch == 0:
                if config.revive:
                    revive_codes(model.codebooks, used, coded, optimiser, generator)
                used.zero_()
            if step % max(1, config.steps // 50) == 0 or step == config.steps - 1:
                numbers = {
                    "step": step + 1,
                    "loss": loss.item(),
                    "reconstruction": reconstruction.item(),
                    "quantisation": quantisation.item(),
                    **numbers,
                }
                if not math.isfinite(numbers["loss"]):
                    raise FloatingPointError(
                        f"{title}: loss {numbers['loss']} at step {step + 1}; lower learning_rate "
                        f"(now {config.learning_rate})"
                    )
                history.append(numbers)
                bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
    return replace(
        _code_catalogue(model, vectors), history=tuple(history), encoder=_encoder(model, table)
    )


@torch.no_grad()
def revive_codes(
    codebooks: nn.Parameter,
    used: torch.Tensor,
    coded: Coded,
    optimiser: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    """Move each code that no item took to a vector of the batch that is far from its own code.

    Vectors are drawn without replacement, with probabilities in proportion to their squared
    distance to their code (as k-means++ does); the optimiser forgets the code's moments.

    Args:
        codebooks: [L, K, d], changed in place.
        used: int64 [L, K], how often each code was taken.
        coded: a batch.
        optimiser: of the codebooks.
        generator: of the draws.

    Returns:
        How many codes were moved.
    """
    moved = 0
    for level in range(len(codebooks)):
        dead = (used[level] == 0).nonzero().flatten()
        far = (coded.residuals[level] - coded.chosen[level]).square().sum(dim=1).cpu()
        dead = dead[: int((far > 0).sum())]
        if not len(dead):
            continue
        rows = torch.multinomial(far, len(dead), generator=generator)
        dead = dead.to(codebooks.device)
        codebooks[level, dead] = coded.residuals[level, rows.to(codebooks.device)]
        for name in ("exp_avg", "exp_avg_sq"):
            optimiser.state[codebooks][name][level, dead] = 0.0
        moved += len(dead)
    return moved


class _Batches:
    """Batches of items: an epoch is a fresh permutation, cut; what is left over is dropped."""

    def __init__(self, count: int, batch_size: int, generator: torch.Generator) -> None:
        self._count, self._generator = count, generator
        self._size = min(batch_size, count)
        self.per_epoch = count // self._size
        self._queue: list[torch.Tensor] = []

    def next(self) -> torch.Tensor:
        if not self._queue:
            order = torch.randperm(self._count, generator=self._generator)
            self._queue = list(order.split(self._size)[: self.per_epoch])
        return self._queue.pop(0)


def standardised(vectors: np.ndarray) -> np.ndarray:
    """Centred float32 [n, d], scaled as a whole to a mean square of 1 (0 where all are equal)."""
    mean, scale = _mean_and_scale(vectors)
    return ((vectors - mean) / scale).astype(np.float32)


def _mean_and_scale(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    mean = vectors.mean(axis=0, dtype=np.float64)
    scale = math.sqrt(((vectors - mean) ** 2).mean())
    return mean, scale if scale > 0 else 1.0


def _encoder(model: RqVae, table: np.ndarray) -> VectorEncoder:
    """What made the vectors that were quantised of ``table``, without torch."""
    mean, scale = _mean_and_scale(table)
    layers = tuple(
        (each.weight.detach().cpu().numpy(), each.bias.detach().cpu().numpy())
        for each in model.encoder
        if isinstance(each, nn.Linear)
    )
    return VectorEncoder(mean.astype(np.float32), scale, layers)


def _mlp(widths: list[int], generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        linear = nn.Linear(before, after)
        nn.init.xavier_normal_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _counts(codes: torch.Tensor, size: int) -> torch.Tensor:
    return torch.stack([torch.bincount(row, minlength=size) for row in codes]).cpu()


@torch.no_grad()
def _code_catalogue(model: RqVae, vectors: torch.Tensor) -> Quantisation:
    config = model.config
    latent = np.concatenate([model.encoder(vectors[b]).cpu().numpy() for b in blocks(len(vectors))])
    codebooks = model.codebooks.detach().cpu().numpy()
    residual = latent.copy()
    codes = np.zeros((len(latent), config.levels), dtype=np.int32)
    for level, codebook in enumerate(codebooks):
        for block in blocks(len(latent)):
            distances = squared_distances(residual[block], codebook)
            if config.is_balanced(level):
                codes[block, level] = sinkhorn_codes(torch.from_numpy(distances)).numpy()
            else:
                codes[block, level] = distances.argmin(axis=1)
        residual -= codebook[codes[:, level]]
    return Quantisation(latent, codebooks, codes)
