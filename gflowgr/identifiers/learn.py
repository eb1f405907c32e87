"""One function for every method of learning codes (RQ-VAE, k-means, LETTER), one for your own."""

from __future__ import annotations

from typing import Any

import numpy as np

from gflowgr.data import Dataset
from gflowgr.data.index import Identifiers, from_codes
from gflowgr.extensions import load_outside
from gflowgr.identifiers.kmeans import fit_kmeans
from gflowgr.identifiers.letter import LetterConfig, fit_letter
from gflowgr.identifiers.quantisation import Quantisation
from gflowgr.identifiers.rqvae import RqVaeConfig, fit_rqvae

METHODS = ("rqvae", "kmeans", "letter")


def learn_codes(
    method: str,
    embeddings: np.ndarray,
    collaborative: np.ndarray | None = None,
    *,
    levels: int = 4,
    codebook_size: int = 256,
    seed: int = 0,
    progress: bool = False,
    **training: Any,
) -> Quantisation:
    """Learn codes of items.

    Args:
        method: ``"rqvae"`` (TIGER), ``"kmeans"`` (residual k-means) or ``"letter"``.
        embeddings: float [items, width], finite.
        collaborative: float [items, d_cf], finite; for LETTER, and only for it.
        levels: codes per item.
        codebook_size: codes per level.
        seed: equal arguments give equal codes on the same number of threads.
        progress: show a progress bar.
        training: further fields of :class:`RqVaeConfig` or :class:`LetterConfig`.

    Returns:
        The quantisation; items may share all their codes, see :func:`resolve_collisions`.

    Raises:
        ValueError: another method, collaborative vectors missing or not used, training options that
            the method does not have, embeddings of a wrong shape or not finite.
        FloatingPointError: the training's loss is no longer finite.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if (collaborative is not None) != (method == "letter"):
        need = "needs" if method == "letter" else "does not use"
        raise ValueError(f"method {method!r} {need} collaborative item vectors")
    if method == "kmeans":
        if training:
            raise ValueError(f"method 'kmeans' has no option {', '.join(training)}")
        return fit_kmeans(embeddings, levels, codebook_size, seed, progress=progress)
    training |= {"levels": levels, "codebook_size": codebook_size}
    if method == "letter":
        assert collaborative is not None
        config = LetterConfig(**training)
        return fit_letter(embeddings, collaborative, config, seed=seed, progress=progress)
    return fit_rqvae(embeddings, RqVaeConfig(**training), seed=seed, progress=progress)


def outside_identifiers(
    method: str, dataset: Dataset, vectors: np.ndarray | None, seed: int, *, setting: str
) -> Identifiers:
    """Identifiers by a function of the user's.

    Args:
        method: ``"module:function"``; it is called with the dataset, the vectors and the seed, and
            gives integer codes [items, L], padded with -1.
        dataset: the data.
        vectors: float32 [items, d] that it may use, or None.
        seed: handed through.
        setting: what errors call ``method``.

    Raises:
        ValueError: there is no such function, or what it gives are no codes of these items.
    """
    make = load_outside(method, setting)
    try:
        identifiers = from_codes(make(dataset, vectors, seed))
    except ValueError as error:
        raise ValueError(f"{setting}: {method}: {error}") from error
    if identifiers.num_items != dataset.num_items:
        raise ValueError(
            f"{setting}: {method} must give codes of {dataset.num_items} items; got "
            f"{identifiers.num_items}"
        )
    return identifiers
